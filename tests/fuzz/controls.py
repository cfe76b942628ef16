"""Faults that a run must find: a fuzz that finds nothing with one of them in place proves nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hawk_compile.kernels.gather import reference as gathering
from hawk_compile.kernels.select import reference as selecting
from hawk_compile.plan import plan
from hawk_compile.runtime import forward, prefill

Fault = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def changed(module: Any, name: str, change: Callable[..., Any]) -> Iterator[None]:
    """A function of a module in whose place another is called, with it in front of the arguments."""
    before = getattr(module, name)
    with mock.patch.object(module, name, lambda *args, **kwargs: change(before, *args, **kwargs)):
        yield


def worst_tokens(select: Any, scores: Tensor, *others: Any) -> Any:
    return select(-scores, *others)


def padding_read(mask_for: Any, inputs: Any, planned: Any) -> Any:
    mask = mask_for(inputs, planned)
    return None if mask is None else torch.ones_like(mask)


def positions_off_by_one(gather: Any, values: Tensor, keep: Tensor) -> Tensor:
    gathered = gather(values, keep)
    return gathered if values.is_floating_point() or values.dtype == torch.bool else gathered + 1


def neighbours_budget(make_plan: Any, *args: Any, **kwargs: Any) -> Any:
    made = make_plan(*args, **kwargs)
    budget = torch.minimum(made.budget, made.budget[:1].clamp_min(1))
    object.__setattr__(made, "budget", budget)
    return made


def all_text_votes(counted: Any, question_mask: Tensor, query: str) -> Tensor:
    return counted(question_mask.roll(-1, -1) | question_mask, query)


def mask_of_the_prompt(physical_mask: Any, cache: Any, mask: Tensor | None, new_tokens: int) -> Any:
    physical = physical_mask(cache, mask, new_tokens)
    return None if physical is None else torch.ones_like(physical)


CONTROLS: dict[str, Fault] = {
    "flipped": lambda: changed(selecting, "select", worst_tokens),
    "padding": lambda: changed(prefill, "mask_for", padding_read),
    "positions": lambda: changed(gathering, "gather", positions_off_by_one),
    "neighbours": lambda: changed(prefill, "make_plan", neighbours_budget),
    "votes": lambda: changed(plan, "counted", all_text_votes),
    "steps": lambda: changed(forward, "physical_mask", mask_of_the_prompt),
}
"""The worst tokens are kept; padding is attended to in the prefill; what is gathered by position is one too far; a row
keeps no more than the first; the token in front of a question votes too; steps attend to what fills a row up."""
