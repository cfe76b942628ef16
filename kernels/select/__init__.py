"""Which positions of a row stay: its non-visual tokens and its best visual tokens, in their original order."""
