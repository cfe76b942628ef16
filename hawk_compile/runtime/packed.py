"""Linear layers whose weights Dynamo cannot see, known before anything runs."""

from torch import nn
from torch.ao.nn import quantized
from transformers import PreTrainedModel

from hawk_compile.errors import UnsupportedModelError


def refuse_packed_weights(model: PreTrainedModel) -> None:
    """Refuse a model with layers that `torch.ao.quantization.quantize_dynamic` and its kind make: their weights are
    objects of torch's own, which no graph takes.

    Raises:
        UnsupportedModelError: names the first of them.
    """
    for path, module in model.named_modules():
        if isinstance(module, quantized.Linear):
            raise UnsupportedModelError(
                f"model.{path} is a layer of torch.ao.quantization ({named(module)}), whose packed weights cannot be "
                "captured in a graph: load the model anew and call torchao.quantization.quantize_ with "
                "Int8WeightOnlyConfig() or Int8DynamicActivationInt8WeightConfig()"
            )


def named(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
