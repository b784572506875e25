"""The feature index: everything a page about a latent shows, in one file."""
