"""Many calls of many kinds at once on one optimised model, some of which fail; see `__main__.py`."""
