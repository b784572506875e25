"""The shipped configurations: `saelab run quickstart/demo`."""
