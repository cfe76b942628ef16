"""Relevance of every visual token to the text that asks: HAWK's head-weighted scores (arXiv 2604.07812)."""
