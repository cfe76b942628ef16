"""An optimised model against hand-written pruned decoding: caches, batches, conversations, refusals."""
