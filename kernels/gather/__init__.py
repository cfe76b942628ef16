"""The kept rows of whatever runs along the sequence: embeddings, position ids, masks."""
