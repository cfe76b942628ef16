"""What a pruned model must equal: the plain model, run on its own merged embeddings gathered at the kept positions.

Nothing here knows a model: hooks see what its decoder is given, and put gathered tensors in their place.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from hawk_compile.capture.modalities import required_arguments

Change = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Seen:
    """What the decoder of a plain model was given for one call.

    Attributes:
        decoder: the module that takes merged embeddings.
        arguments: its arguments by name, embeddings [B, S, D] among them.
    """

    decoder: nn.Module
    arguments: dict[str, Any]


@contextlib.contextmanager
def changed(module: nn.Module, change: Change) -> Iterator[None]:
    """Let `change` see, and alter, what a module's forward is given, by name."""
    names = list(inspect.signature(module.forward).parameters)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), change({**dict(zip(names, args, strict=False)), **kwargs})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def seen_by_decoder(model: PreTrainedModel, inputs: dict[str, Any]) -> Seen | None:
    """What the decoder is given in a call of the plain model with ids; None where the model merges and decodes in one
    module."""
    seen: list[Seen] = []
    handles = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module is not model:
            def look(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                embeds = kwargs.get("inputs_embeds")
                if not seen and isinstance(embeds, Tensor) and embeds.shape[:2] == inputs["input_ids"].shape:
                    seen.append(Seen(part, dict(kwargs)))

            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0] if seen else None


def positions_seen(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor | None:
    """The positions that the decoder of a plain model is given for a prompt; None where it counts them itself."""
    seen = seen_by_decoder(model, inputs)
    return None if seen is None else seen.arguments.get("position_ids")


def gathered(value: Any, length: int, keep: Tensor, visual: Tensor) -> Any:
    """A value of a one-row prompt with every dimension of S positions cut to the kept ones, and one of V to the kept
    visual tokens. What has a row for each position, [1, S, ...], or for each visual token, [V, D], may be S wide by
    chance."""
    if isinstance(value, dict):
        return {name: gathered(part, length, keep, visual) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(part, length, keep, visual) for part in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 2 and value.shape[0] == int(visual.sum()) and value.is_floating_point():
        ranks = visual.long().cumsum(0) - 1  # features that later layers add
        return value[ranks[keep[visual[keep]]]]
    rows_only = value.ndim >= 3 and value.is_floating_point() and value.shape[1] == length
    for dim, size in enumerate(value.shape):
        if size == length and (dim == 1 or not rows_only):
            value = value.index_select(dim, keep)
    return value


def pruned_forward(
    model: PreTrainedModel, inputs: dict[str, Any], keep: Tensor, visual: Tensor, layer: int = 0
) -> tuple[Any, Cache]:
    """(output, filled cache) of the plain model on the kept positions of a one-row prompt.

    Args:
        inputs: with ids and pixels.
        keep: [S'] positions, ascending.
        visual: [S] bool.
        layer: the decoder layer in front of which tokens are removed; those before it run on all.
    """
    length = inputs["input_ids"].shape[1]
    seen = None if layer else seen_by_decoder(model, inputs)
    if seen is None or needs_ids(model, seen, inputs["input_ids"]):
        return pruned_at_layer(model, inputs, keep, visual, layer)
    positions = seen.arguments.get("position_ids")
    if positions is None:
        positions = torch.arange(length)[None]
    per_token = {
        name: value for name, value in inputs.items()
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == length
        and name not in ("input_ids", "attention_mask")
    }  # fmt: skip
    given = {"inputs_embeds": seen.arguments["inputs_embeds"], **per_token, **beside_embeddings(model, seen, length)}

    def change(kwargs: dict[str, Any]) -> dict[str, Any]:
        missing = {
            name: gathered(value, length, keep, visual) for name, value in seen.arguments.items()
            if kwargs.get(name) is None and name not in ("input_ids", "attention_mask", "past_key_values")
        }  # fmt: skip
        return {**kwargs, **missing, "position_ids": positions[..., keep]}

    # Without a cache, positions with gaps are taken for those of several texts in one row.
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad(), changed(seen.decoder, change), counting_slots(model):
        output = from_tokens(model)(
            **gathered(given, length, keep, visual), past_key_values=cache, use_cache=True)
    return output, cache


@contextlib.contextmanager
def counting_slots(model: PreTrainedModel) -> Iterator[None]:
    """Let attentions count the slots of keys themselves, where they would take positions for slots: among kept tokens
    the two differ."""

    def change(kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in kwargs.items() if name != "position_ids"}

    with contextlib.ExitStack() as stack:
        for part in layers_of(model):
            if any(takes_positions_for_slots(module) for module in part.modules()):
                stack.enter_context(changed(part, change))
        yield


def takes_positions_for_slots(module: nn.Module) -> bool:
    """Whether a module is told how to rotate, and of positions beside that, but of no mask."""
    taken = inspect.signature(module.forward).parameters.keys()
    return {"position_embeddings", "position_ids", "past_key_values"} <= taken and "attention_mask" not in taken


def from_tokens(model: PreTrainedModel) -> PreTrainedModel:
    """What runs on ids or embeddings alone: where the model's forward requires pixels, its language model."""
    if not required_arguments(model):
        return model
    return next(part for part in model.children() if isinstance(part, PreTrainedModel) and part.can_generate())


def needs_ids(model: PreTrainedModel, seen: Seen, input_ids: Tensor) -> bool:
    """Whether the decoder is given the ids beside their embeddings, by a name that the model does not take itself."""
    taken = {*inspect.signature(model.forward).parameters, "attention_mask", "position_ids"}
    return any(
        isinstance(value, Tensor) and not value.is_floating_point() and torch.equal(value, input_ids)
        for name, value in seen.arguments.items() if name not in taken
    )


def beside_embeddings(model: PreTrainedModel, seen: Seen, length: int) -> dict[str, Tensor]:
    """What the model worked out of the ids for its decoder, [B, S, ...], and takes beside them by that name."""
    taken = set(inspect.signature(model.forward).parameters) - {"inputs_embeds", "attention_mask", "position_ids"}
    return {
        name: value for name, value in seen.arguments.items()
        if name in taken and isinstance(value, Tensor) and value.ndim > 2 and value.shape[1] == length
    }  # fmt: skip


def pruned_at_layer(
    model: PreTrainedModel, inputs: dict[str, Any], keep: Tensor, visual: Tensor, layer: int
) -> tuple[Any, Cache]:
    """As `pruned_forward`, with the residual stream gathered in front of a later layer, and masks as for the kept."""
    length, layers = inputs["input_ids"].shape[1], layers_of(model)
    masks = masks_of_kept(model, inputs, keep, visual, layers)
    with contextlib.ExitStack() as stack:
        for number, part in enumerate(layers):
            def change(kwargs: dict[str, Any], number: int = number) -> dict[str, Any]:
                mask = {} if masks is None else {"attention_mask": masks[number]}
                return gathered(kwargs, length, keep, visual) | mask

            if number >= layer:
                stack.enter_context(changed(part, change))
        stack.enter_context(torch.no_grad())
        output = model(**inputs, use_cache=True)
    keep_positions(output.past_key_values, length, keep)
    return output, output.past_key_values


def keep_positions(cache: Cache, length: int, keep: Tensor) -> None:
    """Cut what layers of a cache know of positions, [..., S] integers, to the kept ones."""
    for layer in cache.layers:
        for name, value in list(vars(layer).items()):
            if isinstance(value, Tensor) and value.dtype == torch.int64 and value.shape[-1:] == (length,):
                setattr(layer, name, value[..., keep])


def masks_of_kept(
    model: PreTrainedModel, inputs: dict[str, Any], keep: Tensor, visual: Tensor, layers: nn.ModuleList
) -> list[Any] | None:
    """The attention mask that each layer is given for a prompt of the kept positions alone, where windows count these;
    None where the model merges and decodes in one module without windows."""
    masks: list[Any] = [None] * len(layers)
    seen, length = seen_by_decoder(model, inputs), inputs["input_ids"].shape[1]
    if seen is None:
        if getattr(model.config.get_text_config(), "sliding_window", None) is None:
            return None
        embeds = model.get_input_embeddings()(inputs["input_ids"])  # type: ignore[operator]
        seen = Seen(model, {"inputs_embeds": embeds})  # text alone: no picture makes a mask there
    positions = seen.arguments.get("position_ids")
    positions = torch.arange(length)[None] if positions is None else positions
    cache = DynamicCache(config=model.config.get_text_config())
    kept = gathered(seen.arguments, length, keep, visual) | {
        "position_ids": positions[..., keep], "past_key_values": cache, "use_cache": True}
    with contextlib.ExitStack() as stack:
        for number, part in enumerate(layers):
            def look(kwargs: dict[str, Any], number: int = number) -> dict[str, Any]:
                masks[number] = kwargs.get("attention_mask")
                return kwargs

            stack.enter_context(changed(part, look))
        stack.enter_context(torch.no_grad())
        seen.decoder(**kept)
    return masks


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers."""
    return next(part for part in decoder_of(model).modules() if isinstance(part, nn.ModuleList))


def decode(
    model: PreTrainedModel, inputs: dict[str, Any], cache: Cache, tokens: list[int], kept: int
) -> list[Tensor]:
    """Logits [vocabulary] of steps behind a pruned prompt, at the positions that the whole prompt gives them.

    Args:
        inputs: of the whole prompt, one row.
        cache: of `pruned_forward`.
        tokens: one for each step.
        kept: S'.
    """
    places = positions_of_steps(model, inputs, tokens)
    return [
        behind(model, cache, [token], place, kept + number)
        for number, (token, place) in enumerate(zip(tokens, places, strict=True), start=1)
    ]


def turn(model: PreTrainedModel, inputs: dict[str, Any], cache: Cache, tokens: list[int], kept: int) -> Tensor:
    """Logits [vocabulary] behind a turn of text on a pruned prompt; arguments as for `decode`."""
    places = torch.cat(positions_of_steps(model, inputs, tokens), -1)
    return behind(model, cache, tokens, places, kept + len(tokens))


def behind(model: PreTrainedModel, cache: Cache, tokens: list[int], places: Tensor, slots: int) -> Tensor:
    """Logits [vocabulary] of the last of some tokens at these places, which fill a cache up to so many slots."""

    def change(kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, "position_ids": places}

    with torch.no_grad(), changed(decoder_of(model), change), counting_slots(model):
        output = from_tokens(model)(
            input_ids=torch.tensor([tokens]), past_key_values=cache, attention_mask=torch.ones(1, slots).long(),
            use_cache=True,
        )  # fmt: skip
    return output.logits[0, -1]  # type: ignore[no-any-return]


def decoder_of(model: PreTrainedModel) -> nn.Module:
    return model.base_model.get_decoder()  # type: ignore[operator, no-any-return]


def positions_of_steps(model: PreTrainedModel, inputs: dict[str, Any], tokens: list[int]) -> list[Tensor]:
    """The positions that the plain model gives to tokens behind its whole prompt: [..., 1, 1] each."""
    seen: list[Tensor] = []
    length = inputs["input_ids"].shape[1]

    def look(kwargs: dict[str, Any]) -> dict[str, Any]:
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        assert tokens is not None
        if tokens.shape[1] == 1:
            positions = kwargs.get("position_ids")
            seen.append(torch.tensor([[length + len(seen)]]) if positions is None else positions.clone())
        return kwargs

    with torch.no_grad(), changed(decoder_of(model), look):
        model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=len(tokens) + 1, do_sample=False, use_cache=True, logits_processor=[forced(tokens)]
        )  # fmt: skip
    return seen[: len(tokens)]


def forced(tokens: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor of generate that lets it choose these tokens, and then what it likes."""
    remaining = iter(tokens)

    def force(_: Tensor, scores: Tensor) -> Tensor:
        token = next(remaining, None)
        return scores if token is None else torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0)

    return force
