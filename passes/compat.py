"""The private names of torch that passes use. A new release of torch fails in tests/test_compat.py, by name."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher  # traces a node's values anew
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph as invoke_subgraph  # calls a graph shared by layers
from torch._ops import OpOverload as OpOverload  # aten.add.Tensor, as graphs of torch.export have them
from torch._ops import OpOverloadPacket as OpOverloadPacket  # aten.add
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor  # what stands in for values in a graph
from torch.distributed._functional_collectives import all_reduce as all_reduce  # a sum over ranks that can be traced
from torch.utils._pytree import tree_flatten as tree_flatten  # the tensors in nested lists and dicts

assert_async = torch._assert_async
"""assert_async(condition, message): an assertion that does not wait for the device."""

ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "_assert")
"""Operators and functions that check something and give nothing."""

CHECK_NAMES = ("_assert", "_check")
"""How the names of all that checks begin."""

GUARDS = "_guards_fn"
"""The submodule in which a graph of torch.export keeps its checks of the inputs."""

TO_COPY, UNSAFE_VIEW, ATEN_SOFTMAX = "_to_copy", "_unsafe_view", "_softmax"
"""Operators of ATen: `to`, and `view` of what nobody else holds."""


TORCH = Path(torch.__file__).parent
DYNAMO = TORCH / "_dynamo"


def asked_by_code(guard: Any) -> bool:
    """Whether a condition on sizes comes from Python code that was traced (a branch, a number made of a comparison),
    and not from what works out an operator's shapes."""
    file = Path(getattr(guard.sloc.framework_loc, "filename", ""))
    return not file.is_relative_to(TORCH) or file.is_relative_to(DYNAMO)


def schema_of(operator: OpOverload) -> Any:
    """The operator's schema: its arguments, and whether it writes into one of them (`is_mutable`)."""
    return operator._schema


def storage_of(value: Tensor) -> int:
    """What tells the memory of a tensor from that of others, fake ones and those inside a vmap included."""
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    return value.untyped_storage()._cdata
