"""What a process of its own makes of an optimised model, and of a conversation, that it is sent, for `test_travelling`
and `test_travelling_caches`."""

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


def go_on(number: int, model: Any, path: str, ids: torch.Tensor, results: Any) -> None:
    """Puts the last logits behind a conversation whose cache lies in a file, and its report's number of kept tokens."""
    torch.set_num_threads(1)
    cache = torch.load(path, weights_only=False)
    logits = model(input_ids=ids, past_key_values=cache).logits
    results.put((logits[0, -1].detach().tolist(), hawk_compile.report(cache).kept_tokens))
