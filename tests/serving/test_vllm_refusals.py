"""What is refused with vLLM's own names at hand, but before there is an engine. Needs vLLM: `make test-vllm`."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, LlavaConfig

from hawk_compile.errors import ConfigError, InputError, UnsupportedModelError
from hawk_compile.serving.questions import Reader
from hawk_compile.serving.settings import serving_config
from hawk_compile.serving.vllm.plugin import serve_pruned
from tests.serving.test_questions import IDS, IMAGE, ONE, TWO

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

LLAVA = "LlavaForConditionalGeneration"
SOUND = 7


@pytest.fixture(autouse=True, scope="module")
def plugin_is_found() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def model(architecture: str = LLAVA, axes: int = 0, **multimodal: Any) -> Any:
    """As vLLM's ModelConfig."""
    from vllm.config import MultiModalConfig

    config = LlavaConfig(text_config=LlamaConfig(), architectures=[architecture])
    config.hawk = {"ratio": 0.8}
    if axes:
        config.text_config.rope_parameters = {"mrope_section": [4] * axes}
    return SimpleNamespace(
        model="", hf_config=config, hf_text_config=config.text_config, architecture=architecture,
        multimodal_config=MultiModalConfig(**multimodal), is_encoder_decoder=False, runner_type="generate",
        is_diffusion=False,
    )  # fmt: skip


def changed(**attributes: Any) -> Any:
    made = model()
    made.__dict__.update(attributes)
    return made


def without_images() -> Any:
    plain = model("LlamaForCausalLM")
    plain.multimodal_config = None
    return plain


@pytest.mark.parametrize(("made", "error", "message"), [
    (without_images, UnsupportedModelError, "LlamaForCausalLM takes no images in vLLM"),
    (lambda: model("TransformersMultiModalForCausalLM"), UnsupportedModelError, "runs transformers' code"),
    (lambda: model("Emu3ForConditionalGeneration"), UnsupportedModelError, "runs transformers' code"),
    (lambda: model("HCXVisionV2ForCausalLM"), UnsupportedModelError, "is not among the multimodal models of vLLM's"),
    (lambda: changed(is_encoder_decoder=True), UnsupportedModelError, "reads images by cross-attention"),
    (lambda: changed(runner_type="pooling"), UnsupportedModelError, "runner='pooling' answers with what is pooled of"),
    (lambda: changed(is_diffusion=True), UnsupportedModelError, "draws its answers in blocks"),
    (lambda: model(video_pruning_rate=0.5), UnsupportedModelError, r"video_pruning_rate=0\.5 removes video tokens"),
    (lambda: model(mm_processor_kwargs={"hawk_ratio": 0.5}), ConfigError, "has hawk_ratio, which is read of requests"),
    (lambda: model(axes=4), UnsupportedModelError, "have 4 axes, and 3 travel"),
])  # fmt: skip
def test_configurations(made: Any, error: type[Exception], message: str) -> None:
    config = made()
    with pytest.raises(error, match=message):
        serve_pruned(config)
    assert config.hf_config.architectures == [config.architecture], "nothing is changed half way"


def processor(targets: dict[str, list[int]], **hawk: Any) -> Any:
    """One of ours, of a checkpoint with these placeholders."""
    from hawk_compile.serving.vllm.processor import PrunedProcessor

    made: Any = object.__new__(PrunedProcessor)
    config = serving_config({"ratio": 0.8, **hawk})
    made.checkpoint = SimpleNamespace(config=config, reader=Reader(IDS, None, True, config.used_query))
    made.targets = lambda inputs, kwargs, counts: {name: [ids] * counts.get(name, 0) for name, ids in targets.items()}
    return made


def inputs(prompt: list[int], **counts: int) -> Any:
    return SimpleNamespace(prompt=prompt, mm_data_items={name: [None] * count for name, count in counts.items()})


def asked(prompt: list[int], made: Any, **counts: int) -> Any:
    return made.asked(inputs(prompt, **counts), {}, made.checkpoint.config)


def test_the_question_of_every_item() -> None:
    assert asked(ONE, processor({"image": [IMAGE]}), image=1) == {"image": [(11, 12)]}
    assert asked(TWO, processor({"image": [IMAGE]}), image=2) == {"image": [(11, 12), (13,)]}
    assert asked(ONE, processor({"image": [IMAGE]}, selector="divprune"), image=1) == {"image": [()]}
    assert asked(ONE, processor({"image": [IMAGE]}, modalities=["video"]), image=1) == {}


@pytest.mark.parametrize(("prompt", "targets", "count", "message"), [
    (ONE, {"image": [IMAGE]}, 2, "has 1 placeholders for 2 items of modality image"),
    (ONE, {}, 1, "has 0 placeholders for 1 items of modality image"),
    ([IMAGE], {"image": [IMAGE]}, 1, "no text that could score its image: add a question"),
])  # fmt: skip
def test_prompts(prompt: list[int], targets: dict[str, list[int]], count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        asked(prompt, processor(targets), image=count)


@pytest.mark.parametrize("targets", [{}, {"image": []}, {"video": [IMAGE]}])
def test_a_processor_that_does_not_say_where_items_stand(targets: dict[str, list[int]]) -> None:
    """As that of Mistral's own format, whose prompts come with all of their places: when memory is measured."""
    made = processor(targets)
    with pytest.raises(UnsupportedModelError, match="does not say which ids stand for items of modality image"):
        made.stand_ins(inputs([], image=1), {}, made.checkpoint.config)


def updates(*contents: list[int]) -> list[Any]:
    """Ways in which a checkpoint's processor may write an item."""
    from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

    return [
        PromptReplacement("image", [IMAGE], PromptUpdateDetails.select_token_id(ids, IMAGE)).resolve(0)
        for ids in contents
    ]


def writer() -> Any:
    made = processor({})
    made.checkpoint.why_no_text_inside, made.checkpoint.sounds = "", {SOUND}
    made.checkpoint.rule = SimpleNamespace(item_positions=lambda feature, place: (None, len(place.inner)))
    return made


def test_audio_inside_a_video() -> None:
    """Its places would get the word embedding of what stands for it."""
    made = writer()
    made.shortened(updates([*[IMAGE] * 5, 9, *[IMAGE] * 5]), (11,), made.checkpoint.config, "image", {})
    with pytest.raises(InputError, match=r"audio stands between the visual tokens .* without use_audio_in_video"):
        made.shortened(updates([*[IMAGE] * 5, SOUND, *[IMAGE] * 5]), (11,), made.checkpoint.config, "image", {})


def test_an_item_that_may_be_written_in_two_ways() -> None:
    made = writer()
    short = made.shortened(updates([4, *[IMAGE] * 10, 5]), (11,), made.checkpoint.config, "image", {})
    assert short[0].content.full == [4, IMAGE, IMAGE, 5] and (short[0].content.came, short[0].content.kept) == (10, 2)
    with pytest.raises(UnsupportedModelError, match="may write an item in more than one way"):
        made.shortened(updates([IMAGE] * 10, [IMAGE] * 9), (11,), made.checkpoint.config, "image", {})
