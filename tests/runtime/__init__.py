"""An optimised model against hand-written pruned decoding: generate, caches, batches, conversations, and what is refused."""
