"""Processors of vLLM's classes with `hawk`: what is refused when an engine starts, and items that are numbered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hawk_compile.errors import InputError, UnsupportedModelError
from tests.serving.other_checkpoints import omni, paligemma, qwen2_audio

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]


@pytest.fixture(autouse=True, scope="module")
def plugin_is_found() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def processor(folder: Path, **most: int) -> Any:
    """A checkpoint's, as an engine makes it."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    given: Any = {"hf_overrides": {"hawk": {"ratio": 0.8}}, "limit_mm_per_prompt": most, "max_model_len": 1024}
    return MULTIMODAL_REGISTRY.create_processor(ModelConfig(model=str(folder), dtype="float32", **given))


@pytest.mark.parametrize(("make", "modality", "message"), [
    (paligemma, "image", "does not say which ids stand for items of modality image in a prompt"),
    (qwen2_audio, "audio", r"takes audio, and modalities=\['image', 'video'\] are pruned"),
])  # fmt: skip
def test_processors(make: Callable[[Path], Path], modality: str, message: str, tmp_path: Path) -> None:
    """One that puts images where no text says so; one of sounds."""
    with pytest.raises(UnsupportedModelError, match=message):
        processor(make(tmp_path / "refused"), **{modality: 1}).get_dummy_mm_inputs({modality: 1})


def test_a_model_that_talks_has_the_settings_of_the_whole(tmp_path: Path) -> None:
    """Its processor knows the part that reads, whose configuration has none of them."""
    made = processor(omni(tmp_path / "omni", "2_5"), image=1)
    assert made.checkpoint.config.ratio == 0.8 and not hasattr(made.info.get_hf_config(), "hawk")
    config = made.info.get_hf_config()
    assert made.checkpoint.places == {config.image_token_index, config.video_token_index}
    assert made.checkpoint.sounds == {config.audio_token_index}
    ((place,),) = made.get_dummy_mm_inputs({"image": 1})["mm_placeholders"].values()
    assert place.get_num_embeds() > 0


def numbered() -> Any:
    """A processor that pruned nothing yet, of a checkpoint that numbers its images: <1>, <2> are 101, 102 there."""
    from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

    from hawk_compile.serving.vllm.processor import PrunedProcessor

    class Numbered:
        def _get_prompt_updates(self, *given: Any) -> list[Any]:
            return [PromptReplacement("image", lambda index: [101 + index], lambda index: [])]

        def _recompute_cached_prompt_update(self, cached: Any, index: int) -> Any:
            full = [101 + index, *cached.content.full[1:]]
            return dataclasses.replace(cached, content=PromptUpdateDetails.select_token_id(full, 6))

    made: Any = object.__new__(type("Pruned", (PrunedProcessor, Numbered), {}))
    return made


def test_images_that_are_numbered_have_places_of_their_own() -> None:
    inputs = SimpleNamespace(mm_data_items={}, prompt=[1, 102, 7, 101, 8])
    assert numbered().spans(inputs, {}, {"image": 2}) == {"image": [(3, 4), (1, 2)]}
    with pytest.raises(InputError, match="2 placeholders for 3 items"):
        numbered().spans(inputs, {}, {"image": 3})


def test_a_cached_item_that_gets_another_number_is_counted_as_before() -> None:
    from vllm.multimodal.processing.processor import ResolvedPromptUpdate, UpdateMode

    from hawk_compile.serving.vllm.processor import Shortened

    content = Shortened([101, 6, 6], came=10, kept=2)
    cached = ResolvedPromptUpdate("image", 0, UpdateMode.REPLACE, [101], content)
    again = numbered()._recompute_cached_prompt_update(cached, 3).content
    assert again.full == [104, 6, 6] and (again.came, again.kept) == (10, 2)
    assert again.is_embed(again.full).tolist() == [False, True, True]
