"""The survey itself: it tells right from wrong, and what changed since another."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from hawk_compile.errors import ExportError, InputError
from hawk_compile.tools.cli import app
from hawk_compile.tools.survey import checks, exports
from hawk_compile.tools.survey.checks import survey
from hawk_compile.tools.survey.outcome import Outcome, Survey, Wrong, equal
from hawk_compile.tools.survey.table import Types, changes, here, page, read_types
from hawk_compile.tools.survey.tiny import Tiny, build, prompt, read

FOLDER = Path(__file__).parents[2] / "architectures"


def result(name: str, **statuses: str) -> Survey:
    outcomes = {check: Outcome(status, f"AError: of {name} | here", 1.0) for check, status in statuses.items()}
    return Survey(name, outcomes, "AModel", 0)


def test_a_model_that_prunes_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens than those that are reported, and a prompt that is not pruned."""
    tiny = read(FOLDER / "llava.json")
    real = checks.pruned_call

    def shifted(*args):
        output, keep, layer = real(*args)
        return output, torch.cat([keep[:1], keep[1:] - 1]).clamp(min=0), layer

    monkeypatch.setattr(checks, "pruned_call", shifted)
    found = survey(tiny, {"prefill": checks.prefill})
    assert found.outcomes["prefill"].status == "wrong" and not found.right
    monkeypatch.undo()
    monkeypatch.setattr(checks, "optimize", lambda model, **_: model)
    found = survey(tiny, {"prefill": checks.prefill})
    assert "not pruned" in found.outcomes["prefill"].detail


def test_tiny_models_are_the_same_each_time_and_rows_are_parts_of_their_batch() -> None:
    tiny = read(FOLDER / "qwen2_5_vl.json")
    first, second = build(tiny).state_dict(), build(tiny).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    both, one = prompt(tiny, rows=2), prompt(tiny, rows=[1])
    for name, value in one.items():
        assert torch.equal(both[name][len(both[name]) // 2 :], value), name


def test_numbers_that_are_none_are_not_equal() -> None:
    with pytest.raises(Wrong, match="NaN"):
        equal("logits", torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(Wrong, match=r"off by 0\.5"):
        equal("logits", torch.tensor([1.5]), torch.tensor([1.0]))


def test_what_changed_since_an_earlier_survey(tmp_path: Path) -> None:
    before = Types({"torch": "1"}, {each.name: each for each in (
        result("same", prefill="right"), result("bad", prefill="right"), result("good", prefill="failed"),
        result("gone", prefill="right"),
    )})  # fmt: skip
    now = Types({"torch": "2"}, {each.name: each for each in (
        result("same", prefill="right"), result("bad", prefill="failed"),
        result("good", prefill="right", turns="unasked"), result("new", prefill="refused"),
    )})  # fmt: skip
    assert changes(before, now) == [
        "broke: bad: failed at prefill (AError); it was right",
        "mended: good: right; it was failed at prefill (AError)",
        "new: new: refused",
        "gone: gone",
    ]
    now.write(tmp_path / "types.json")
    assert read_types(tmp_path / "types.json") == now
    text = page(now, "the command")
    assert "2 of 4 types are right in all that was tried, 1 are refused by name, 1 fall short" in text
    assert "| new | of new \\| here |" in text and "- bad: prefill: AError: of bad \\| here" in text


def test_files_that_describe_nothing_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(InputError, match="lacks model_type, class, config_class, config, inputs"):
        read(tmp_path / "one.json")
    (tmp_path / "two.json").write_text("no")
    with pytest.raises(InputError, match="is not JSON"):
        read(tmp_path / "two.json")
    with pytest.raises(InputError, match="must hold a survey"):
        read_types(tmp_path / "one.json")


def test_the_command_surveys_a_folder_and_inspect_knows_its_types(tmp_path: Path) -> None:
    run = CliRunner().invoke
    out, table = tmp_path / "types.json", tmp_path / "types.md"
    result = run(app, ["survey", str(FOLDER), "mllama", "--out", str(out), "--table", str(table)])
    assert result.exit_code == 0 and "0 of 1 are right" in result.output
    assert json.loads(out.read_text())["types"].keys() == {"mllama"}
    assert "| mllama | " in table.read_text()
    result = run(app, ["survey", str(FOLDER), "pp_formulanet", "--out", str(out), "--table", str(table)])
    assert result.exit_code == 0 and "0 of 1 are right" in result.output, "counts those that were asked for"
    assert json.loads(out.read_text())["types"].keys() == {"mllama", "pp_formulanet"}
    assert "| mllama | " in table.read_text() and "| pp_formulanet | " in table.read_text()
    out.write_text(out.read_text().replace(torch.__version__, "1.0"))
    result = run(app, ["survey", str(FOLDER), "mllama", "--out", str(out)])
    assert result.exit_code == 2 and "'torch': '1.0'" in " ".join(result.output.split())
    result = run(app, ["inspect", "llava"])
    assert result.exit_code == 0 and "LlavaForConditionalGeneration" in result.output
    result = run(app, ["survey", str(tmp_path / "none")])
    assert result.exit_code == 2 and "holds none" in result.output
    result = run(app, ["survey", str(FOLDER), "lava"])
    assert result.exit_code == 2 and "got lava" in result.output


def test_exports_alone_leave_what_else_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the type that was exported and of others, of which the table says that they were not."""

    def exported_as(form: str) -> checks.Check:
        def check(tiny: Tiny, model: PreTrainedModel) -> str:
            raise ExportError("it | cannot")

        return check

    monkeypatch.setattr(exports, "exported_as", exported_as)
    out, table, run = tmp_path / "types.json", tmp_path / "models.md", CliRunner().invoke
    known = (result("llava", prefill="right"), result("gone", turns="right"))
    earlier = Types(here([]).versions, {each.name: each for each in known})
    earlier.write(out)
    asked = ["survey", str(FOLDER), "llava", "--exports-only", "--out", str(out), "--table", str(table)]
    answer = run(app, asked)
    assert answer.exit_code == 2 and "name formats" in " ".join(answer.output.split())
    answer = run(app, [*asked, "--exports", "onnx"])
    assert answer.exit_code == 0 and "llava: onnx refused: ExportError: it | cannot" in answer.output
    found = read_types(out).surveys
    assert found["gone"] == earlier.surveys["gone"] and found["llava"].outcomes.keys() == {"prefill", "onnx"}
    assert found["llava"].right and found["llava"].outcomes["prefill"].status == "right"
    text = table.read_text()
    assert "| llava | 0 | yes | — | refused | 1 |" in text and "| gone | 0 | — | yes | not tried | 1 |" in text
    assert "| llava | ONNX | ExportError: it \\| cannot |" in text
