"""Scores worked out by hand, and the check of what is kept: what they see, and that they can fail."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from hawk_compile.tools.cli import app
from hawk_compile.tools.survey import checks, scores
from hawk_compile.tools.survey.checks import best_kept, survey
from hawk_compile.tools.survey.outcome import Unasked, Wrong
from hawk_compile.tools.survey.prompts import others_kept, question_of, visual_of
from hawk_compile.tools.survey.tiny import build, prompt, read
from tests.tiny import FOLDER

LLAVA = read(FOLDER / "llava.json")


def selection() -> Any:
    return survey(LLAVA, {"selection": checks.selection}).outcomes["selection"]


def test_a_pass_that_scores_rotated_heads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selection().status == "right"
    monkeypatch.setattr("hawk_compile.passes.position.holds_positions", lambda *_: False)
    outcome = selection()
    assert outcome.status == "wrong" and outcome.detail.startswith("scores: off by")


def test_other_tokens_than_the_best_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.pruned_call

    def shifted(tiny: Any, model: Any, inputs: dict[str, Any]) -> Any:
        output, keep, layer = real(tiny, model, inputs)
        return output, others_kept(keep, visual_of(model, inputs)), layer

    monkeypatch.setattr(checks, "pruned_call", shifted)
    outcome = selection()
    assert outcome.status == "wrong" and "is kept, and one that scores" in outcome.detail


def test_rounding_alone_decides_between_equal_scores() -> None:
    score = torch.tensor([0.5, 0.2, 0.2 + 1e-7, -0.1])
    for kept in ([True, True, False, False], [True, False, True, False]):
        best_kept(score, torch.tensor(kept))
    with pytest.raises(Wrong, match=r"scores -0\.1 is kept, and one that scores 0\.5 is not"):
        best_kept(score, torch.tensor([False, True, False, True]))


def test_a_check_that_any_query_passes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.scores, "scored", lambda seen, visual, question: torch.ones(int(visual.sum())))
    monkeypatch.setattr(checks, "pruned_record", lambda _: SimpleNamespace(scores=torch.ones(1, 99)))
    monkeypatch.setattr(checks, "pruned_call", lambda *_: (None, torch.arange(8), 0))
    monkeypatch.setattr(checks, "restore", lambda model: model)
    monkeypatch.setattr(checks, "visual_of", lambda *_: torch.arange(99) < 16)
    with pytest.raises(Wrong, match="the check cannot fail"):
        checks.selection(LLAVA, build(LLAVA))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_compared_is_what_the_projections_give(implementation: str) -> None:
    """By one operator, or by a softmax of the product."""
    model, inputs = build(LLAVA), prompt(LLAVA, rows=1)
    model.set_attn_implementation(implementation)
    attention, made = model.model.language_model.layers[1].self_attn, {}
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(lambda _, args, output, name=name: made.update({name: output}))
    with torch.no_grad():
        model(**inputs)
    query, key = (value[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1) for value in made.values())
    seen = scores.compared(model, inputs, 1)
    torch.testing.assert_close(seen.query, query)
    torch.testing.assert_close(seen.key, key.repeat_interleave(len(query) // len(key), 0))


def test_a_factor_of_the_rotation_leaves_with_it() -> None:
    angle = torch.arange(3.0)
    with scores.Watching(3):
        cos, sin = angle.cos() * 1.2, torch.sin(angle) * 1.2
        turn = torch.polar(torch.full((3,), 1.2), angle)
        half = 0.5 * torch.ones(3)
    assert cos.tolist() == [1, 1, 1] and sin.tolist() == [0, 0, 0] and turn.tolist() == [1, 1, 1]
    assert half.tolist() == [0.5, 0.5, 0.5], "nothing else"


def test_position_that_enters_otherwise_is_not_asked() -> None:
    model, inputs = build(LLAVA), prompt(LLAVA, rows=1)
    projection: nn.Module = model.model.language_model.layers[0].self_attn.k_proj

    def counted(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + torch.arange(output.shape[1])[:, None]

    scores.compared(model, inputs, 0)
    projection.register_forward_hook(counted)
    with pytest.raises(Unasked, match="position is in keys"):
        scores.compared(model, inputs, 0)


def test_an_attention_that_is_not_seen_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(LLAVA)
    model.set_attn_implementation("eager")
    monkeypatch.setattr(scores, "PRODUCTS", ())
    with pytest.raises(Unasked, match="attends neither"):
        scores.compared(model, prompt(LLAVA, rows=1), 0)


def test_the_question_stands_behind_the_last_visual_token() -> None:
    assert question_of(torch.tensor([False, True, True, False])).tolist() == [False, False, False, True]
    assert question_of(torch.tensor([False, True, True])).tolist() == [True, False, False], "all text where none does"


def test_the_command_runs_the_checks_that_are_named(tmp_path: Path) -> None:
    out, run = tmp_path / "types.json", CliRunner().invoke
    asked = ["survey", str(FOLDER), "mllama", "--out", str(out), "--checks"]
    answer = run(app, [*asked, "selection, ratio 0"])
    assert answer.exit_code == 0 and '"selection": {"status": "refused"' in out.read_text()
    assert "prefill" not in out.read_text()
    answer = run(app, [*asked, "slection"])
    assert answer.exit_code == 2 and "got slection" in " ".join(answer.output.split())
