"""Every tiny checkpoint with every kind of conversation, against `optimize`. Takes minutes: `make test-vllm-kinds`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hawk_compile.errors import InputError, UnsupportedModelError
from tests.serving.by_hand import expected, known
from tests.serving.cases import conversations, films
from tests.serving.checkpoints import KINDS
from tests.serving.engine import engine, farthest, optimised, served
from tests.serving.other_checkpoints import OTHER_KINDS, qwen3_5

pytestmark = [
    pytest.mark.vllm, pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm-kinds"),
]  # fmt: skip

CLOSE = 1e-4
"""Log-probabilities in fp32, of two implementations of the same model."""
FILMED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "qwen2_5_omni", "qwen3_omni_moe",
          "qwen3_vl_moe")  # fmt: skip
TOUCHING = ("llava", "llava_next", "llava_onevision", "granite")
"""Nothing stands around the visual tokens of a picture."""


@pytest.fixture(scope="module", params=[*OTHER_KINDS, *KINDS])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return {**KINDS, **OTHER_KINDS}[request.param](tmp_path_factory.mktemp("checkpoints") / request.param)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[Any]:
    most = {"image": 2, "video": 1} if checkpoint.name in FILMED else {"image": 2}
    yield engine(checkpoint, {"ratio": 0.8}, max_model_len=2048, limit_mm_per_prompt=most)


@pytest.mark.parametrize("case", conversations())
def test_as_optimize(llm: Any, checkpoint: Path, case: str) -> None:
    asked = conversations()[case]
    if case == "several" and checkpoint.name in TOUCHING:
        with pytest.raises(InputError, match="two images of this prompt touch"):
            served(llm, checkpoint, asked)
        return
    for ratio in (0.8, 0.95, 0.0):
        answers = served(llm, checkpoint, asked, ratio)
        assert farthest(answers, expected(checkpoint, asked, answers, ratio)) < CLOSE, (checkpoint.name, ratio)


def test_videos_as_optimize(llm: Any, checkpoint: Path) -> None:
    if checkpoint.name not in FILMED:
        pytest.skip("takes no videos, or not as Hugging Face does")
    for ratio in (0.8, 0.5, 0.0):
        answers = served(llm, checkpoint, films(), ratio)
        assert farthest(answers, optimised(known(checkpoint), films(), ratio=ratio)) < CLOSE


def test_embeddings_that_are_scored_without_what_multiplies_them_are_others(tmp_path: Path) -> None:
    folder, asked = OTHER_KINDS["granite"](tmp_path / "granite"), conversations()["sizes"]
    llm = engine(folder, {"ratio": 0.8}, max_model_len=2048)
    model = llm.llm_engine.model_executor.driver_worker.get_model()
    multiplied = model.projections
    model.projections = lambda embeddings: multiplied(embeddings / 12)
    assert farthest(served(llm, folder, asked), optimised(folder, asked, ratio=0.8)) > 10 * CLOSE


@pytest.mark.parametrize(("make", "message"), [
    (qwen3_5, "has no softmax attention, by which visual tokens are scored"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused_when_the_engine_starts(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((UnsupportedModelError, ValueError), match=message):
        engine(make(tmp_path / "refused"), {"ratio": 0.8})
