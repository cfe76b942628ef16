"""What cannot be pruned is refused at `optimize`, before anything is changed."""

import inspect
import re
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from hawk_compile.capture.modalities import encoder_of, merges_itself, placeholders_by_modality, takes
from hawk_compile.capture.signatures import ENCODED, leaves_encoded_out, takes_encoded
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.runtime.parts import class_of, goes_around_forward, text_part
from hawk_compile.settings.config import MODALITIES, HawkConfig
from hawk_compile.versions import check_model_release, installed, warn_unsupported

CROSS = re.compile("cross_?att")
"""In the name of a module that attends to what does not stand in the prompt, or of its class."""
PLACEHOLDER = re.compile("(image|video|vision|media).*token_(id|index)$")
OTHER_MODEL = (
    "give a model that holds visual tokens in its prompt; docs/models.md lists them, and `hawk-compile inspect TYPE` "
    "tells"
)


def check_model(model: Any, modalities: tuple[str, ...] = HawkConfig.modalities) -> None:
    """Refuse, before anything is changed, what cannot be pruned; warn of releases that nobody has tried."""
    warn_unsupported()
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model must be a transformers.PreTrainedModel, got {name}: give the model that "
            "AutoModelForImageTextToText.from_pretrained returns; of a wrapper, the model inside it"
        )
    if model.config.is_encoder_decoder or model.config.get_text_config().is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder, whose decoder reads what its encoder made of images through "
            f"cross-attention: only decoders that hold visual tokens in their own prompt can be pruned; {OTHER_MODEL}"
        )
    check_modalities(model, modalities)
    check_model_release(model)
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{name} cannot generate, so it has no prompt to prune: give the whole model, with its language model head"
        )
    sees = takes(model, "image") or takes(model, "video")
    if sees and leaves_encoded_out(model) and not merges_itself(model):
        raise UnsupportedModelError(
            f"the forward of {name} does not take encoded images ({ENCODED}), though the one that it is put above "
            f"does, so its merge cannot be captured apart from its vision encoder: name {ENCODED} in its signature and "
            "hand it on, let it take **kwargs and hand these on, or wrap it by functools.wraps"
        )
    if sees and not takes_encoded(model) and not merges_itself(model):
        raise UnsupportedModelError(
            f"{name} does not accept encoded images (mm_encoder_outputs), so its merge cannot be captured apart from "
            f"its vision encoder: try a later transformers than {installed('transformers')}, which may have this model "
            "in such a form"
        )
    if goes_around_forward(class_of(model)) and text_part(model) is None:
        raise UnsupportedModelError(
            f"{name}.generate is not seen to run the model's forward, nor to let a part of it generate, so nothing "
            "would be pruned there: give a model whose generate is that of transformers"
        )


def check_vision(model: PreTrainedModel, config: HawkConfig) -> None:
    """Refuse to compile an encoder that is not to be had apart from the forward, or to keep what it makes.

    Raises:
        UnsupportedModelError: as said.
    """
    if config.image_cache is not None and merges_itself(model):
        raise UnsupportedModelError(
            f"image_cache: {type(model).__name__} encodes images in the middle of its forward, so that what it makes "
            "of them is not to be had apart: leave image_cache out"
        )
    if config.compile_vision and merges_itself(model):
        raise UnsupportedModelError(
            f"compile_vision: {type(model).__name__} encodes images in the middle of its forward, so that its encoder "
            "cannot be compiled apart: leave compile_vision out"
        )


def check_modalities(model: PreTrainedModel, asked: tuple[str, ...]) -> None:
    name, taken = type(model).__name__, tuple(each for each in MODALITIES if takes(model, each))
    if merges_itself(model) and cross_attention_of(model):
        raise UnsupportedModelError(f"{name} {why_nothing_merges(model)}; {OTHER_MODEL}")
    if set(taken) & set(asked):
        return
    if taken:
        raise UnsupportedModelError(
            f"modalities={asked} asks for tokens that {name} does not have: it takes {' and '.join(taken)}, so give "
            f"modalities={taken}"
        )
    refuse_unplaced(model)
    parts = [part for part, module in model.named_children() if isinstance(module, PreTrainedModel)
             and any(takes(module, each) for each in MODALITIES)]
    if parts:
        raise UnsupportedModelError(
            f"{name} takes no images, videos or audio, so it has no visual tokens to prune; its part model.{parts[0]} "
            "has: give that"
        )
    raise UnsupportedModelError(f"{name} {why_nothing_merges(model)}; {OTHER_MODEL}")


def why_nothing_merges(model: PreTrainedModel) -> str:
    """What stands against pruning a model that merges no features into its prompt in a way that can be captured."""
    sees = " and ".join(f"{each}s" if each != "audio" else each for each in modalities_named_by(model))
    takes_them = f"takes {sees}" if sees else "takes no images, videos or audio"
    across = cross_attention_of(model)
    if across:
        read = f", which its decoder reads through cross-attention ({across})" if sees else (
            f", and reads what it takes beside text through cross-attention ({across})")  # fmt: skip
        return f"{takes_them}{read}: none of it is a token of the prompt, so there is nothing in there to prune"
    if not sees:
        return f"{takes_them}, so it has no visual tokens to prune"
    parameters = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in parameters:
        return (
            f"{takes_them}, which it reads with the prompt in an encoder, and decodes apart from them: only decoders "
            "that hold visual tokens in their own prompt can be pruned"
        )
    if not model.can_generate():
        return f"{takes_them}, but cannot generate text, so it has no prompt that asks about them"
    reason = f"{takes_them}, but its forward does not take them encoded (mm_encoder_outputs)"
    if not has_placeholders(model.config):
        reason += (
            ", and no id in its prompt says where visual tokens stand: the model puts them in front of the text, or "
            "where a mask beside the prompt says"
        )
    return f"{reason}, so its merge cannot be captured apart from its vision encoder"


def modalities_named_by(model: PreTrainedModel) -> list[str]:
    """What the model's class says that it takes, beside text."""
    named: Any = getattr(model, "input_modalities", None) or ()
    return [each for each in MODALITIES if each in ((named,) if isinstance(named, str) else named)]


def cross_attention_of(model: PreTrainedModel) -> str | None:
    """The path of a module of the decoder that attends to what is not in the prompt; None if there is none."""
    try:
        decoder: Any = model.base_model.get_decoder()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    for path, module in decoder.named_modules():
        if any(CROSS.search(name.lower()) for name in (path.rpartition(".")[2], type(module).__name__)):
            return next((whole for whole, part in model.named_modules() if part is module), path)
    return None


def has_placeholders(config: PretrainedConfig) -> bool:
    """Whether a configuration, or one in it, names an id that stands for visual tokens."""
    held = vars(config)
    inner = [value for value in held.values() if isinstance(value, PretrainedConfig)]
    named = any(PLACEHOLDER.search(name) and value is not None for name, value in held.items())
    return named or any(map(has_placeholders, inner))


def refuse_unplaced(model: PreTrainedModel) -> None:
    """Refuse a model that encodes something for which no id of its prompt waits.

    Raises:
        UnsupportedModelError: as said.
    """
    ids = placeholders_by_modality(model)
    for modality in MODALITIES:
        if ids[modality] is None and encoder_of(model, modality) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no id that waits for {modality} in its prompt ({modality}_token_id): what "
                "it encodes is added to tokens of text, or stands where no id says, so that none of its tokens can be "
                f"removed; give a model whose config names {modality}_token_id"
            )
