"""TensorRT on networks of a node or two: what it does not know, cannot build or warns of, and what it lacks."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import hawk_compile
from hawk_compile.capture.segments import SortedByScatter
from hawk_compile.errors import ExportError
from hawk_compile.exporting import tensorrt


def save(folder: Path, nodes: list[onnx.NodeProto], shape: list[int | str]) -> None:
    """`odd.onnx`: nodes from x to y, both of this shape."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy")
    graph = onnx.helper.make_graph(nodes, "odd", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), folder / "odd.onnx")


def test_a_node_that_tensorrt_does_not_know(tmp_path: Path) -> None:
    save(tmp_path, [onnx.helper.make_node("Det", ["x"], ["y"], name="the_odd_one")], ["rows", 4, 4])
    with pytest.raises(ExportError, match=r'odd cannot be exported .* node the_odd_one \(Det\): .*format="onnx"'):
        tensorrt.build("odd", tmp_path, {"x": [(1, 4, 4), (2, 4, 4), (3, 4, 4)]}, ("8.9",))


def test_a_network_that_cannot_be_built(tmp_path: Path) -> None:
    """The profile contradicts the network's own sizes."""
    save(tmp_path, [onnx.helper.make_node("Relu", ["x"], ["y"])], ["rows", 4])
    with pytest.raises(ExportError, match=r"odd cannot be built by TensorRT for compute capability 8\.9: \S+"):
        tensorrt.build("odd", tmp_path, {"x": [(1, 5), (2, 5), (3, 5)]}, ("8.9",))


def test_a_warning_that_matters_is_kept(tmp_path: Path) -> None:
    """A sort longer than TensorRT can do is built without an error: only a warning tells."""
    size = onnx.helper.make_node("Shape", ["x"], ["length"], start=1)
    sort = onnx.helper.make_node("TopK", ["x", "length"], ["y", "places"], name="the_sort")
    save(tmp_path, [size, sort], [1, "length"])
    for longest, expected in ((3840, 0), (4096, 1)):
        engines, warnings = tensorrt.build("odd", tmp_path, {"x": [(1, 2), (1, 64), (1, longest)]}, ("8.9",))
        assert engines and len([text for text in warnings if "the_sort" in text and "3840" in text]) == expected


def test_a_scatter_sorts_a_permutation() -> None:
    permutation, other, argsort = torch.randperm(9), torch.randperm(9), torch.argsort
    with SortedByScatter(permutation):
        assert torch.argsort(permutation).equal(argsort(permutation))
        assert torch.argsort(other).equal(argsort(other))
        assert torch.argsort(permutation, descending=True).equal(argsort(permutation).flip(0))
    assert torch.argsort is argsort


def test_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name == "tensorrt-rtx-cu12-libs":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ExportError, match=r'needs the package tensorrt-rtx-cu12-libs.*"hawk-compile\[tensorrt\]"'):
        hawk_compile.export(nn.Identity(), {}, tmp_path / "out", format="tensorrt")  # type: ignore[arg-type]
