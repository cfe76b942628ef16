"""The numbers in an encoder's tensors, told apart by sums of their bits, and what else decides how it computes.

torch counts the writes to a tensor, but not those through `weight.data`, by which adapters are merged and weights
loaded. So the bits themselves are read: at the speed of memory, a hundredth of what encoding an image takes.
"""

import hashlib
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LANES = 1021
"""Sums of bits of a tensor, a prime: words that change places change lanes."""
TENSORS = (Tensor, nn.Parameter, nn.Buffer)


class NotKept(Exception):
    """What is encoded now cannot be known again: says why."""


def numbers_of(tensors: Iterable[Tensor]) -> bytes:
    """A hash of the sums of the bits of tensors, of their shapes, dtypes and devices.

    Each tensor's words of 8 bytes are dealt out to LANES sums of 64 bits; what is shorter is hashed itself. The sums
    are read at the speed of memory, where they are, and wait for a device once.

    Raises:
        NotKept: a tensor whose bits cannot be read.
    """
    digest, sums = hashlib.sha256(), []
    for tensor in tensors:
        for plain in plain_tensors(tensor, digest):
            digest.update(repr((plain.dtype, plain.shape, plain.stride(), plain.device)).encode())
            sums += summed(plain)
    for device in {each.device for each in sums}:
        digest.update(bytes_of(torch.cat([each for each in sums if each.device == device])))
    return digest.digest()


def plain_tensors(tensor: Tensor, digest: Any) -> list[Tensor]:
    """A tensor, or those that one of a class of its own is made of."""
    if type(tensor) in TENSORS:
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise NotKept(f"its encoder holds a tensor on {tensor.device} whose numbers cannot be read there")
        return [tensor.detach()]
    if not hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "device_mesh"):
        raise NotKept(f"its encoder holds a {type(tensor).__name__}, whose numbers cannot be read")
    names, context = tensor.__tensor_flatten__()
    digest.update(repr((type(tensor), names, context)).encode())
    return [plain for name in names for plain in plain_tensors(getattr(tensor, name), digest)]


def summed(plain: Tensor) -> list[Tensor]:
    """int64: the sums of a tensor's words, and what is left of them."""
    flat = plain.contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    if whole == 0 or flat.data_ptr() % 8:
        flat = flat.clone()
    words, rest = flat[:whole].view(torch.int64), flat[whole:].to(torch.int64)
    rows = whole // 8 // LANES
    if rows < 2:
        return [words, rest]
    return [words[: rows * LANES].view(rows, LANES).sum(0), words[rows * LANES :], rest]


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bits, on the host."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def switches(device: torch.device) -> tuple[Any, ...]:
    """What of the process and the thread decides how an encoder computes."""
    backends: Any = torch.backends
    kind = device.type
    return (
        torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.get_default_dtype(),
        torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), backends.mkldnn.enabled,
        *(each.fp32_precision for each in (
            backends, backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv,
        )),
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled(), backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(), backends.cudnn.benchmark,
        torch.cuda.current_stream(device).stream_id if kind == "cuda" else 0,
    )  # fmt: skip


def randomness(device: torch.device) -> tuple[Any, ...]:
    """Where the generators stand that an encoder may draw from."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    drawn = np.random.get_state(legacy=False)
    return (*(bytes(bytes_of(state)) for state in states), random.getstate(), repr(drawn["state"]["pos"]),  # type: ignore[call-overload, index]
            drawn["state"]["key"].tobytes())  # type: ignore[call-overload, index]
