"""Files that are read, and files that are written whole."""

from __future__ import annotations

import ast
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from hawk_compile.errors import InputError
from hawk_compile.files import digest_of, parse_json, read_bytes, read_json, write_whole
from tests.hostile import NO_JSON, places, refused
from tests.test_rooms import sources

WHAT = "settings must be a file of JSON"


@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_json(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(NO_JSON[name])
    with refused(InputError):
        read_json(tmp_path / "file", InputError, WHAT)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in places(tmp_path).values():
        with refused(InputError):
            read_json(path, InputError, WHAT)


def test_a_file_of_more_bytes_than_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"[1, 2]")
    assert read_bytes(tmp_path / "file", InputError, WHAT, 6) == b"[1, 2]"
    with pytest.raises(InputError, match="has 6 bytes, and at most 5 are read"):
        read_bytes(tmp_path / "file", InputError, WHAT, 5)
    with pytest.raises(InputError, match="has more than 5 bytes"):  # the system says 0
        read_bytes("/proc/self/status", InputError, WHAT, 5)


def test_a_file_that_cannot_be_read_behind_its_opening() -> None:
    """As one whose disk fails."""
    with pytest.raises(InputError, match="/proc/self/mem cannot be read"):
        digest_of("/proc/self/mem", InputError, WHAT)


def test_nobody_else_makes_a_file_of_a_descriptor() -> None:
    """`opened` says what cannot be read."""
    assert [path for path, text in sources("hawk_compile").items() if "fdopen(" in text] == ["hawk_compile/files.py"]


def test_the_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_of(tmp_path / "file", InputError, WHAT) == digest


def test_what_is_json() -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\u00e4\\ud83d\\ude00"], "b": {"a": 1}, "c": 9223372036854775807}'
    assert parse_json(text, InputError, "it") == {
        "a": [1, -2500.0, True, None, "ä😀"], "b": {"a": 1}, "c": 2**63 - 1
    }  # fmt: skip


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "first")
    assert path.read_text() == "first" and not stat.S_IMODE(path.stat().st_mode) & 0o100
    path.chmod(0o600)

    def broken() -> Any:
        yield "half of it"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, broken())
    assert path.read_text() == "first" and [each.name for each in tmp_path.iterdir()] == ["file"]
    (tmp_path / "link").symlink_to(path)
    write_whole(tmp_path / "link", ["second", "\n"])
    assert path.read_text() == "second\n" and (tmp_path / "link").is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, "a file that others may not read is still one"
    for nowhere in (tmp_path / "no" / "file", f"{tmp_path}/a\0b", tmp_path / ("n" * 300), tmp_path):
        with pytest.raises(OSError):
            write_whole(nowhere, "")


def test_a_device_is_written_to(capfd: pytest.CaptureFixture[str]) -> None:
    write_whole("/dev/null", "x")
    assert os.path.exists("/dev/null") and not Path("/dev/null").is_file()


READERS = re.compile(r"(json|onnx|onnx_ir|np|numpy|torch|yaml)\.loads?|.*\.read_(text|bytes)|safe_open|load_file")
"""Calls that read a file, or what a file held."""
READ_ELSEWHERE = {
    "hawk_compile/files.py": "what all others call",
    "hawk_compile/settings/head_weights.py": "the package's own file; one tensor of a file that is one",
    "hawk_compile/exporting/runner.py": "of an export, whose files are checked",
    "hawk_compile/exporting/aoti.py": "of an export, whose files are checked, or that is being written",
    "hawk_compile/exporting/tensorrt.py": "of an export, whose files are checked",
    "hawk_compile/exporting/quantize.py": "an export that is being written",
    "hawk_compile/exporting/weights.py": "an export that is being written",
    "hawk_compile/compile/pipeline.py": "the package's own sources",
    "hawk_compile/plan/chat.py": "what was dumped in the same line",
    "hawk_compile/tools/calibration/record.py": "what was dumped in the same line",
    "hawk_compile/tools/calibration/processes.py": "what another process of the same launch says",
    "hawk_compile/tools/benchmarking/memory.py": "of the system",
    "hawk_compile/tools/environment.py": "of the system",
    "hawk_compile/tools/demo/scenes.py": "the package's own file",
    "hawk_compile/tools/evaluation/commands.py": "what was written just before",
    "hawk_compile/tools/evaluation/lmms.py": "an argument of the command line",
    "hawk_compile/tools/commands/common.py": "an argument of the command line",
    "hawk_compile/tools/serve.py": "an argument of the command line",
    "hawk_compile/saved/key.py": "of the system, and the package's own files",
    "hawk_compile/saved/unchanged.py": "what was dumped in the same line",
}


def test_every_file_is_read_by_way_of_here() -> None:
    """Or it is known why not."""
    reading = {
        path for path, text in sources("hawk_compile").items() for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and READERS.fullmatch(ast.unparse(node.func))
    }  # fmt: skip
    assert reading - READ_ELSEWHERE.keys() == set(), "read it by hawk_compile.files, or say here why not"
    assert READ_ELSEWHERE.keys() - reading == set(), "they read nothing any more"
