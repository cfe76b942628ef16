"""Files of head weights that somebody else has written: read right, or refused."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import save

from hawk_compile.errors import HeadWeightsError
from hawk_compile.settings.head_weights import FILE_NAME, normalised, weights_for
from tests.hostile import NO_JSON, VALUES, mutated, other_value, places, refused, taken_or_refused

HEADS = 4
VALID = {"weights": [0.1, 0.2, 0.3, 0.4], "origin": "measured"}


def header(content: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


LYING = {
    "more bytes than there are": header({"weights": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "a shape of more": header({"weights": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 16]}}, bytes(16)),
    "a shape that overflows": header(
        {"weights": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}}, bytes(16)),
    "a negative size": header({"weights": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, bytes(16)),
    "offsets turned round": header({"weights": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, bytes(16)),
    "an unknown type": header({"weights": {"dtype": "X7", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
    "booleans": header({"weights": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
    "complex numbers": header({"weights": {"dtype": "C64", "shape": [4], "data_offsets": [0, 32]}}, bytes(32)),
    "a matrix": save({"weights": torch.ones(2, 2)}),
    "no tensor": save({}),
    "thousands of others": save({f"layer.{number}.weight": torch.ones(1) for number in range(5000)}),
    "far too many": save({"weights": torch.ones(1 << 17)}),
    "a header of 2^63 bytes": header(b"{}", length=1 << 63),
    "a header of a gigabyte": header(b"{}", length=1 << 30),
    "deep": header(b'{"a":' * 100_000),
    "a pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "nothing": b"",
}  # fmt: skip


def read(path: Path) -> torch.Tensor:
    values = weights_for(path, HEADS, "").values
    assert values.shape == (HEADS,) and bool((values >= 0).all()) and abs(float(values.sum()) - 1) < 1e-5
    return values


@pytest.mark.parametrize("name", NO_JSON)
def test_beside_a_checkpoint(tmp_path: Path, name: str) -> None:
    """Equal weights, or those of a published name, would be another choice of tokens, silently."""
    (tmp_path / FILE_NAME).write_bytes(NO_JSON[name])
    with refused(HeadWeightsError):
        weights_for("auto", HEADS, str(tmp_path))


def test_something_else_beside_a_checkpoint(tmp_path: Path) -> None:
    for name, place in places(tmp_path).items():
        if name in ("nowhere", "a NUL", "a long name"):
            continue
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        (folder / FILE_NAME).symlink_to(place)
        with refused(HeadWeightsError):
            weights_for("auto", HEADS, str(folder))
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "gone")
    with refused(HeadWeightsError):
        weights_for("auto", HEADS, str(tmp_path))


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    for suffix in ("", ".json", ".safetensors"):
        home = tmp_path / f"of{suffix}"
        home.mkdir()
        for name, place in places(home).items():
            path = place
            if suffix and name not in ("a NUL", "a long name", "nowhere"):
                path = tmp_path / f"{name.replace(' ', '-')}{suffix}"
                path.symlink_to(place)
            with refused(HeadWeightsError):
                read(path)


@pytest.mark.parametrize("name", LYING)
def test_safetensors_that_lie(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(LYING[name])
    with refused(HeadWeightsError):
        read(path)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_other_values(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "weights.json"
    for content in (value, {"weights": value}, {"weights": [1, 1, 1, value]}):
        path.write_text(json.dumps(content))
        if content == {"weights": [1, 1, 1, value]} and type(value) in (int, float) and 0 <= value < 1e38:
            read(path)
        else:
            with refused(HeadWeightsError):
                read(path)


@pytest.mark.parametrize("values", [[3e38] * 4, [1e-45] * 4, [3e38, 1e-45, 0, 0], [1e-40, 3e-40, 0, 0]])
def test_finite_numbers_whose_sum_is_none(values: list[float]) -> None:
    """They were all 0, or infinite, after the division."""
    found = normalised(torch.tensor(values), "", 4).values
    wanted = torch.tensor(values).double() / torch.tensor(values).double().sum()
    torch.testing.assert_close(found, wanted.float())


def fuzz(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    kind = draw.randrange(4)
    path = tmp_path / ("weights.safetensors" if kind > 1 else "weights.json")
    if kind == 0:
        path.write_bytes(mutated(json.dumps(VALID).encode(), draw))
    elif kind == 1:
        path.write_text(json.dumps(other_value(VALID, draw)))
    elif kind == 2:
        path.write_bytes(mutated(save({"weights": torch.rand(HEADS), "bias": torch.ones(2)}), draw))
    else:
        path.write_bytes(draw.randbytes(draw.randrange(200)))
    taken_or_refused(lambda: read(path))


@examples(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mutations(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    fuzz(tmp_path_factory.getbasetemp(), seed)


@pytest.mark.slow
@examples(max_examples=2000, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_many_mutations(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    fuzz(tmp_path_factory.getbasetemp(), seed)
