"""Names of quantisers (bitsandbytes, compressed-tensors, optimum-quanto): how their layers are told, and what these
make of themselves in a first call. None of them is imported here."""

import sys
from typing import Any

from torch import nn

ROWS = 32
"""A packed weight has a multiple of so many."""


def keeps_compressed(module: Any) -> bool:
    """Whether compressed-tensors has this layer: it unpacks a whole model in its first call, and rounds weights and
    inputs in every call, by code of its own."""
    scheme = getattr(module, "quantization_scheme", None)
    return type(scheme).__module__.startswith("compressed_tensors.")


def quantises_outputs(module: Any) -> bool:
    """Whether this is a layer of optimum-quanto's whose outputs are quantised tensors, as its inputs are."""
    return getattr(module, "activation_qtype", None) is not None


def pack_weight(module: nn.Module) -> None:
    """Let a layer of bitsandbytes in 4 bit pack its weight for a CPU with AVX512-BF16 now, as it would within its next
    call. Nothing where there is nothing to pack, and of other layers."""
    if not getattr(module, "support_avx512bf16_for_cpu", False) or module.training:
        return
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None or weight.device.type != "cpu" or getattr(state, "packing_format_for_cpu", False):
        return
    rows, columns = state.shape
    if rows % ROWS or columns % state.blocksize:  # which the layer's own call refuses, if it is ever called
        return
    weight.data, weight.quant_state = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu(
        weight.data, state
    )
