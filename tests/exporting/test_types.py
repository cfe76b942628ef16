"""Types of tests/architectures of which an export has more to do than for others, in ONNX beside the optimised model.

docs/models.md says of every type whether it can be exported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import hawk_compile
from hawk_compile.exporting.check import compare
from hawk_compile.tools.survey.exports import exported_as
from hawk_compile.tools.survey.prompts import padded
from hawk_compile.tools.survey.tiny import Tiny, build, prompt, read
from tests.tiny import FOLDER

TYPES = {
    "deepseek_vl_hybrid": "a projector that runs twice",
    "dots3_note": "keys of an indexer beside those of the attention",
    "emu3": "an encoder that another method than its forward runs, and a quantiser in it",
    "exaone4_5": "an encoder whose keys have fewer heads; no positions, even from generate",
    "fuyu": "features that no encoder pools, from one linear layer",
    "gemma4": "layers that share the keys of others",
    "glm4v": "a tower that reads the sizes of images and the bounds of segments",
    "glm5_next": "a part of heads that is 0 wide; the sparse attention behind states",
    "granite4_vision": "features for numbered layers alone, by a list of projectors",
    "llama4": "rotary positions by complex numbers",
    "molmo2": "a projector that takes indices of patches, one row for each visual token",
    "paddleocr_vl": "a projector that lays rows out by the sizes of images",
    "qwen3_asr": "audio, attended to within bounds that the tower counts itself",
    "voxtral": "audio",
}
HYBRID = "qwen3_5.linear_first"


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_a_type_answers_as_the_optimised_model(name: str) -> None:
    """The same ids and kept tokens; the logits of all steps within rounding."""
    tiny = read(FOLDER / f"{name}.json")
    assert float(exported_as("onnx")(tiny, build(tiny))) < 1e-4


class Hybrid(NamedTuple):
    tiny: Tiny
    model: Any
    runner: hawk_compile.Runner


@pytest.fixture(scope="module")
def hybrid() -> Iterator[Hybrid]:
    """Exported from one row, and optimised; states of linear attention come before and behind the cut."""
    tiny = read(FOLDER / f"{HYBRID}.json")
    model: Any = build(tiny)
    with tempfile.TemporaryDirectory(prefix="hawk-types-") as folder:
        hawk_compile.export(model, prompt(tiny, rows=1), Path(folder) / "onnx", ratio=0.5, head_weights="uniform")
        yield Hybrid(tiny, model, hawk_compile.load(Path(folder) / "onnx"))


@pytest.mark.slow
def test_states_are_handed_on(hybrid: Hybrid) -> None:
    """One row, and two of which the second is padded."""
    single = compare(hybrid.runner, hybrid.model, [prompt(hybrid.tiny, rows=1)])
    batch = compare(hybrid.runner, hybrid.model, [padded(hybrid.tiny, hybrid.model)[0]])
    assert single.whole and batch.whole and (single.rows, batch.rows) == (1, 2)
    assert max(single.logits, batch.logits) < 1e-3  # of logits up to 24
    assert hybrid.runner.report().scoring_layer == 3


@pytest.mark.slow
def test_text_goes_through_states_token_by_token(hybrid: Hybrid) -> None:
    """A turn behind a pruned prompt, and a prompt of text of which one row is padded on the left."""
    hawk_compile.optimize(hybrid.model, ratio=0.5, head_weights="uniform", backend="eager")
    asked: dict[str, Any] = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    turns, texts = [], []
    for generate in (hybrid.model.generate, hybrid.runner.generate):
        first = generate(**prompt(hybrid.tiny, rows=1), **asked)
        ids = torch.cat([first.sequences, torch.tensor([[7, 9, 5]])], 1)
        turns.append(generate(ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **asked))
        mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
        ids = torch.tensor([[7, 9, 5, 11, 12, 6, 8]] * 2)
        texts.append(generate(ids, attention_mask=mask, **asked))
    for plain, exported in (turns, texts):
        torch.testing.assert_close(torch.stack(exported.logits), torch.stack(plain.logits), atol=1e-3, rtol=1e-4)
