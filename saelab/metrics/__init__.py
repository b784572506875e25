"""The only definitions of metrics in the project; see docs/metrics.md."""
