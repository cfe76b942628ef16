"""Several processes that calibrate together, as `accelerate launch` or `torchrun` start them.

What they tell one another is JSON in tensors of bytes: numbers come out as they went in.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from typing import Any

import torch

from hawk_compile.errors import InputError


class Processes:
    """The processes of one launch; a process that no launcher started is alone, and needs no accelerate.

    Attributes:
        count: how many there are. number: which this is. main: whether it is the one that writes and shows progress.

    Raises:
        InputError: several processes without accelerate.
    """

    def __init__(self, device: torch.device):
        self.count, self.number = 1, 0
        if launched() > 1:
            if importlib.util.find_spec("accelerate") is None:
                raise InputError(
                    "WORLD_SIZE must be 1 where accelerate, by which processes calibrate together, is not installed; "
                    f'got {launched()}: pip install "hawk-compile[distributed]"'
                )
            from accelerate import PartialState

            state = PartialState(cpu=device.type in ("cpu", "mps"))  # which choose gloo
            self.count, self.number, self.device = state.num_processes, state.process_index, state.device
        self.main = self.number == 0

    def share(self, value: Any) -> list[Any]:
        """Each process's value, which JSON can hold, in every process. All must call it."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather

        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths = gather(torch.tensor([text.numel()], device=self.device)).tolist()
        rows = gather(torch.nn.functional.pad(text, (0, max(lengths) - text.numel()))).view(self.count, -1).cpu()
        return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def each(self, action: Callable[[], Any]) -> list[Any]:
        """What an action gives in each process. All must call it.

        Raises:
            InputError: it failed in another process; where it failed, its own error is raised.
        """
        value, failure = None, None
        try:
            value = action()
        except Exception as error:
            failure = error
        reason = None if failure is None else f"{type(failure).__name__}: {failure}"
        found = self.share({"value": value, "error": reason})
        if failure is not None:
            raise failure
        for number, told in enumerate(found):
            if told["error"] is not None:
                raise InputError(f"process {number} could not go on, and so none can: {told['error']}")
        return [told["value"] for told in found]


def launched() -> int:
    """How many processes the launcher of this one started."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def own_device(device: str | None) -> str | None:
    """"cuda" is another GPU in each process of a machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and launched() > 1 else device
