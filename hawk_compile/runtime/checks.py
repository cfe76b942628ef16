"""What cannot be pruned is refused at `optimize`, before anything is changed."""

from typing import Any

from transformers import PreTrainedModel

from hawk_compile.capture.modalities import takes
from hawk_compile.compat.models import supports_encoded_images
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.runtime.parts import class_of, goes_around_forward, text_part
from hawk_compile.settings.config import MODALITIES, HawkConfig
from hawk_compile.versions import check_model_release, installed, warn_unsupported


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
            f"{name} is an encoder-decoder, whose decoder reads images through cross-attention: only decoders that "
            "hold visual tokens in their prompt can be pruned"
        )
    check_modalities(model, modalities)
    check_model_release(model)
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{name} cannot generate, so it has no prompt to prune: give the whole model, with its language model head"
        )
    sees = takes(model, "image") or takes(model, "video")
    if sees and not supports_encoded_images(model):
        raise UnsupportedModelError(
            f"{name} does not accept encoded images (mm_encoder_outputs), so its merge cannot be captured apart from "
            "its vision encoder; a later transformers may have this model in such a form "
            f"(here is {installed('transformers')})"
        )
    if goes_around_forward(class_of(model)) and text_part(model) is None:
        raise UnsupportedModelError(
            f"{name}.generate does not run the model's forward, nor lets a part of it generate, so nothing would be "
            "pruned there: give a model whose generate is that of transformers"
        )


def check_modalities(model: PreTrainedModel, asked: tuple[str, ...]) -> None:
    name, taken = type(model).__name__, tuple(each for each in MODALITIES if takes(model, each))
    if set(taken) & set(asked):
        return
    if taken:
        raise UnsupportedModelError(
            f"modalities={asked} asks for tokens that {name} does not have: it takes {' and '.join(taken)}, so give "
            f"modalities={taken}"
        )
    parts = [part for part, module in model.named_children() if isinstance(module, PreTrainedModel)
             and any(takes(module, each) for each in MODALITIES)]
    remedy = (
        f"its part model.{parts[0]} has: give that"
        if parts
        else "give a model that takes images, such as AutoModelForImageTextToText.from_pretrained returns"
    )
    raise UnsupportedModelError(
        f"{name} takes no images, videos or audio, so it has no visual tokens to prune; {remedy}"
    )
