"""What of models' own code stands in graphs as one operator: mixers of chunks, experts in loops, indexers."""

from typing import Any

from torch import nn

from hawk_compile.capture.experts import experts_stood_for
from hawk_compile.capture.indexers import indexers_stood_for
from hawk_compile.capture.mixers import mixers_stood_for

STOOD_FOR = (mixers_stood_for, experts_stood_for, indexers_stood_for)


def begin_operators(user: Any, model: nn.Module) -> None:
    """Let captures of a model hold these operators until `end_operators`, or for as long as the user lives."""
    for each in STOOD_FOR:
        each.begin(user, model)


def end_operators(user: Any) -> None:
    for each in STOOD_FOR:
        each.end(user)
