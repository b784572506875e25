"""Which parts of a model carry a task: prompts, causal effects of parts, and scores of heads."""
