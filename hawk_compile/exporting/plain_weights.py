"""Which weights can be exported: floating-point numbers in plain tensors."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hawk_compile.errors import ExportError

PLAIN = (Tensor, nn.Parameter)
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_plain(weight: Tensor) -> bool:
    return type(weight) in PLAIN and weight.dtype in TYPES


def check_weights(model: PreTrainedModel) -> None:
    """Refuse a model whose weights are quantised already, or are no plain tensors for another reason.

    Raises:
        ExportError: names the first of them.
    """
    for path, weight in model.named_parameters():
        if not is_plain(weight):
            kind = f"{type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
            raise ExportError(
                f"model.{path} is a {kind}, and an export takes plain floating-point weights: export the model as it "
                'was before it was quantised (in ONNX, quantization="int8" makes int8 weights), or run this one with '
                "hawk_compile.optimize"
            )
