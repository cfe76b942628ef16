"""vLLM with the plugin answers as `optimize` does. Needs vLLM: `make test-vllm`."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hawk_compile.errors import HawkError, InputError
from hawk_compile.serving.vllm.positions import COLUMNS
from hawk_compile.tools.demo.run import MODEL
from hawk_compile.tools.demo.scenes import pick_questions
from tests.serving.by_hand import expected
from tests.serving.cases import Conversation, conversations, films
from tests.serving.checkpoints import KINDS
from tests.serving.engine import ALONE, TOKENS, apart, engine, farthest, optimised, prompts, served
from tests.serving.held_out import CLOSE, CONTROLS, broken, compared

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]


SLOW = pytest.mark.slow
"""What another case shows too: `make test-vllm-kinds` has it."""


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind != "smolvlm"])  # idefics3 by another name
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("checkpoints") / request.param)


def llava(tmp_path: Path) -> Path:
    return KINDS["llava"](tmp_path / "llava")


def test_as_optimize_and_whole_at_0(checkpoint: Path) -> None:
    """A picture in a turn, one that is not square, two turns with a picture each, a picture without text."""
    cases = conversations()
    asked = [cases["one"][0], cases["sizes"][1], cases["turns"][0], cases["no text"][0]]
    llm = engine(checkpoint, {"ratio": 0.8}, limit_mm_per_prompt={"image": 2})
    for ratio in (0.8, 0.0):
        answers = served(llm, checkpoint, asked, ratio)
        assert farthest(answers, expected(checkpoint, asked, answers, ratio)) < CLOSE
    assert sum(each.prompt for each in served(llm, checkpoint, asked)) < sum(each.prompt for each in answers)
    check_what_memory_is_measured_with(llm)
    check_places_are_not_text(llm, checkpoint)


def check_what_memory_is_measured_with(llm: Any) -> None:
    """As GPUs measure before the first request: items with all that pruning does, of which nothing is removed."""
    worker = llm.llm_engine.model_executor.driver_worker
    model, runner = worker.get_model(), worker.model_runner
    (rows,) = model.embed_multimodal(**runner._get_mm_dummy_batch("image", 1))
    assert rows.shape[1] - COLUMNS in model.widths and not rows[:, -COLUMNS:].eq(0).all()


def check_places_are_not_text(llm: Any, folder: Path) -> None:
    """A user who writes what stands for visual tokens: positions would be given to the text."""
    place = llm.get_tokenizer().decode(sorted(llm.llm_engine.model_executor.driver_worker.get_model().places)[:1])
    (asked,) = prompts(1)
    typed = dataclasses.replace(asked, texts=[f"{asked.texts[0]} {place}"])
    with pytest.raises(InputError, match=r"placeholders for 1 items|stands for visual tokens: leave it out"):
        served(llm, folder, [typed])


def test_the_demo_as_it_is_shipped() -> None:
    """A trained model, whose kept tokens matter to what it answers."""
    asked = prompts(12)
    llm = engine(MODEL, {"ratio": 0.8}, disable_log_stats=False)
    for ratio in (0.6, 0.8, 0.9):
        (row,) = compared(llm, asked, ratio)
        assert row.same and row.kept == 12, row
    (other,) = compared(llm, asked[:4], 0.8, selector="stride")
    assert not other.same and other.prompts == 4 and other.kept == 0, other


def test_videos_with_text_between_their_frames(tmp_path: Path) -> None:
    folder = KINDS["qwen3_vl"](tmp_path / "qwen3_vl")
    llm = engine(folder, {"ratio": 0.8})
    for ratio in (0.8, 0.0):
        assert farthest(served(llm, folder, films(), ratio), optimised(folder, films(), ratio=ratio)) < CLOSE


def test_two_images_each_by_itself(tmp_path: Path) -> None:
    folder, asked = llava(tmp_path), prompts(3, images=2)
    llm = engine(folder, {"ratio": 0.8}, limit_mm_per_prompt={"image": 2})
    assert farthest(served(llm, folder, asked), optimised(folder, asked, ratio=0.8, **ALONE)) < CLOSE


@pytest.mark.parametrize(("kind", "size", "room", "beyond"), [
    ("llava", (112, 112), 2, 3),  # 64 positions each, of 256
    ("qwen2_vl", (1600, 28), 6, 8),  # 57 of each axis, of 512
])  # fmt: skip
def test_prompts_that_are_longer_than_the_decoder_knows_positions(
    kind: str, size: tuple[int, int], room: int, beyond: int, tmp_path: Path
) -> None:
    """Of 128: so many pictures answer as by `optimize`, more are too many, and the engine goes on."""
    folder = KINDS[kind](tmp_path / kind)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    llm = engine(folder, {"ratio": 0.98}, limit_mm_per_prompt={"image": beyond}, max_model_len=128)

    def talk(count: int) -> Conversation:
        pairs = pick_questions("test", count)
        return Conversation([[part for scene, each in pairs for part in (scene.pil().resize(size), each.text)]])

    with pytest.raises(InputError, match="would be removed, whose positions stay"):
        served(llm, folder, [talk(beyond)])
    asked = [talk(room), talk(1)]
    assert farthest(served(llm, folder, asked), optimised(folder, asked, ratio=0.98, **ALONE)) < CLOSE


@pytest.mark.parametrize(
    "selector", ["hawk_each", "divprune", pytest.param("cdpruner", marks=SLOW), pytest.param("stride", marks=SLOW)]
)
def test_selectors(selector: str, tmp_path: Path) -> None:
    folder, asked = llava(tmp_path), prompts(3)
    llm = engine(folder, {"ratio": 0.8, "selector": selector})
    assert farthest(served(llm, folder, asked), optimised(folder, asked, ratio=0.8, selector=selector)) < CLOSE


def test_settings_of_the_score(tmp_path: Path) -> None:
    folder, asked, fewest = llava(tmp_path), prompts(3), {"min_per_image": 20}
    settings = {**fewest, "head_weights": [4, 3, 2, 1], "normalization": "minmax", "query": "last"}
    answers = served(engine(folder, {"ratio": 0.8, **settings}), folder, asked)
    assert farthest(answers, optimised(folder, asked, ratio=0.8, **settings)) < CLOSE
    others = optimised(folder, asked, ratio=0.8, **fewest)
    assert [each.prompt for each in answers] == [each.prompt for each in others]
    assert farthest(answers, others) > 1e-3, "each setting but min_per_image at its default"


def test_chunks_and_prefixes_from_the_cache(tmp_path: Path) -> None:
    folder, asked = llava(tmp_path), prompts(4)
    llm = engine(
        folder, {"ratio": 0.5}, enable_prefix_caching=True, block_size=32, max_num_batched_tokens=32, max_num_seqs=2
    )
    answers = optimised(folder, asked, ratio=0.5)
    for _ in range(2):
        assert farthest(served(llm, folder, asked), answers) < CLOSE


@pytest.mark.parametrize("kind", ["qwen2_vl", pytest.param("llava", marks=SLOW)])
def test_whole_items_are_bit_for_bit_what_they_are_without_the_plugin(kind: str, tmp_path: Path) -> None:
    folder, asked = KINDS[kind](tmp_path / kind), prompts(2)
    whole, said = apart(folder, None, 2, TOKENS, {}, VLLM_PLUGINS="")
    assert not said["plugged"]
    plain = engine(folder, None)
    assert served(plain, folder, asked) == whole
    assert not type(plain.llm_engine.model_executor.driver_worker.get_model()).__name__.startswith("Pruned")
    llm = engine(folder, {"ratio": 0.8})
    assert served(llm, folder, asked, 0.0) == whole
    assert type(llm.llm_engine.model_executor.driver_worker.get_model()).__name__.startswith("Pruned")


@pytest.mark.parametrize("control", CONTROLS)
def test_what_must_fail_fails(control: str, tmp_path: Path) -> None:
    """Positions that are not restored; a question that is no part of an item's identity."""
    folder, asked = llava(tmp_path), prompts(4)
    if control == "question":
        asked = [type(each)(asked[0].images, each.texts) for each in prompts(8)]
    with broken(control):
        llm = engine(folder, {"ratio": 0.8})
        answers = served(llm, folder, asked)
    assert farthest(answers, optimised(folder, asked, ratio=0.8)) > 1e-3


@pytest.mark.parametrize(("hawk", "message"), [
    ({"ratio": 80}, "to remove 80 %, give 0.8"),
    ({"ratio": 0.8, "quota": "image"}, "quota cannot be set for a server"),
    ({"rato": 0.8}, "hawk has no setting 'rato'"),
])  # fmt: skip
def test_settings_are_refused_when_the_engine_starts(hawk: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((HawkError, ValueError), match=message):
        engine(llava(tmp_path), hawk)


@pytest.mark.parametrize(("weights", "message"), [
    ([1, 2], r"head_weights must be 4 finite numbers .* got shape \(2,\)"),
    ([float("nan"), 1, 1, 1], "head_weights must be 4 finite numbers"),
    ([[1, 1, 1, 1]] * 2, "numbers, got tuple"),
    ("no.json", "there is no file no.json"),
])  # fmt: skip
def test_head_weights_are_refused_with_the_configuration(weights: Any, message: str, tmp_path: Path) -> None:
    """Where a client can read why: the engine, which reads them again, may be a process of its own."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    settings = {"hawk": {"ratio": 0.8, "head_weights": weights}}
    with pytest.raises((HawkError, ValueError), match=message):
        EngineArgs(model=str(llava(tmp_path)), hf_overrides=settings).create_model_config()
