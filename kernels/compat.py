"""The private names of torch that operators use. A new release of torch fails in tests/test_compat.py, by name."""

import torch

check = torch._check
"""check(condition): tells a trace what holds of sizes, and is an assertion where code runs as it stands."""
