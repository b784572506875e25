"""From text to activations: corpora, the model's forward passes, and the store that they fill."""
