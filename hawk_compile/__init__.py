"""Visual-token pruning for vision-language models, inside the compiled graph (HAWK, arXiv 2604.07812)."""

__version__ = "0.1.0"
