"""The survey itself: it tells right from wrong, and what changed since another."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from hawk_compile.compat.models import image_text_types
from hawk_compile.errors import CaptureError, ExportError, HawkError, InputError, UnsupportedModelError
from hawk_compile.passes.errors import ShapeError
from hawk_compile.tools.cli import app
from hawk_compile.tools.commands import measure
from hawk_compile.tools.inspection.words import where_cut
from hawk_compile.tools.survey import checks, commands, exports, oracle, videos
from hawk_compile.tools.survey.checks import survey
from hawk_compile.tools.survey.outcome import Misdescribed, Outcome, Survey, Unasked, Untried, Wrong, equal, unlike
from hawk_compile.tools.survey.prompts import others_kept, visual_of
from hawk_compile.tools.survey.table import (
    COLUMNS,
    Types,
    changes,
    counts,
    facts_of,
    here,
    of_type,
    page,
    read_types,
    standing,
    untried,
)
from hawk_compile.tools.survey.tiny import Tiny, build, prompt, read
from hawk_compile.tools.survey.videos import video_of
from tests.tiny import FOLDER


def result(name: str, **statuses: str) -> Survey:
    outcomes = {check: Outcome(status, f"AError: of {name} | here", 1.0) for check, status in statuses.items()}
    return Survey(name, name.partition(".")[0], outcomes, "AModel", 0)


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


def test_what_is_equal() -> None:
    """NaN is not; what forbids a token stands in the same places, and says nothing of how large logits are."""
    lowest, off = torch.finfo(torch.float32).min, pytest.raises(Wrong, match=r"off by")
    assert equal("logits", torch.tensor([1.5, -torch.inf, lowest]), torch.tensor([1.5, -torch.inf, lowest])) == 0.0
    with pytest.raises(Wrong, match="NaN"):
        equal("logits", torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(Wrong, match=r"off by 0\.5"):
        equal("logits", torch.tensor([1.5]), torch.tensor([1.0]))
    with off:
        equal("logits", torch.tensor([1.5, lowest]), torch.tensor([1.0, lowest]), 1e-5)
    with off:
        equal("logits of a small model", torch.tensor([0.0101]), torch.tensor([0.01]), 1e-5)
    assert equal("logits of a large model", torch.tensor([1000.001]), torch.tensor([1000.0]), 1e-5) > 0
    for left, right in [(-torch.inf, 1.0), (1.0, -torch.inf), (-torch.inf, lowest), (-torch.inf, torch.inf)]:
        with pytest.raises(Wrong, match="in other places"):
            equal("logits", torch.tensor([0.0, left]), torch.tensor([0.0, right]), 1e-5)
    with pytest.raises(Wrong, match="no ordinary number"):
        equal("logits", torch.tensor([lowest]), torch.tensor([lowest]))


def test_a_check_that_cannot_fail_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control runs the plain model on other kept tokens, and these must not give the same logits."""
    visual = torch.tensor([0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert others_kept(torch.tensor([0, 2, 3, 5, 6, 7]), visual).tolist() == [0, 1, 2, 4, 6, 7]
    unlike("logits", torch.tensor([1.0]), torch.tensor([1.1]), 1e-5)
    with pytest.raises(Wrong, match="the check cannot fail"):
        unlike("logits", torch.tensor([1.0]), torch.tensor([1.0]), 1e-5)
    tiny = read(FOLDER / "llava.json")
    model = build(tiny)
    inputs = prompt(tiny, rows=1)
    visual = visual_of(model, inputs)
    keep = torch.cat([visual.nonzero()[::2, 0], (~visual).nonzero()[:, 0]]).sort().values
    expected, _ = oracle.pruned_forward(model, inputs, keep, visual)
    monkeypatch.setattr(checks, "pruned_call", lambda *_: (expected, keep, 0))
    monkeypatch.setattr(checks, "restore", lambda model: model)
    monkeypatch.setattr(model, "forward", lambda **_: expected)
    monkeypatch.setattr(oracle, "pruned_forward", lambda *_: (expected, None))
    with pytest.raises(Wrong, match="the check cannot fail"):
        checks.prefill(tiny, model)


def test_features_of_later_layers_may_be_as_wide_as_the_prompt_is_long() -> None:
    visual, keep = torch.tensor([0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool), torch.tensor([0, 2, 3, 6, 7])
    features = torch.rand(5, 8)
    assert oracle.gathered([features], 8, keep, visual)[0].equal(features[1:3])
    assert oracle.gathered(torch.rand(1, 8), 8, keep, visual).shape == (1, 5)


def test_a_prompt_of_which_nothing_is_removed_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"visual_tokens": torch.tensor([4, 1]), "scores": torch.ones(2, 9), "reason": "ratio=0.5"}
    record = SimpleNamespace(**counts, kept_visual_tokens=torch.tensor([2, 1]))
    monkeypatch.setattr(checks, "report", lambda _: record)
    with pytest.raises(Wrong, match=r"nothing removed of \[4, 1\]"):
        checks.pruned_record(None)
    record.kept_visual_tokens = torch.tensor([2, 0])
    assert checks.pruned_record(None) is record


def test_a_turn_that_the_plain_model_itself_gets_wrong_is_not_asked() -> None:
    """Positions that count from 0 behind the prompt again."""
    tiny = read(FOLDER / "llava.json")
    model, words = build(tiny), [7, 8, 9]
    inputs = prompt(tiny, rows=1)
    checks.plain_turn(model, inputs, words)

    def from_zero(kwargs: dict[str, Any]) -> dict[str, Any]:
        length = kwargs["inputs_embeds"].shape[1]
        return {**kwargs, "position_ids": torch.arange(length)[None]}

    with oracle.changed(model.model.language_model, from_zero), pytest.raises(Unasked, match="own turn"):
        checks.plain_turn(model, inputs, words)


def test_what_the_passes_met_is_a_failure_and_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: HawkError, name: str = "prefill") -> str:
        def check(*_: object) -> str:
            raise error

        monkeypatch.setattr(checks, "build", lambda _: None)
        monkeypatch.setattr(checks, "optimize", lambda model, **_: model)
        monkeypatch.setattr(checks, "restore", lambda model: model)
        return survey(read(FOLDER / "llava.json"), {name: check}).outcomes[name].status

    assert raising(UnsupportedModelError("a reason")) == "refused"
    assert raising(CaptureError("a line")) == raising(ShapeError("a size")) == "failed"
    assert raising(CaptureError("a line"), "onnx") == "refused" and raising(ShapeError("a size"), "onnx") == "failed"


def test_an_export_for_which_a_package_is_missing_was_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else needs the package fails; of a log of many lines one is kept."""

    def build(_: Tiny) -> PreTrainedModel:
        raise ImportError("\nthe model requires timm.\n" + "pip install timm\n" * 40)

    monkeypatch.setattr(checks, "build", build)
    found = survey(read(FOLDER / "llava.jamba.json"), {"prefill": checks.prefill, "onnx": checks.prefill})
    assert found.outcomes["prefill"].status == "failed" and found.outcomes["onnx"].status == "untried"
    detail = found.outcomes["onnx"].detail
    assert detail.startswith("ImportError: the model requires timm. pip") and "\n" not in detail and len(detail) < 400
    found.outcomes["prefill"] = Outcome("right", "0", 1.0)
    text = page(Types({"torch": "1"}, {found.name: found}), "the command")
    assert "| llava.jamba | 0 | yes | not tried | 1 |" in text and "Not tried: llava.jamba to ONNX (ImportError" in text
    assert "- *llava.jamba*: a decoder of Jamba" in text and "raises this error" not in text


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
    assert "2 of 4 model types are right in all that was tried, 1 are refused by name, 1 fall short" in text
    assert "| new | of new \\| here |" in text and "- bad: prefill: AError: of bad \\| here" in text


def test_a_type_is_counted_once_and_is_what_all_its_tiny_models_are() -> None:
    surveys = [
        result("one", prefill="right"), result("one.long", prefill="right"), result("two", prefill="right"),
        result("two.long", prefill="wrong"), result("three", prefill="refused"),
    ]  # fmt: skip
    assert counts(surveys) == (1, 1, 1)
    types = Types({"torch": "1"}, {each.name: each for each in surveys})
    assert [each.name for each in of_type(types, "two")] == ["two", "two.long"]
    assert [each.name for each in of_type(types, "two.long")] == ["two.long"]
    assert untried({"llava"}) == sorted(image_text_types() - {"llava"})
    assert "## Not tried" in page(types, "the command") and "llava" in page(types, "the command").splitlines()[-1]


def test_files_that_describe_nothing_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(InputError, match="lacks model_type, class, config_class, config, inputs"):
        read(tmp_path / "one.json")
    (tmp_path / "two.json").write_text("no")
    with pytest.raises(InputError, match="is no JSON"):
        read(tmp_path / "two.json")
    with pytest.raises(InputError, match="must hold a survey"):
        read_types(tmp_path / "one.json")


def test_the_command_surveys_a_folder_and_inspect_knows_its_types(tmp_path: Path) -> None:
    run = CliRunner().invoke
    out, table = tmp_path / "types.json", tmp_path / "types.md"
    result = run(app, ["survey", str(FOLDER), "mllama", "--out", str(out), "--table", str(table)])
    assert result.exit_code == 0 and "0 of 1 model types are right" in result.output
    assert "not in " in result.output and "pix2struct" in result.output
    assert json.loads(out.read_text())["types"].keys() == {"mllama"}
    assert "| mllama | " in table.read_text()
    result = run(app, ["survey", str(FOLDER), "pp_formulanet", "--out", str(out), "--table", str(table)])
    assert result.exit_code == 0 and "0 of 1 model types are right" in result.output, "counts those that were asked for"
    assert json.loads(out.read_text())["types"].keys() == {"mllama", "pp_formulanet"}
    assert "| mllama | " in table.read_text() and "| pp_formulanet | " in table.read_text()
    out.write_text(out.read_text().replace(torch.__version__, "1.0"))
    result = run(app, ["survey", str(FOLDER), "mllama", "--out", str(out)])
    assert result.exit_code == 2 and "'torch': '1.0'" in " ".join(result.output.split())
    result = run(app, ["inspect", "llava"])
    assert result.exit_code == 0 and "LlavaForConditionalGeneration" in result.output
    result = run(app, ["inspect", "gemma4_unified"])
    assert result.exit_code == 0 and "gemma4_unified.small_window" in result.output, "all its variants"
    result = run(app, ["survey", str(tmp_path / "none")])
    assert result.exit_code == 2 and "holds none" in result.output
    result = run(app, ["survey", str(FOLDER), "lava"])
    assert result.exit_code == 2 and "got lava" in result.output


def checked(monkeypatch: pytest.MonkeyPatch, **statuses: str) -> None:
    """Surveys of the command end so, without a model."""
    monkeypatch.setattr(commands, "survey", lambda tiny, _: result(tiny.name, **statuses))


def folder_of(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / f"{name}.json").write_text((FOLDER / "mllama.json").read_text())
    return path


def test_a_folder_of_ones_own_is_not_told_of_all_that_the_shipped_one_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked(monkeypatch, prefill="right")
    folder, table = folder_of(tmp_path / "own", "mine"), tmp_path / "models.md"
    asked = ["survey", str(folder), "--table", str(table), "--checks", "prefill"]
    answer = CliRunner().invoke(app, asked)
    assert answer.exit_code == 0 and "new: mine: right" in answer.output and "gone" not in answer.output
    line = next(line for line in answer.output.splitlines() if line.startswith("not in"))
    assert line.endswith("model types with images that transformers has")
    text = table.read_text()
    assert "## Right" in text and "## Refused" not in text and "## Not tried" not in text
    assert f"survey {folder} --checks prefill --table {table}`" in text
    Types({}, {"old": result("old", prefill="right")}).write(tmp_path / "old.json")
    answer = CliRunner().invoke(app, [*asked, "--before", str(tmp_path / "old.json")])
    assert answer.exit_code == 0 and "gone: old" in answer.output and "pix2struct" in answer.output
    assert f"--before {tmp_path / 'old.json'} --table" in table.read_text() and "## Not tried" in table.read_text()


def test_the_exit_code_says_that_something_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, before = folder_of(tmp_path / "own", "mine", "other"), tmp_path / "before.json"
    known = (result("mine", prefill="right"), result("other", prefill="failed"))
    Types({}, {each.name: each for each in known}).write(before)
    for status, code in (("right", 0), ("failed", 1), ("unasked", 0)):
        checked(monkeypatch, prefill=status)
        answer = CliRunner().invoke(app, ["survey", str(folder), "--before", str(before)])
        assert answer.exit_code == code and ("broke: mine" in answer.output) == bool(code), answer.output
    checked(monkeypatch, onnx="right")
    asked = ["survey", str(folder), "--before", str(before), "--exports", "onnx", "--exports-only"]
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert "exit code is 1" in " ".join(CliRunner().invoke(app, ["survey", "--help"]).output.split())


def test_what_the_json_gets_wrong_is_told_of_by_name() -> None:
    tiny = read(FOLDER / "llava.json")
    first = {"ratio 0": checks.at_ratio_zero}
    found = survey(replace(tiny, model_class="LlavaForConditionalGenerations"), first).outcomes["ratio 0"]
    assert found.status == "failed"
    assert found.detail.startswith("`class` in the JSON names LlavaForConditionalGenerations")
    assert found.detail.endswith("did you mean 'LlavaForConditionalGeneration'?")
    with pytest.raises(Misdescribed, match="`config_class` in the JSON names Llava, which transformers"):
        build(replace(tiny, config_class="Llava"))
    words = {"input_ids": {"dtype": "int64", "values": [[5, 6, 7]]}}
    short = survey(replace(tiny, inputs=tiny.inputs | words), first)
    found = short.outcomes["ratio 0"]
    assert found.status == "failed"
    assert found.detail.startswith("the plain model fails on these inputs: correct the JSON (")
    assert re.search(r"; transformers/models/llava/\S+:\d+\)$", found.detail)
    assert standing(short) == "failed at nothing removed (the plain model fails on these inputs)"


def test_files_are_all_read_before_the_first_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(monkeypatch, prefill="right")
    folder = folder_of(tmp_path / "own", "first")
    (folder / "second.json").write_text("no")
    answer = CliRunner().invoke(app, ["survey", str(folder)])
    assert answer.exit_code == 2 and "second.json" in answer.output and "first:" not in answer.output


def test_checks_are_named_as_on_the_page() -> None:
    names = [COLUMNS[name] for name in checks.CHECKS]
    assert list(measure.CHECKS) == names
    assert ", ".join(names) in " ".join(CliRunner().invoke(app, ["survey", "--help"]).output.split())
    for asked in (["nothing removed", "turns"], ["ratio 0", "several turns"]):
        assert list(commands.checks_of([], False, asked)) == ["ratio 0", "turns"]
    with pytest.raises(InputError, match="among nothing removed, selection"):
        commands.checks_of([], False, ["ratios"])


def test_inspect_says_of_a_type_what_was_tried() -> None:
    """A refusal once; a name that is no type, with the one that was meant; a folder that is not there is no type."""
    run = CliRunner().invoke
    answer = run(app, ["inspect", "mllama"])
    assert answer.exit_code == 0 and answer.output.count("refused") == 1 and "cross-attention" in answer.output
    for name, hint in (("qwen9_vl", "did you mean 'qwen"), ("jamba", "docs/models.md lists those")):
        answer = run(app, ["inspect", name])
        assert answer.exit_code == 2 and f"{name} is neither a file or folder nor a model type" in answer.output
        assert hint in answer.output
    answer = run(app, ["inspect", "folders/llava"])
    assert answer.exit_code == 2 and "there is no file" in answer.output


def test_what_is_special_of_a_tiny_model_is_kept_and_shown(tmp_path: Path) -> None:
    tiny = replace(read(FOLDER / "llava.json"), notes=("one", "two"))
    here([survey(tiny, {})]).write(tmp_path / "types.json")
    assert facts_of(read_types(tmp_path / "types.json").surveys["llava"])["notes"] == "one; two"
    shipped = read_types().surveys["qwen3_5.linear_first"]
    assert shipped.notes == read(FOLDER / "qwen3_5.linear_first.json").notes
    output = CliRunner().invoke(app, ["inspect", "qwen3_5"]).output
    assert "linear attention first" in " ".join(output.split())


def test_layers_ahead_of_the_one_that_scores_are_told_of_in_number() -> None:
    assert where_cut(0) == ", the first"
    assert where_cut(1).endswith("layer 0 runs at S") and where_cut(3).endswith("layers 0 to 2 run at S")


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


def test_the_images_of_a_tiny_model_as_a_video() -> None:
    """Of two frames: other names, ids and kinds, and twice as many tokens, which end where the images' did."""
    tiny = read(FOLDER / "qwen2_vl.json")
    model = build(tiny)
    made = video_of(tiny, model)
    inputs, before = prompt(made, rows=1), prompt(tiny, rows=1)
    (_, *size), grid = before["image_grid_thw"][0].tolist(), inputs["video_grid_thw"][0].tolist()
    assert grid == [2, *size] and "image_grid_thw" not in inputs and "pixel_values" not in inputs
    assert len(inputs["pixel_values_videos"]) == 2 * len(before["pixel_values"])
    words, now = (ids[0, ids[0] != token].tolist() for ids, token in (
        (before["input_ids"], model.config.image_token_id), (inputs["input_ids"], model.config.video_token_id)))
    assert words == now and inputs["input_ids"].eq(model.config.video_token_id).sum() == 2 * before["input_ids"].eq(
        model.config.image_token_id).sum()
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape


def test_frames_with_text_between_them() -> None:
    """What ends an image and what starts one, and around them what does a video; the ids are of images, where the model
    lets these wait for frames."""
    tiny = read(FOLDER / "glm4v.json")
    model = build(tiny)
    inputs, image, config = prompt(video_of(tiny, model), rows=1), model.config.image_token_id, model.config
    frame = [config.image_start_token_id, *[image] * 64, config.image_end_token_id]
    ids = inputs["input_ids"][0].tolist()
    assert ids == [config.video_start_token_id, *frame * 2, config.video_end_token_id, *ids[-5:]]
    assert inputs["mm_token_type_ids"].eq(2).equal(inputs["input_ids"] == image)


def test_a_video_of_one_frame_where_the_models_encoder_fails_on_more() -> None:
    tiny = read(FOLDER / "kimi_k25.json")
    assert video_of(tiny, build(tiny)).inputs["video_grid_thw"]["values"] == tiny.inputs["image_grid_thw"]["values"]


def test_videos_that_the_json_describes() -> None:
    """As a forward takes them; what stands in the prompt is worked out. What the model does not take is told of."""
    tiny = read(FOLDER / "llava_onevision.json")
    model = build(tiny)
    ids, video = torch.tensor(video_of(tiny, model).inputs["input_ids"]["values"]), model.config.video_token_id
    assert (ids == video).sum(1).tolist() == [7, 7, 7], "six frames and the newline behind them"
    assert video_of(tiny, model).inputs.keys() == {"input_ids", "attention_mask", "pixel_values_videos"}
    with pytest.raises(Untried, match="describe one in `video_inputs` of the JSON"):
        video_of(replace(tiny, video_inputs={}), model)
    assert survey(tiny, {"video": checks.CHECKS["video"]}).outcomes["video"].status == "right"
    words = tiny.inputs | {"input_ids": {"dtype": "int64", "values": [[1] * 10 + [5] * 7, [1] * 9 + [5] * 8, [5] * 17]}}
    with pytest.raises(Untried, match="unequal room, or none"):
        video_of(replace(tiny, inputs=words), model)
    flat = {"pixel_values_videos": tiny.inputs["pixel_values"] | {"shape": [3, 3, 16, 16]}}
    with pytest.raises(Untried, match="encoder takes no such video: describe one in `video_inputs`"):
        video_of(replace(tiny, video_inputs=flat), model)


def test_models_that_fail_on_videos_and_videos_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """One error for a video wherever it stands is the model's own; several are of what the JSON says."""
    tiny, calls = read(FOLDER / "llava_onevision.json"), []

    def failing(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
        calls.append(inputs)
        raise Misdescribed("it fails") from TypeError(f"of {len(calls) if distinct else 'the model'}")

    model = build(tiny)
    monkeypatch.setattr(videos, "plain", failing)
    distinct = False
    with pytest.raises(Unasked, match=r"on a video, wherever it stands in the prompt \(TypeError: of the model\)"):
        video_of(tiny, model)
    distinct = True
    with pytest.raises(Untried, match=r"correct `video_inputs` in the JSON \(TypeError: of 5; TypeError: of 6"):
        video_of(tiny, model)


def test_models_that_are_not_asked_about_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose forward takes none; one that takes them otherwise than its images, which may still be right."""
    llava = read(FOLDER / "llava.json")
    found = survey(llava, {"video": checks.CHECKS["video"]}).outcomes["video"]
    assert found.status == "unasked" and "takes no videos" in found.detail

    def otherwise(tiny: Tiny, model: PreTrainedModel) -> Tiny:
        raise Untried("laid out otherwise")

    monkeypatch.setattr(checks, "video_of", otherwise)
    result = survey(llava, {name: checks.CHECKS[name] for name in ("ratio 0", "video")})
    assert result.outcomes["video"].status == "untried" and result.right
