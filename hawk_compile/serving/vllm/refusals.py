"""What a served checkpoint or a prompt is refused for, once it is known where the items of a prompt stand."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hawk_compile.errors import InputError, UnsupportedModelError
from hawk_compile.serving.settings import KEY, RATIO

Run = tuple[int, int]
"""(first, last) place of visual tokens that follow each other in a prompt."""


def check_modalities(config: Any, taken: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of which nothing would ever be pruned.

    Raises:
        UnsupportedModelError: it takes none of the modalities.
    """
    if not set(taken) & set(config.modalities):
        raise UnsupportedModelError(
            f"this model takes {' and '.join(taken)}, and modalities={list(config.modalities)} are pruned, so that "
            f"nothing ever would be: leave {KEY} out of hf_overrides"
        )


def runs_of(placeholders: Mapping[str, Sequence[Any]]) -> list[Run]:
    """The runs of a prompt in order, whatever the modality."""
    return sorted(span for ranges in placeholders.values() for each in ranges for span in each.extract_embeds_range())


def check_apart(runs: Sequence[Run]) -> None:
    """Refuse items whose visual tokens touch: the position of the second could not be told.

    Args:
        runs: of visual tokens, in order.

    Raises:
        InputError: such items.
    """
    for (_, last), (first, _) in itertools.pairwise(runs):
        if first == last + 1:
            raise InputError(
                "two images of this prompt touch, with no text between their visual tokens: put text between them, or "
                f'ask for mm_processor_kwargs={{"{RATIO}": 0}}'
            )


def check_text(
    ids: Sequence[int], runs: Sequence[Run], places: Collection[int], decoded: Callable[[list[int]], str]
) -> None:
    """Refuse a prompt in whose text stands an id that stands for visual tokens: the model would take it for one.

    Args:
        ids: of the prompt as the model reads it.
        runs: of visual tokens.
        places: the ids that stand for visual tokens.
        decoded: the text of ids.

    Raises:
        InputError: such a prompt.
    """
    text = list(ids)
    for first, last in runs:
        text[first : last + 1] = [-1] * (last + 1 - first)
    if wrong := set(places).intersection(text):
        raise InputError(
            f"the text of this prompt holds {decoded(sorted(wrong))!r}, which stands for visual tokens: leave it out "
            f'of what users write, or ask for mm_processor_kwargs={{"{RATIO}": 0}}'
        )
