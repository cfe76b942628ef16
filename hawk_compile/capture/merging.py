"""Models that encode and merge in the middle of their own forward, and take nothing that is encoded already.

Whatever operators they merge by, what it does is seen by what reaches the first decoder layer: embeddings of the ids,
with features in the places of placeholders. The model's own code is run up to there, before the prefill's graph; the
rows at placeholders are the features. In the graph they are merged into the embeddings of the ids as other models do.

That is the same if embeddings reach the first layer as they are, which every prompt is tried for: all other rows must
be those of the ids. And if ids and pixels enter in no other way, for which the first prompt is run whole both ways.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from hawk_compile.capture.features import FEATURES
from hawk_compile.capture.modalities import (
    AUDIO,
    AUDIO_INPUT,
    PER_TOKEN_INPUTS,
    along_prompt,
    merges_itself,
    placeholders_by_modality,
    raw_inputs,
    raw_modalities,
)
from hawk_compile.capture.twin import with_children
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.settings.config import MODALITIES

OF_CACHES = ("past_key_values", "use_cache")


checked: "weakref.WeakKeyDictionary[PreTrainedModel, set[str]]" = weakref.WeakKeyDictionary()
"""Models, and the modalities of which a prompt was held to the plain model."""


class LayerReached(Exception):
    """Ends a forward where its first decoder layer is called.

    Attributes:
        hidden: what the layer is given, [B, S, D].
    """

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


def encode_in_forward(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with what the model's own forward encodes and merges in `mm_encoder_outputs`; what only that reads
    is left out.

    Raises:
        UnsupportedModelError: the model changes embeddings between its merge and its first layer, or merges nothing.
    """
    ids, numbers = kwargs["input_ids"], placeholders_by_modality(model)
    merged, embeds = in_front_of_layers(model, kwargs), model.get_input_embeddings()(ids)  # type: ignore[operator]
    places = {
        modality: ids == numbers[modality] for modality in MODALITIES if numbers[modality] is not None
    }
    text = ~functools.reduce(torch.logical_or, places.values())
    if merged.shape != embeds.shape or not torch.equal(merged[text], embeds[text]):
        raise UnsupportedModelError(
            f"{type(model).__name__} encodes and merges in its own forward, and changes all embeddings (positions, a "
            "scale, a norm) before its first layer reads them, so that its features cannot be told from what is done "
            "to them: call hawk_compile.restore(model) to run it whole"
        )
    if torch.equal(merged, embeds):
        raise UnsupportedModelError(
            f"{type(model).__name__} encodes what it is given in its own forward, and nothing of that stands in the "
            "places of its placeholders where its first layer reads them, so there is nothing to prune: call "
            "hawk_compile.restore(model) to run it whole"
        )
    seen = raw_modalities(model, kwargs)
    outputs = {
        modality: BaseModelOutputWithPooling(pooler_output=merged[places[modality]].unsqueeze(0))
        for modality in sorted(seen) if places[modality].any()
    }
    along = along_prompt(kwargs, *ids.shape)
    left = {
        name: value for name, value in kwargs.items()
        if name in (*PER_TOKEN_INPUTS, *OF_CACHES, *along)
        or not (isinstance(value, Tensor) or any(modality in name for modality in MODALITIES))
    }  # fmt: skip
    left = {**left, "mm_encoder_outputs": outputs}
    if not seen <= checked.setdefault(model, set()):
        check_merge(model, kwargs, left)
        checked[model] |= seen
    return left


@torch.no_grad()
def check_merge(model: PreTrainedModel, kwargs: dict[str, Any], left: dict[str, Any]) -> None:
    """Run a model's first prompt of a modality twice, whole: as it encodes and merges, and as the graph will have it.

    Raises:
        UnsupportedModelError: it makes more of ids or pixels than embeddings: a mask, positions, features added later.
    """
    forward = functools.partial(type(model).forward, model)
    alone = {"past_key_values": None, "use_cache": False}
    prompts = [without_mask_of_cache({**given, **alone}) for given in (kwargs, left)]
    expected = forward(**prompts[0]).logits
    found = taking_features(model, forward)(**prompts[1]).logits
    if expected.shape != found.shape or not torch.allclose(
        expected, found, rtol=0, atol=1e-3 * float(expected.nan_to_num(0, 0, 0).abs().amax()), equal_nan=True
    ):
        raise UnsupportedModelError(
            f"{type(model).__name__} encodes and merges in its own forward, and makes more of ids and pixels than the "
            "embeddings that its first layer reads (a mask, positions, features that are added later): its logits are "
            "others without. Call hawk_compile.restore(model) to run it whole"
        )


def without_mask_of_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a mask that covers the prompt alone, and not what a cache holds too."""
    mask = kwargs.get("attention_mask")
    return kwargs if mask is None else {**kwargs, "attention_mask": mask[:, -kwargs["input_ids"].shape[1] :]}


def in_front_of_layers(model: PreTrainedModel, kwargs: dict[str, Any]) -> Tensor:
    """[B, S, D]: what the first decoder layer reads in a call of the plain model. It runs on a twin, so that nobody
    else's call ends there."""
    body: Any = model.base_model
    path, layers = layers_of(model)
    first: Any = with_children(layers[0], {})
    first.__dict__["forward"] = reach
    twin = with_part(body, path, nn.ModuleList([first, *layers[1:]]))
    given = {name: kwargs[name] for name in inspect.signature(type(body).forward).parameters if name in kwargs}
    run = twin if body is not model else functools.partial(type(body).forward, twin)
    try:
        run(**without_mask_of_cache({**given, "past_key_values": None, "use_cache": False}))
    except LayerReached as reached:
        return reached.hidden
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} encodes and merges in its own forward, which was run by itself up to its decoder "
            f"layers, without a cache, and raised {type(error).__name__}: {error}. If the plain model takes this call, "
            "it cannot be pruned: call hawk_compile.restore(model) to run it whole"
        ) from error
    raise UnsupportedModelError(
        f"{type(model).__name__} encodes and merges in its own forward, which does not go on to its decoder layers "
        f"({'.'.join(path)}), so that it cannot be seen what it merges: call hawk_compile.restore(model)"
    )


def reach(*args: Any, **kwargs: Any) -> None:
    """Stands for a decoder layer's forward: the first [B, S, D] value that it is given are the embeddings."""
    raise LayerReached(next(
        value for value in (*args, *kwargs.values())
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()
    ))  # fmt: skip


def layers_of(model: PreTrainedModel) -> tuple[list[str], nn.ModuleList]:
    """The decoder's layers, and the names that lead to them from the model's body.

    Raises:
        UnsupportedModelError: there is no list of as many layers as the configuration says.
    """
    count = model.config.get_text_config().num_hidden_layers
    decoder: Any = model.base_model.get_decoder()  # type: ignore[operator]
    layers = next((each for each in decoder.modules() if isinstance(each, nn.ModuleList) and len(each) == count), None)
    path = next((name for name, part in model.base_model.named_modules() if part is layers), None)
    if layers is None or path is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} encodes and merges in its own forward, and {type(decoder).__name__} holds no "
            f"ModuleList of {count} decoder layers before which that could be seen: call hawk_compile.restore(model)"
        )
    return path.split("."), layers


def with_part(module: nn.Module, path: list[str], part: nn.Module) -> Any:
    """A module with another part at a path, and shells of all that hold it."""
    name, *rest = path
    return with_children(module, {name: with_part(getattr(module, name), rest, part) if rest else part})


def taking_features(model: PreTrainedModel, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a model as other models have it: with `mm_encoder_outputs`, and audio's features in place of its
    frames. That of a model that takes them is returned as it is."""
    if not merges_itself(model):
        return forward
    numbers = tuple(placeholders_by_modality(model).items())
    return functools.partial(merge_and_run, forward, model.get_input_embeddings(), numbers)


def merge_and_run(
    forward: Callable[..., Any], embed: Callable[[Tensor], Tensor], numbers: tuple[tuple[str, int | None], ...],
    input_ids: Tensor, mm_encoder_outputs: dict[str, ModelOutput] | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """One call of a forward with the embeddings of ids [B, S], features [V, D] in the places of placeholders.

    Args:
        numbers: (modality, id that waits for it).
    """
    features = {name: output[FEATURES][0] for name, output in (mm_encoder_outputs or {}).items()}
    if kwargs.get(AUDIO_INPUT) is not None:
        features[AUDIO] = kwargs.pop(AUDIO_INPUT)
    embeds = embed(input_ids)
    for modality, number in numbers:
        if modality in features:
            places: Any = input_ids == number
            embeds = embeds.masked_scatter(places.unsqueeze(-1), features[modality])
    return forward(inputs_embeds=embeds, **kwargs)


def without_unawaited(model: PreTrainedModel, kwargs: dict[str, Any], chosen: bool = False) -> dict[str, Any]:
    """The arguments without pixels and frames that no id of the call waits for: a forward that merges itself passes
    them over, and generate hands them to every step.

    Args:
        chosen: whether the ids are those that the model has chosen itself, for which no features come: they are not
            looked at, since reading them would wait for the device at every step.
    """
    ids = kwargs.get("input_ids")
    if ids is None or not (raw := raw_modalities(model, kwargs)):
        return kwargs
    if not chosen:
        numbers = [placeholders_by_modality(model)[modality] for modality in raw]
        if torch.isin(ids, torch.tensor([each for each in numbers if each is not None], device=ids.device)).any():
            return kwargs
    idle = {name for modality in raw for name in raw_inputs(model)[modality]}
    return {name: value for name, value in kwargs.items() if name not in idle}
