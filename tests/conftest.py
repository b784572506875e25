"""Shared by all tests."""

import torch
from hypothesis import settings

settings.register_profile("default", derandomize=True, deadline=None)
settings.load_profile("default")

# tests work on tiny tensors, where waiting for a second thread costs more than it saves
torch.set_num_threads(1)
