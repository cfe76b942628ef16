"""What processors read of a served checkpoint, once: vLLM makes one for every chat with an image, only to ask it how
many there may be."""

import weakref
from dataclasses import dataclass
from typing import Any

from hawk_compile.serving.questions import Reader
from hawk_compile.serving.settings import by_own_turn, serving_config
from hawk_compile.serving.vllm import tally
from hawk_compile.serving.vllm.compat.processor import SOUNDS, chat_and_ids, named_places, why_no_text_inside
from hawk_compile.serving.vllm.model import rule_of_positions
from hawk_compile.serving.vllm.positions import is_plain, room
from hawk_compile.serving.vllm.refusals import check_modalities
from hawk_compile.settings.config import HawkConfig


@dataclass(frozen=True)
class Checkpoint:
    """
    Attributes:
        config: the server's settings.
        why_no_text_inside: as `items.check_inner` takes it.
        reader: of whose text votes.
        places: the ids that stand for visual tokens: those with a name, and what prompts have shown.
        sounds: the ids that stand for audio.
        rule: of the positions of an item.
        room: how many positions more than tokens a prompt may take.
        tally: of what came in and was kept.
    """

    config: HawkConfig
    why_no_text_inside: str
    reader: Reader
    places: set[int]
    sounds: set[int]
    rule: Any
    room: int
    tally: tally.Tally


known: dict[int, tuple["weakref.ref[Any]", Checkpoint]] = {}
"""By the place in memory of a configuration of vLLM's, which has no hash; as long as it lives."""


def checkpoint_of(info: Any, served: type) -> Checkpoint:
    """What is known of the checkpoint of a processor.

    Args:
        info: the processor's.
        served: the class of the model (`model.pruned_class`), one for a configuration.

    Raises:
        HawkError: settings, or a checkpoint, that cannot be served pruned.
    """
    model = info.ctx.model_config
    place = id(model)
    held = known.get(place)
    if held is None or held[0]() is not model:
        held = known[place] = (weakref.ref(model, lambda _: known.pop(place, None)), read(info, served))
    return held[1]


def read(info: Any, served: type) -> Checkpoint:
    model = info.ctx.model_config
    whole, config = model.hf_config, info.get_hf_config()  # of models that talk, the part that reads
    settings, plain = serving_config(whole.hawk), is_plain(whole)
    check_modalities(settings, info.supported_mm_limits)
    ids, chat = chat_and_ids(info, settings)
    return Checkpoint(
        config=settings,
        why_no_text_inside=why_no_text_inside(model),
        reader=Reader(ids, chat, by_own_turn(whole.hawk), settings.used_query),
        places=named_places(config),
        sounds=named_places(config, SOUNDS),
        rule=rule_of_positions(served, config, plain),
        room=room(plain, model.max_model_len),
        tally=tally.of_process(),
    )
