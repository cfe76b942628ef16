"""How a model's prefill is brought into one graph with a symbolic prompt length and a symbolic number of visual tokens.

Three things keep a prefill from being one such graph, and each has a general remedy here:

- the vision encoder depends on image sizes: it runs before, and its features enter as `mm_encoder_outputs`, joined into
  one tensor, so that neither the number of images nor their sizes are part of the graph's structure. Encoded audio, for
  which models have no such argument, enters in place of the frames, and the model's `get_audio_features` hands it on;
- the model's own check of feature count against placeholder count formats the number of features into its message, and
  fixes that number in the graph: the check is made on the host, and inside the graph it is asked about empty tensors;
- Dynamo's defaults break at values read from tensors and give equal sizes one symbol: `settings` changes them while a
  prefill is compiled, and only then.
"""

import contextlib
import inspect
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from hawk_compile.errors import InputError
from hawk_compile.settings.config import MODALITIES

FEATURES = "pooler_output"
LAYER_FEATURES = "deepstack_features"
EXTRA_ROWS = 2
AUDIO = "audio"
AUDIO_INPUT = "input_features"
RAW_INPUTS = {
    "image": ("pixel_values", "pixel_values_images", "image_patches"),
    "video": ("pixel_values_videos",),
    AUDIO: (AUDIO_INPUT,),
}
"""The arguments under which Hugging Face models take each modality, as `generate` knows them."""

RECOMPILE_LIMIT = 64
"""Compilations that one model may need: one for each structure of its calls (a batch, padding, video, ...)."""

capture_lock = threading.RLock()
"""Held while a prefill runs: capturing changes Dynamo's settings, which all threads share."""

PER_TOKEN_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
"""Arguments of shape [..., B, S] (embeddings: [B, S, D])."""


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Dynamo's settings while a prefill is compiled. Not thread-safe: hold a lock."""
    with (
        torch._dynamo.config.patch(
            capture_scalar_outputs=True,
            capture_dynamic_output_shape_ops=True,
            specialize_float=True,
            recompile_limit=RECOMPILE_LIMIT,
            accumulated_recompile_limit=32 * RECOMPILE_LIMIT,
        ),
        fx_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    ):
        yield


def compile_alone(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """torch.compile with graphs that count towards no other model's limit. Its annotations do not know the argument."""
    return torch.compile(function, **{"dynamic": True, "isolate_recompiles": True, **settings})


def tokens_of(kwargs: dict[str, Any]) -> Tensor:
    """input_ids [B, S] or inputs_embeds [B, S, D], whichever was given."""
    found = [each for each in (kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if each is not None]
    if len(found) != 1:
        raise InputError(
            "a call takes either input_ids [B, S] or inputs_embeds [B, S, D], got "
            f"{'both' if found else 'neither'}: give one of them"
        )
    return found[0]


def raw_modalities(kwargs: dict[str, Any]) -> set[str]:
    """The modalities that a call holds and that are not encoded yet."""
    return {each for each in MODALITIES if any(kwargs.get(name) is not None for name in RAW_INPUTS[each])}


def modalities_of(kwargs: dict[str, Any]) -> set[str]:
    """The modalities that a call holds, encoded or not."""
    outputs = kwargs.get("mm_encoder_outputs") or {}
    return raw_modalities(kwargs) | {modality for modality, output in outputs.items() if output is not None}


def takes(model: PreTrainedModel, modality: str) -> bool:
    """Whether the model merges features of a modality into its prompt."""
    found = hasattr(model.base_model, f"get_{modality}_features")
    if modality != AUDIO:
        return found
    return getattr(model.config, "audio_token_id", None) is not None and (found or encodes_audio_itself(model))


def encodes_audio_itself(model: PreTrainedModel) -> bool:
    """Whether audio is encoded in the middle of the model's forward, so that its encoder stays in the graph."""
    tower = getattr(model.base_model, "audio_tower", None)
    return not hasattr(model.base_model, "get_audio_features") and hasattr(tower, "_get_feat_extract_output_lengths")


def encode(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Run the encoders: pixels and frames leave the arguments, `mm_encoder_outputs` enters them.

    Models whose positions depend on image sizes (mRoPE) get their position_ids here, while those sizes are at hand;
    all others count positions in their own forward, as they would without us.
    """
    kwargs = {**kwargs, "mm_encoder_outputs": dict(kwargs.get("mm_encoder_outputs") or {})}
    base: Any = model.base_model
    if kwargs.get("position_ids") is None and hasattr(base, "compute_3d_position_ids"):
        kwargs["position_ids"] = positions_of(base, kwargs)
    if AUDIO in raw_modalities(kwargs) and hasattr(base, "get_audio_features"):
        kwargs = encode_audio(base, kwargs)
    return model._prepare_multimodal_encoder_kwargs_for_generation(kwargs)  # type: ignore[operator]


def fresh(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for another call: a forward writes into the features that it is given."""
    outputs = kwargs.get("mm_encoder_outputs")
    if outputs is None:
        return kwargs
    return {**kwargs, "mm_encoder_outputs": {name: type(each)(**each) for name, each in outputs.items() if each}}


def encode_audio(base: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Run the audio encoder: what only it takes leaves the arguments, features [V, D] enter `mm_encoder_outputs`."""
    wanted = inspect.signature(type(base).get_audio_features).parameters
    given = {name: kwargs[name] for name in wanted if kwargs.get(name) is not None}
    output = base.get_audio_features(**given, return_dict=True)
    features = output.get(FEATURES)
    features = output.last_hidden_state if features is None else features
    encoded = BaseModelOutputWithPooling(pooler_output=[features.flatten(0, -2)])  # type: ignore[arg-type]
    left = {name: value for name, value in kwargs.items() if name not in given or name in PER_TOKEN_INPUTS}
    return {**left, "mm_encoder_outputs": {**kwargs["mm_encoder_outputs"], AUDIO: encoded}}


def install_recorders(module: nn.Module) -> None:
    """Put on the hooks that record hidden states: a model does so at its first such call, under a lock, which no graph
    can take."""
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            maybe_install_capturing_hooks(part)


def positions_of(base: Any, kwargs: dict[str, Any]) -> Tensor | None:
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = kwargs["input_ids"].new_empty((*kwargs["input_ids"].shape, 0))
    given = {"past_key_values": None, "attention_mask": None, **kwargs, "inputs_embeds": embeds}
    if given.get("feature_attention_mask") is not None:
        given["audio_feature_lengths"] = given["feature_attention_mask"].sum(1)
    wanted = inspect.signature(base.compute_3d_position_ids).parameters
    return base.compute_3d_position_ids(**{name: given.get(name) for name in wanted})


def join_features(outputs: dict[str, Any]) -> dict[str, ModelOutput]:
    """The features of each modality in a structure that does not depend on the number of images.

    A model that gets one tensor expects one ([1, V, D]); a model that gets a list joins it itself ([[V, D]]).
    """
    joined = {}
    for modality, output in outputs.items():
        if output is None:
            continue
        parts: dict[str, Any] = {FEATURES: join(output[FEATURES])}
        if output.get(LAYER_FEATURES) is not None:
            parts[LAYER_FEATURES] = [join(level) for level in output[LAYER_FEATURES]]
        joined[modality] = type(output)(**parts)
    return joined


def join(features: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor | list[Tensor]:
    rows = list(features)
    # Two rows more, cut off again inside the graph: Dynamo specialises a size of 1, and an image may be one token.
    joined = torch.cat([*rows, rows[0].new_zeros(EXTRA_ROWS, rows[0].shape[-1])])
    return joined.unsqueeze(0) if isinstance(features, Tensor) else [joined]


def image_sizes(outputs: dict[str, Any], frames: Tensor | None) -> dict[str, list[int]]:
    """modality -> tokens of each image in the order of the prompts; of a video, of each of its frames.

    Args:
        outputs: of the encoder, one entry of features for each image, tile or video.
        frames: [videos, 3] int64, frames first, where the model packs videos of several sizes; None elsewhere.
    """
    sizes = {name: [len(part) for part in output[FEATURES]] for name, output in outputs.items() if output is not None}
    if frames is not None and "video" in sizes:
        times = frames[:, 0].tolist()
        sizes["video"] = [size // time for size, time in zip(sizes["video"], times, strict=True) for _ in range(time)]
    return sizes


def cut_extra_rows(outputs: dict[str, ModelOutput]) -> dict[str, ModelOutput]:
    """The features as `join_features` was given them; traced into the graph.

    Features for later layers are as many as those for the merge; the capture is told so, so that both are V.
    """
    cut = {}
    for modality, output in outputs.items():
        parts: dict[str, Any] = {FEATURES: without_extra(output[FEATURES])}
        if output.get(LAYER_FEATURES) is not None:
            parts[LAYER_FEATURES] = [without_extra(level) for level in output[LAYER_FEATURES]]
            for level in parts[LAYER_FEATURES]:
                torch._check(level[0].shape[-2] == parts[FEATURES][0].shape[-2])
        cut[modality] = type(output)(**parts)
    return cut


def arguments_of(outputs: dict[str, ModelOutput]) -> dict[str, Any]:
    """The arguments under which a model's forward takes encoder outputs: audio in place of its frames, see above."""
    seen = {modality: output for modality, output in outputs.items() if modality != AUDIO}
    given: dict[str, Any] = {"mm_encoder_outputs": seen} if seen else {}
    if AUDIO in outputs:
        given[AUDIO_INPUT] = outputs[AUDIO][FEATURES][0]
    return given


def without_extra(features: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(features, Tensor):
        return features[:, :-EXTRA_ROWS]
    return [part[:-EXTRA_ROWS] for part in features]


def equate_lengths(inputs: dict[str, Any], votes: Tensor) -> None:
    """Tell the capture which inputs run along the prompt, so that their lengths are one symbol S, and their rows one B.

    Only such inputs have the names below; by them a mask is known to be as long as the prompt; no operator says so.
    """
    for name in PER_TOKEN_INPUTS:
        given = inputs.get(name)
        if isinstance(given, Tensor):
            rows, length = (given.shape[0], given.shape[1]) if name == "inputs_embeds" else given.shape[-2:]
            torch._check(length == votes.shape[1])
            if rows != 1:
                torch._check(rows == votes.shape[0])


def feature_count(model: PreTrainedModel, kwargs: dict[str, Any], outputs: dict[str, ModelOutput]) -> int:
    """The number of feature rows over all modalities: of `outputs`, each of joined structure, and of audio in `kwargs`.

    Raises:
        InputError: audio that is encoded in the graph, without the argument that says how long it is.
    """
    count = sum(part.shape[-2] - EXTRA_ROWS for output in outputs.values() for part in output[FEATURES])
    if kwargs.get(AUDIO_INPUT) is None:
        return count
    frames = kwargs.get("feature_attention_mask")
    if frames is None:
        raise InputError(
            "input_features were given without feature_attention_mask [audios, frames], which says how long each audio "
            "is: give what the model's processor returns"
        )
    tower: Any = model.base_model.audio_tower
    return count + int(tower._get_feat_extract_output_lengths(frames.sum(-1))[1].sum())


def placeholders(model: Any, modalities: Iterable[str] = MODALITIES) -> dict[str, int | None]:
    """modality -> the id that waits for its features."""
    return {modality: getattr(model.config, f"{modality}_token_id", None) for modality in modalities}


def placeholder_ids(model: Any, modalities: Iterable[str] = MODALITIES) -> list[int]:
    """The ids that wait for features of these modalities."""
    return sorted({each for each in placeholders(model, modalities).values() if each is not None})


def known_ids(model: Any, inputs_embeds: Tensor, wanted: Iterable[int]) -> Tensor:
    """[B, S] int64: those of the wanted ids whose embeddings stand in a prompt of embeddings, -1 elsewhere."""
    embed = model.get_input_embeddings()
    ids = torch.full(inputs_embeds.shape[:2], -1, dtype=torch.int64, device=inputs_embeds.device)
    for each in wanted:
        row = embed(torch.tensor([each], device=inputs_embeds.device)).to(inputs_embeds.dtype)
        ids = ids.masked_fill((inputs_embeds == row).all(-1), each)
    return ids


def get_placeholder_mask(
    self: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor, *args: Any, **features: Any
) -> Any:
    """Stands in for the method of this name while a graph is captured: the same masks, a check that always holds."""
    original: Any = type(self).get_placeholder_mask  # type: ignore[attr-defined]
    if not torch.compiler.is_compiling():
        return original(self, input_ids, inputs_embeds, *args, **features)
    waiting = placeholder_ids(self)
    if input_ids is None:
        input_ids = known_ids(self, inputs_embeds, waiting)
    if waiting and waiting == placeholder_ids(self, [AUDIO]):
        # Models that only hear return one mask, expanded to the embeddings, which a check of no features would lose.
        return (input_ids == waiting[0]).unsqueeze(-1)
    nothing = inputs_embeds.new_empty(0, 1)
    args = tuple(None if each is None else nothing for each in args)
    features = {name: None if each is None else nothing for name, each in features.items()}
    return original(self, input_ids, inputs_embeds[..., :0], *args, **features)


def get_audio_features(self: nn.Module, input_features: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the method of this name while a graph is captured: there the input is encoded already, [V, D]."""
    original: Any = type(self).get_audio_features  # type: ignore[attr-defined]
    if not torch.compiler.is_compiling():
        return original(self, input_features, *args, **kwargs)
    return BaseModelOutputWithPooling(pooler_output=input_features, last_hidden_state=input_features)


def body_overrides(model: PreTrainedModel) -> dict[str, types.MethodType]:
    """The methods to put on the model's body, of those that it has."""
    base = model.base_model
    return {
        method.__name__: types.MethodType(method, base)
        for method in (get_placeholder_mask, get_audio_features)
        if hasattr(type(base), method.__name__)
    }
