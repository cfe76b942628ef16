"""The operators against an fp64 oracle, the golden values, and each Triton kernel against its reference."""
