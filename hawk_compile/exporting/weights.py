"""Weights that two ONNX files have in common lie on disk once.

Prefill and decode hold the same decoder. ONNX lets a tensor lie in any file beside the graph, so what the second graph
needs and the first one's file already has is read from there, and a runtime that maps files into memory holds it once.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def share_weights(first: Path, second: Path) -> None:
    """Let the second ONNX file read from the first one's data what both hold; its own data file keeps the rest."""
    import onnx_ir

    own = second.with_name(f"{second.name}.data")
    held = {content_key(tensor): tensor for tensor in external(onnx_ir.load(first)).values()}
    model = onnx_ir.load(second)
    rest: dict[str, onnx_ir.Tensor] = {}
    for name, tensor in external(model).items():
        same = held.get(content_key(tensor))
        if same is None:
            rest[name] = onnx_ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
        else:
            model.graph.initializers[name].const_value = onnx_ir.ExternalTensor(
                same.location, same.offset, same.length, tensor.dtype, shape=tensor.shape, name=name,
                base_dir=second.parent,
            )  # fmt: skip
    own.unlink(missing_ok=True)
    if rest:
        written = onnx_ir.external_data.convert_tensors_to_external(list(rest.values()), second.parent, own.name)
        for name, kept in zip(rest, written, strict=True):
            model.graph.initializers[name].const_value = kept
    onnx_ir.save(model, second)


def locations(path: Path) -> list[str]:
    """The data files that an ONNX file reads, by name."""
    import onnx_ir

    return sorted({str(tensor.location) for tensor in external(onnx_ir.load(path)).values()})


def external(model: "onnx_ir.Model") -> "dict[str, onnx_ir.ExternalTensor]":
    """The initializers that lie outside the graph, by name."""
    import onnx_ir

    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, onnx_ir.ExternalTensor)}


def content_key(tensor: "onnx_ir.ExternalTensor") -> tuple[int, bytes]:
    """What tells a tensor's bytes from others: two types may share them, and two shapes."""
    content = tensor.tobytes()
    return len(content), hashlib.sha256(content).digest()
