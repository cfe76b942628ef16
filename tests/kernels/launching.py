"""Run a kernel launcher: on CUDA in this process, elsewhere in a process of its own under Triton's interpreter.

Triton decides at import whether its functions are interpreted, and the test process has imported it long before: one
worker process a session imports it with TRITON_INTERPRET=1 and takes calls over its pipes.
"""

import contextlib
import importlib
import json
import os
import struct
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


class Interpreter:
    """The worker process: `interpreter("score.launch_folded", *arguments)` runs it there and returns its result."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.launching"],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, launcher: str, *arguments: Any, **keywords: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        _send(self._process.stdin, (launcher, arguments, keywords))
        error, result = _receive(self._process.stdout)
        if error is not None:
            raise RuntimeError(f"{launcher} failed under the interpreter:\n{error}")
        return result

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def launch_on_cuda(launcher: str, *arguments: Any, **keywords: Any) -> Any:
    """Run a launcher on the CUDA device; takes and returns CPU tensors, with the strides they have."""
    return _move(_call(launcher, _move(arguments, "cuda"), keywords), "cpu")


def _move(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        # Tensor.to would make a dense copy of a slice.
        flat = torch.as_strided(value, (value.untyped_storage().nbytes() // value.itemsize,), (1,), 0)
        return torch.as_strided(flat.to(device), value.shape, value.stride(), value.storage_offset())
    return type(value)(_move(item, device) for item in value) if isinstance(value, tuple) else value


def _call(launcher: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    operator, function = launcher.split(".")
    module = importlib.import_module(f"hawk_compile.kernels.{operator}.triton_kernel")
    with _poisoned_memory():
        return getattr(module, function)(*arguments, **keywords)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty gives: NaN, True or -7 in an output are then places that no kernel wrote."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        value = True if tensor.dtype == torch.bool else float("nan") if tensor.dtype.is_floating_point else -7
        return tensor.fill_(value)

    torch.empty = lambda *a, **k: poison(empty(*a, **k))  # type: ignore[assignment]
    Tensor.new_empty = lambda *a, **k: poison(new_empty(*a, **k))  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, Tensor.new_empty = empty, new_empty  # type: ignore[assignment, method-assign]


def _send(stream: IO[bytes], message: Any) -> None:
    """A message of tuples, dicts, numbers, text and tensors: JSON that says where tensors stand, and their storages."""
    storages: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(storages))
            length = value.untyped_storage().nbytes() // value.itemsize
            storages[name] = torch.as_strided(value, (length,), (1,), 0).clone()
            return {"tensor": name, "layout": [list(value.shape), list(value.stride()), value.storage_offset()]}
        if isinstance(value, dict):
            return {"dict": {key: plain(item) for key, item in value.items()}}
        return {"tuple": [plain(item) for item in value]} if isinstance(value, tuple) else value

    for part in (json.dumps(plain(message)).encode(), safetensors.torch.save(storages)):
        stream.write(struct.pack("<q", len(part)) + part)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    text, data = _read_part(stream), _read_part(stream)
    storages = safetensors.torch.load(data)

    def build(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return torch.as_strided(storages[value["tensor"]], *value["layout"])
        if "dict" in value:
            return {key: build(item) for key, item in value["dict"].items()}
        return tuple(build(item) for item in value["tuple"])

    return build(json.loads(text))


def _read_part(stream: IO[bytes]) -> bytes:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError("the other process has ended")
    return stream.read(struct.unpack("<q", header)[0])


def _multiply_bfloat16() -> None:
    """Let the interpreter's tl.dot take bf16, which it holds as uint16 and would multiply as integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder
    create_dot = builder.create_dot

    def widen(handle: Any) -> Any:
        return builder.cast_impl(handle, tl.block_type(tl.float32, list(handle.data.shape)))

    def dot(a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = widen(a), widen(b)
        return create_dot(a, b, *rest)

    builder.create_dot = dot


def _serve() -> None:
    # What anything prints must not come between the messages.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _multiply_bfloat16()
    while True:
        try:
            launcher, arguments, keywords = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _send(channel, (None, _call(launcher, arguments, keywords)))
        except Exception:
            _send(channel, (traceback.format_exc(), None))


if __name__ == "__main__":
    _serve()
