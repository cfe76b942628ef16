"""The operator that carries a prefill's pruning plan into a captured graph."""
