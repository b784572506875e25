"""The commands of `saelab circuits`: what they are told, make as artifacts, and print."""
