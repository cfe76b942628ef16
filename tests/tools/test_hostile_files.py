"""Questions, pictures, progress and surveys that somebody else has written: read right, or refused."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

import hawk_compile
from hawk_compile.errors import HawkError, InputError, UnsupportedModelError
from hawk_compile.tools.calibration.record import whole_lines
from hawk_compile.tools.calibration.result import Calibration
from hawk_compile.tools.checkpoints import read_model, read_processor
from hawk_compile.tools.demo.run import MODEL
from hawk_compile.tools.evaluation.sample import FORMATS, Sample, formats, picture
from hawk_compile.tools.evaluation.samples import read_samples
from hawk_compile.tools.inspection.without_weights import read_config
from hawk_compile.tools.survey.table import read_types
from hawk_compile.tools.survey.tiny import read
from tests.hostile import NO_JSON, VALUES, mutated, other_value, places, refused, taken_or_refused

RECORD = {"image": "cat.png", "question": "What is this?", "answers": ["a cat"], "kind": "animal"}
PROGRESS = [{"ablation": "score", "date": "2026-11-26"}, {"batch": "data:0", "scores": [[0.5, 1.0], [0.25, 1.0]]}]
READERS = {"progress": whole_lines, "survey": read_types, "tiny model": read}


def encoded(format: str, **options: Any) -> bytes:
    data = io.BytesIO()
    Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(data, format, **options)
    return data.getvalue()


PICTURES = {name: encoded(name) for name in formats() if name not in ("MPO",)}


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG that says it is so large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BOMBS = {
    "a picture of 10^10 pixels": png(100_000, 100_000, zlib.compress(bytes(1 << 20))),
    "a picture of 2^62 pixels": png(2**31 - 1, 2**31 - 1, zlib.compress(b"")),
    "no pixels": png(0, 0, zlib.compress(b"")),
    "a text that unpacks to a gigabyte": (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
        + chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 26), 9)) + chunk(b"IDAT", zlib.compress(bytes(4)))
        + chunk(b"IEND", b"")
    ),
    "PostScript, which runs a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "an icon": b"\0\0\1\0\1\0\1\1\0\0\1\0\x18\0",
    "a script": b"#!/bin/sh\ntouch /tmp/hawk\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_are_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(BOMBS[name])
    with refused(InputError):
        picture(path, "line 1")


def test_pictures_that_are_no_files(tmp_path: Path) -> None:
    for path in places(tmp_path).values():
        with refused(InputError):
            picture(path, "line 1")
        with refused(InputError):
            Sample((path,), "?", ("x",), origin="line 1").sizes()


def test_pictures_of_every_format(tmp_path: Path) -> None:
    assert {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"} <= {*formats()} <= {*FORMATS}
    for name, content in PICTURES.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert picture(path, "").size == (40, 30) and picture(path, "").mode == "RGB"


@pytest.mark.parametrize("name", NO_JSON)
def test_questions_that_are_no_json(tmp_path: Path, name: str) -> None:
    (tmp_path / "cat.png").write_bytes(PICTURES["PNG"])
    (tmp_path / "questions").write_bytes(json.dumps(RECORD).encode() + b"\n" + NO_JSON[name] + b"\n")
    if not NO_JSON[name].strip():
        assert len(read_samples(tmp_path / "questions")) == 1
        return
    with refused(InputError):
        read_samples(tmp_path / "questions")


def test_questions_that_are_no_file(tmp_path: Path) -> None:
    for path in places(tmp_path).values():
        with refused(InputError):
            read_samples(str(path))


@pytest.mark.parametrize("kind", READERS)
def test_other_files(tmp_path: Path, kind: str) -> None:
    for name, content in NO_JSON.items():
        (tmp_path / "file").write_bytes(content + b"\n")
        with refused(InputError):
            READERS[kind](tmp_path / "file")
            raise AssertionError(name)
    (tmp_path / "places").mkdir()
    for path in places(tmp_path / "places").values():
        with refused(InputError):
            READERS[kind](path)
    for value in VALUES:
        (tmp_path / "file").write_text(json.dumps(value) + "\n")
        taken_or_refused(lambda: READERS[kind](tmp_path / "file"))


EVIL = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"


@pytest.mark.parametrize("read", [
    lambda folder: read_model(folder, torch.float32), read_processor, read_config, hawk_compile.load,
])  # fmt: skip
def test_code_of_a_checkpoint_is_not_run(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    """Nor does transformers ask whoever sits at the terminal."""
    demo = Path(MODEL)
    for file in demo.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes() if file.suffix == ".json" else b"")
    (tmp_path / "evil.py").write_text(EVIL)
    names = ("AutoConfig", "AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
    code = {"auto_map": dict.fromkeys(names, "evil.Evil"), "model_type": "evil", "processor_class": "Evil"}
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps(code))
    with refused(HawkError):
        read(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["", "text_config", "vision_config"])
def test_a_kernel_that_a_checkpoint_names_is_not_fetched(tmp_path: Path, part: str) -> None:
    """For the whole model, or for a part of it alone."""
    content = json.loads((Path(MODEL) / "config.json").read_text())
    content["attn_implementation"] = {part: "kernels-community/attention"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match="names the attention kernels-community/attention of the Hub"):
        read_model(tmp_path, torch.float32)


def fuzz(folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    valid = json.dumps(RECORD).encode()
    match draw.randrange(5):
        case 0:
            (folder / "questions").write_bytes(mutated(valid, draw))
            taken_or_refused(lambda: read_samples(folder / "questions"))
        case 1:
            (folder / "questions").write_text(json.dumps(other_value(RECORD, draw)))
            taken_or_refused(lambda: read_samples(folder / "questions"))
        case 2:
            (folder / "progress").write_bytes(mutated(lines(PROGRESS), draw))
            taken_or_refused(lambda: whole_lines(folder / "progress"))
        case 3:
            (folder / "progress").write_bytes(lines(other_value(PROGRESS, draw)))
            taken_or_refused(lambda: whole_lines(folder / "progress"))
        case _:
            (folder / "picture").write_bytes(mutated(draw.choice([*PICTURES.values()]), draw))
            taken_or_refused(lambda: picture(folder / "picture", "line 1"))


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def of_fuzzing(factory: pytest.TempPathFactory) -> Path:
    folder = factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        folder.mkdir()
        (folder / "cat.png").write_bytes(PICTURES["PNG"])
    return folder


@pytest.mark.filterwarnings("ignore")
@examples(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mutations(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    fuzz(of_fuzzing(tmp_path_factory), seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@examples(max_examples=3000, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_many_mutations(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    fuzz(of_fuzzing(tmp_path_factory), seed)


def test_what_was_measured_survives_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Calibration([1.0], {}, [], "score", "exact", [0.8], 0, "", None, "", {})
    found.write(tmp_path / "weights.json")
    before = (tmp_path / "weights.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        found.write(tmp_path / "weights.json")
    assert (tmp_path / "weights.json").read_bytes() == before and len([*tmp_path.iterdir()]) == 1
