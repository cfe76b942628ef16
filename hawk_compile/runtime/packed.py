"""Quantised layers: what Dynamo cannot follow in them is known before anything runs, or done ahead of the graph."""

from torch import nn
from torch.ao.nn import quantized
from transformers import PreTrainedModel

from hawk_compile.capture.inside import graph_modules
from hawk_compile.compat.quantisers import keeps_compressed, pack_weight, quantises_outputs
from hawk_compile.errors import UnsupportedModelError


def refuse_quantised(model: PreTrainedModel) -> None:
    """Refuse a model with quantised layers that no graph takes: `torch.ao.quantization.quantize_dynamic` makes weights
    that are objects of torch's own, compressed-tensors unpacks a model within its first call, and quantised activations
    of optimum-quanto would be scored as they are.

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
        if keeps_compressed(module):
            raise UnsupportedModelError(
                f"model.{path} is quantised by compressed-tensors, whose layers cannot be captured in a graph: load "
                "the model with quantization_config=CompressedTensorsConfig(dequantize=True), or quantise it with "
                "another library; its weights would be unpacked by a first call all the same"
            )
    for path, module in graph_modules(model):
        if quantises_outputs(module):
            raise UnsupportedModelError(
                f"model.{path} has quantised activations ({named(module)}, activations=), and what it computes cannot "
                "be captured in a graph: load the model anew and quantise its weights alone (activations=None)"
            )


def pack_weights(model: PreTrainedModel) -> None:
    """Let layers that pack their weights within their next call do so now: no graph may write what it has read."""
    for _, module in graph_modules(model):
        pack_weight(module)


def named(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
