"""What the passes find in a model, without its weights: the real capture and the real passes."""

import os
from dataclasses import dataclass
from typing import Any

from torch import fx
from transformers import PreTrainedConfig, PreTrainedModel

from hawk_compile.capture.modalities import AUDIO, encodes_audio_itself, takes
from hawk_compile.compile.backend import options_of
from hawk_compile.compile.pipeline import PRUNING, run_passes
from hawk_compile.errors import InputError, UnsupportedModelError
from hawk_compile.plan.ids import special_ids
from hawk_compile.runtime.checks import check_model
from hawk_compile.runtime.handover import first_with_keys
from hawk_compile.runtime.wholes import pruned_part
from hawk_compile.settings.config import MODALITIES, HawkConfig, make_config
from hawk_compile.tools.inspection.findings import Gathered, described, identifiers
from hawk_compile.tools.inspection.flops import count_flops, scoring_flops, work_left
from hawk_compile.tools.inspection.sample import captured
from hawk_compile.tools.inspection.without_weights import hollow, keep_layers, on_meta

CAPTURED_LAYERS = 2
"""Decoder layers that are captured, if the one that scores is among them: others only repeat what crosses the cut."""


@dataclass(frozen=True)
class Inspection:
    """What the passes find in a model's prefill of one row, and what pruning saves there.

    Attributes:
        model: the class of the model, or of an omni model's part that prunes.
        layers: decoder layers of the model; `captured_layers` of them were captured.
        merges: the nodes that scatter visual features into the token embeddings, first to last.
        attention: the attention whose queries and keys are scored, as a module path.
        scoring_layer: the decoder layer that it belongs to, counted from 0; layers before it keep states and run at S.
        norm: the norm that the projections read, as a module path; None if they do not read one value.
        query_projection, key_projection: module paths of the linears; None if heads do not come from one linear.
        heads, kv_heads, head_dim, width: of the scoring layer; width is D.
        form: 'folded' or 'projected': how visual tokens are scored; `why` says what decided it.
        gathered: everything that is gathered.
        placeholders: ids that visual features replace.
        vision_end, end_of_turn: ids that close an image and a turn, by which the question is found.
        ratio: fraction of visual tokens removed.
        visual_tokens, kept_visual_tokens: V and V' of the prompt that the numbers are for; with a budget, the most.
        prompt_tokens, kept_tokens: S and S'.
        flops, kept_flops: of the decoder's prefill at S and at S', with one position's logits; a multiply-add is two,
            attention counts S x S. None where they could not be counted.
        scoring_flops: of the score, to be added to `kept_flops`; what another selector does besides is not counted.
    """

    model: str
    layers: int
    captured_layers: int
    merges: tuple[str, ...]
    attention: str
    scoring_layer: int
    norm: str | None
    query_projection: str | None
    key_projection: str | None
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    form: str
    why: str
    gathered: tuple[Gathered, ...]
    placeholders: tuple[int, ...]
    vision_end: tuple[int, ...]
    end_of_turn: tuple[int, ...]
    ratio: float
    visual_tokens: int
    kept_visual_tokens: int
    prompt_tokens: int
    kept_tokens: int
    flops: int | None
    kept_flops: int | None
    scoring_flops: int

    @property
    def flop_ratio(self) -> float | None:
        """As `work_left` has it."""
        return work_left(self.flops, self.kept_flops, self.scoring_flops)


def inspect_model(
    source: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
    config: HawkConfig | None = None,
    *,
    image_tokens: int = 1024,
    text_tokens: int = 64,
    layers: int = CAPTURED_LAYERS,
    **settings: Any,
) -> Inspection:
    """Capture a model's prefill, run the passes on it and say what they found. No weights are read or allocated.

    Args:
        source: a checkpoint folder or its config.json, a config, or a model, which is left as it is (adapters on a
            model are seen; those beside a folder are not).
        config: the settings, or
        image_tokens: V, visual tokens of the prompt that tokens and FLOPs are given for; at least 2.
        text_tokens: its other tokens; at least 1.
        layers: how many decoder layers to capture; more take longer.
        **settings: the settings by name; see `HawkConfig`. `ratio` is the fraction of visual tokens removed. All
            modalities are asked for where nothing is said of them.

    Raises:
        ConfigError: a setting out of its range.
        InputError: a path or a number that cannot be used.
        UnsupportedModelError: a model that cannot be pruned.
        CaptureError: a model whose forward cannot be captured.
        GraphError: a model whose graph cannot be pruned.
    """
    modalities = MODALITIES if config is None and "modalities" not in settings else None
    config = make_config(config, settings)
    least = {"image_tokens": (image_tokens, 2), "text_tokens": (text_tokens, 1), "layers": (layers, 1)}
    for name, (given, minimum) in least.items():
        if not isinstance(given, int) or given < minimum:
            raise InputError(f"{name} must be a whole number of at least {minimum}, got {given!r}")
    model = pruned_part(on_meta(source))
    modality = asked_modality(model, modalities or config.modalities)
    total = model.config.get_text_config().num_hidden_layers
    kept = config.bounds(image_tokens, config.floor(image_tokens), text_tokens)[1]
    before, after = text_tokens + image_tokens, text_tokens + kept
    flops, kept_flops = count_flops(model, before), count_flops(model, after)
    captured = keep_layers(model, max(layers, first_with_keys(model) + 1), total)
    graph = pruned_graph(hollow(model), config, before, image_tokens, modality)
    facts = described(graph) | identifiers(model, special_ids(model, config))
    return Inspection(
        model=type(model).__name__,
        layers=total,
        captured_layers=captured,
        ratio=config.ratio,
        visual_tokens=image_tokens,
        kept_visual_tokens=kept,
        prompt_tokens=before,
        kept_tokens=after,
        flops=flops,
        kept_flops=kept_flops,
        scoring_flops=scoring_flops(
            facts["form"], facts["width"], facts["heads"], facts["kv_heads"], facts["head_dim"], before
        ),
        **facts,
    )


def asked_modality(model: PreTrainedModel, modalities: tuple[str, ...]) -> str:
    """The first of these that the model takes.

    Raises:
        UnsupportedModelError: a model that cannot be pruned, or whose prefill cannot be captured without its audio.
    """
    check_model(model, modalities)
    modality = next(each for each in modalities if takes(model, each))
    if modality == AUDIO and encodes_audio_itself(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} encodes audio in the middle of its forward, so no prefill can be captured without "
            'audio frames: call hawk_compile.optimize(model, modalities=("audio",)), and look at its graph by HAWK_DUMP'
        )
    return modality


def pruned_graph(
    model: PreTrainedModel, config: HawkConfig, length: int, visual: int, modality: str
) -> fx.GraphModule:
    """One prompt's prefill behind the passes that prune."""
    prefill = captured(model, config, length, visual, modality)
    return run_passes(prefill.gm, prefill.example_inputs, options_of(config), PRUNING)
