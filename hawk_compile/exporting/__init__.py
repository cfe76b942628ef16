"""Pruned models outside PyTorch: what is exported, in which formats, and how it is run there."""
