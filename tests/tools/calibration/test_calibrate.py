"""`calibrate` on the shipped model and on tiny ones: what each ablation leaves out, and that a killed run goes on."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

import hawk_compile
from hawk_compile.capture.encode import run_encoders
from hawk_compile.errors import ConfigError, InputError
from hawk_compile.tools.calibration.ablation import ablated
from hawk_compile.tools.calibration.batch import repeated
from hawk_compile.tools.calibration.calibrate import calibrate
from hawk_compile.tools.calibration.likelihood import likelihoods
from hawk_compile.tools.cli import app
from hawk_compile.tools.evaluation.asking import encoded, fresh
from hawk_compile.tools.evaluation.samples import read_samples
from tests import zoo
from tests.encoders import at_each_encoding
from tests.exporting import demo

SETTINGS = {"limit": 8, "batch": 3, "metric": "likelihood", "ratios": (0.9,), "backend": "eager"}


def calibrated(data="demo:calibration", **settings):
    return calibrate(demo.model(), demo.processor(), data, **{**SETTINGS, **settings})


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_output_of_one_head_is_zero(name):
    """As if its columns of the output projection were; another head in each row."""
    model = zoo.build(name, layers=2)
    inputs = zoo.inputs(name, model, rows=[zoo.sizes(name)[2], zoo.sizes(name)[3]])
    attention = model.base_model.get_decoder().layers[0].self_attn
    width, weight = attention.head_dim, attention.o_proj.weight
    visual = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    with torch.no_grad():
        plain, whole = model(**inputs).logits, weight.clone()
        with ablated(model, "output", [1, 3], visual):
            found = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, plain)
        for row, head in enumerate((1, 3)):
            weight[:, head * width : (head + 1) * width] = 0
            torch.testing.assert_close(found[row], model(**inputs).logits[row])
            assert not torch.allclose(found[row], plain[row], atol=1e-4)
            weight.copy_(whole)


def test_other_models_do_not_see_an_ablation():
    """Two models of one class: the second runs as ever inside the first one's, whose own config is as it was behind."""
    one, other = zoo.build("llava", layers=2), zoo.build("llava", layers=2)
    inputs = zoo.inputs("llava", one, rows=[zoo.sizes("llava")[2]])
    visual = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    known = set(ALL_ATTENTION_FUNCTIONS)
    with torch.no_grad():
        plain, others = one(**inputs).logits, other(**inputs).logits
        with ablated(one, "output", [1], visual):
            assert torch.equal(other(**inputs).logits, others)
            assert not torch.allclose(one(**inputs).logits, plain)
        assert torch.equal(one(**inputs).logits, plain)
    layers = one.base_model.get_decoder().layers
    assert layers[0].self_attn.config is layers[1].self_attn.config and set(ALL_ATTENTION_FUNCTIONS) == known


def test_text_does_not_see_pictures_through_one_head():
    """Computed by hand for every query; with padding in front, and another head in each row."""
    name = "llava"
    model = zoo.build(name, layers=1)
    inputs = zoo.inputs(name, model, rows=[zoo.sizes(name)[2], zoo.sizes(name)[3]])
    visual = inputs["input_ids"] == model.config.image_token_id
    attention, held = model.base_model.get_decoder().layers[0].self_attn, {}
    hook = attention.o_proj.register_forward_pre_hook(lambda m, i: held.update(out=i[0]))
    with torch.no_grad():
        model(**inputs)
        plain = held["out"]
        with ablated(model, "attention", [2, 0], visual):
            model(**inputs)
        without = held["out"]
    hook.remove()
    shape = (*plain.shape[:2], -1, attention.head_dim)
    changed = (plain - without).reshape(shape).abs().amax(-1) > 1e-6  # [B, S, H]
    behind = visual.cumsum(1) > 0
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(visual)
    for row, head in enumerate((2, 0)):
        assert not changed[row][:, [each for each in range(4) if each != head]].any()
        assert torch.equal(changed[row, :, head][real[row]], (behind & ~visual)[row][real[row]])


@pytest.mark.parametrize("name", zoo.NAMES)
def test_repeated_rows_have_their_own_pictures(name):
    """Features in one tensor, in a list, and with more for later layers; rows with other numbers of pictures."""
    model = zoo.build(name, layers=2)
    several = next(row for row in zoo.sizes(name) if len(row.images) == 2)
    inputs = zoo.inputs(name, model, rows=[zoo.sizes(name)[0], several])
    with torch.no_grad():
        inputs = run_encoders(model, inputs)
        found = model(**repeated(inputs, 3)).logits
        torch.testing.assert_close(found, model(**fresh(inputs)).logits.repeat(3, 1, 1))


def test_weights_are_clipped_drops_in_proportion():
    found = calibrated()
    measured = found.datasets["demo:calibration"]
    drops = np.array([head["drop"] for head in measured["heads"]])
    assert found.weights == pytest.approx((drops.clip(0) / drops.clip(0).sum()).tolist(), abs=1e-6)
    assert found.unsure == [number for number, head in enumerate(measured["heads"]) if not head["above_noise"]]
    assert measured["questions"] == 8 and len(measured["sha256"]) == 64 and measured["score"] < 0
    assert all(head["low"] <= head["drop"] <= head["high"] for head in measured["heads"])


def test_questions_of_one_picture_encode_it_once(monkeypatch):
    model, calls = demo.model(), []
    at_each_encoding(monkeypatch, model, lambda: calls.append(1))
    samples = read_samples("demo:calibration", limit=2)
    questions = [dataclasses.replace(each, images=samples[0].images) for each in samples]
    found = calibrated(data=questions, limit=None, batch=1, image_cache="8MB")
    assert len(calls) == 1
    plain = calibrated(data=questions, limit=None, batch=1)
    assert len(calls) == 3 and found.weights == plain.weights


def test_what_the_score_ablation_measures():
    """The likelihood under pruning by all heads but one, one question at a time."""
    model, processor = demo.model(), demo.processor()
    found = calibrated(limit=3)
    samples, means = read_samples("demo:calibration", limit=3), []
    for left_out in (None, 5):
        weights = tuple(float(head != left_out) for head in range(8))
        hawk_compile.optimize(model, ratio=0.9, head_weights=weights, backend="eager")
        means.append(
            np.mean([likelihoods(model, processor, encoded(model, processor, [each]), [each]) for each in samples])
        )
    hawk_compile.restore(model)
    measured = found.datasets["demo:calibration"]
    assert measured["score"] == pytest.approx(means[0], abs=1e-4)
    assert measured["heads"][5]["drop"] == pytest.approx(means[0] - means[1], abs=1e-4)


@pytest.mark.parametrize("ablation", ["attention", "output"])
def test_the_other_ablations_leave_the_model_unpruned(ablation):
    """One head in a forward or three, pictures are encoded once for each of the two batches."""
    before, calls = demo.model().__dict__.get("_hawk_runtime"), []
    hook = demo.model().model.visual.register_forward_hook(lambda *call: calls.append(call))
    found, again = (calibrated(ablation=ablation, limit=6, heads_at_once=heads) for heads in (1, 3))
    hook.remove()
    assert len(calls) == 2 * 2
    assert found.ablation == ablation and found.ratios == []
    assert sum(found.weights) == pytest.approx(1, abs=1e-6) and demo.model().__dict__.get("_hawk_runtime") is before
    drops, same = ([head["drop"] for head in each.datasets["demo:calibration"]["heads"]] for each in (found, again))
    assert drops == pytest.approx(same, abs=1e-5) and max(drops) > 1e-3


def test_several_datasets_are_averaged():
    sets = {name: read_samples(f"demo:{name}", limit=4) for name in ("calibration", "tune")}
    found = calibrate(demo.model(), demo.processor(), sets, **{**SETTINGS, "limit": None})
    shares = []
    for measured in found.datasets.values():
        drops = np.array([head["drop"] for head in measured["heads"]]).clip(0)
        shares.append(drops / drops.sum())
    assert list(found.datasets) == ["calibration", "tune"]
    assert found.weights == pytest.approx(np.mean(shares, axis=0).tolist(), abs=1e-6)


def test_a_killed_run_goes_on_to_the_same_file(tmp_path):
    """Killed while it writes a batch: what stands there is used, and the cut line is not."""
    progress = tmp_path / "progress"
    whole = calibrated(progress_file=progress)
    whole.write(tmp_path / "whole.json")
    lines = progress.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3
    date = json.loads(lines[0])["date"]
    lines[0] = lines[0].replace(date, "2026-01-01")
    held = json.loads(lines[1])
    held["scores"][0][0] += 1  # only a batch that is not measured again has this
    progress.write_text(lines[0] + json.dumps(held) + "\n" + lines[2][:40])
    seen = []
    again = calibrated(progress_file=progress, progress=lambda now: seen.append((now.done, now.total)))
    assert seen == [(0, 8), (3, 8), (6, 8), (8, 8)] and again.date == "2026-01-01"
    name = "demo:calibration"
    assert again.datasets[name]["score"] == pytest.approx(whole.datasets[name]["score"] + 1 / 8)
    progress.write_text("".join(lines[:2]) + lines[2][:40])
    dataclasses.replace(calibrated(progress_file=progress), date=whole.date).write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    for other in ({"ablation": "output"}, {"ablation": "attention", "heads_at_once": 2}):
        with pytest.raises(InputError, match="belongs to a calibration with other settings"):
            calibrated(progress_file=progress, **other)


def test_what_cannot_be_calibrated(tmp_path):
    with pytest.raises(ConfigError, match="ablation must be one of score, attention, output, got 'heads'"):
        calibrated(ablation="heads")
    with pytest.raises(ConfigError, match=r'heads_at_once must be 1 with ablation "score".*got 2: leave it out'):
        calibrated(heads_at_once=2)
    with pytest.raises(ConfigError, match="heads_at_once must be a whole number of at least 1, got 0"):
        calibrated(heads_at_once=0)
    for settings, message in (
        ({"head_weights": [1.0] * 8}, "head_weights are what calibrate measures: leave them out"),
        ({"selector": "uniform"}, "weights all heads alike"),
        ({"batch_size": 4}, "unknown setting batch_size"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrated(**settings)
    with pytest.raises(ConfigError, match="ratios is the fraction"):
        calibrated(ratios=(2.0,))
    with pytest.raises(InputError, match="leaving out a head lowers the score on no dataset"):
        calibrated(metric=lambda said, answers: 1.0, limit=2)
    for text in ("nothing\n", "[1]\n", '{"weights": [1.0]}'):
        (tmp_path / "progress").write_text(text)
        with pytest.raises(InputError, match="must hold the progress of a calibration"):
            calibrated(progress_file=tmp_path / "progress")
        assert (tmp_path / "progress").read_text() == text
    with pytest.raises(InputError, match="cannot be written"):
        calibrated(progress_file=tmp_path / "no" / "folder")
    empty = dataclasses.replace(read_samples("demo:tune", limit=1)[0], answers=("",))
    with pytest.raises(InputError, match="tune scene 0: an answer must hold a token, got ''"):
        calibrated(limit=None, ablation="output", data=[empty])


def test_the_command_line_writes_what_optimize_takes(tmp_path):
    out = tmp_path / "head_weights.json"
    arguments = ["calibrate", demo.FOLDER, "--data", "demo:calibration", "--limit", "6", "--backend", "eager",
                 "--metric", "likelihood",
                 "--out", str(out)]  # fmt: skip
    called = CliRunner().invoke(app, [*arguments, "--heads-at-once", "2"])
    assert called.exit_code == 2 and "heads_at_once must be 1 with ablation" in called.stderr
    called = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert called.exit_code == 0, called.output
    assert f"written: {out}" in called.stdout and [each.name for each in tmp_path.iterdir()] == [out.name]
    model = hawk_compile.optimize(demo.model(), head_weights=str(out))
    hawk_compile.restore(model)
    assert len(json.loads(out.read_text())["weights"]) == 8
