"""How much memory a call takes, and whether an error says that there was too little."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or what caused it, is an allocation that failed."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(each in str(error) for each in words):
            return True
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return False


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else freed memory stays resident, and a call that takes it again seems to need none


def peak_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int | None, Any]:
    """(most memory in use during a call, less what was in use before it; what the call returned).

    On CUDA what torch's allocator handed out; on a CPU the process's resident memory, None where the system does not
    tell it (it is Linux that does).
    """
    release(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, output
    try:
        CLEAR.write_text(RESET_PEAK, encoding="ascii")
        before = resident("VmRSS")
    except OSError:
        return None, call()
    output = call()
    return resident("VmHWM") - before, output


def resident(name: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
