"""What a process of its own makes of an optimised model that it is sent, for `test_travelling`."""

from __future__ import annotations

from typing import Any

import torch

import hawk_compile


def answer(number: int, model: Any, inputs: dict[str, torch.Tensor], results: Any) -> None:
    """Puts the last logits and the number of kept tokens into a queue, as lists: tensors would need this process alive,
    and more than a pipe holds somebody who reads."""
    torch.set_num_threads(1)
    logits = model(**inputs).logits
    kept = hawk_compile.report(model).kept_visual_tokens.tolist()
    results.put((logits[0, -1].detach().tolist(), kept))
