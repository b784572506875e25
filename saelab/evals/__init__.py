"""Evaluators: they score any dictionary on any store, through protocols."""
