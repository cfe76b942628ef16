"""`evaluate` on the shipped model: its answers are those of one question at a time."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hawk_compile
from hawk_compile import selectors
from hawk_compile.errors import ConfigError, InputError
from hawk_compile.settings.selectors import SELECTORS
from hawk_compile.tools.cli import app
from hawk_compile.tools.evaluation.demo import control_rows
from hawk_compile.tools.evaluation.evaluate import evaluate
from hawk_compile.tools.evaluation.methods import methods_of
from hawk_compile.tools.evaluation.samples import read_samples
from hawk_compile.tools.evaluation.scored import Row
from hawk_compile.tools.evaluation.table import as_json, lines, markdown
from tests.encoders import at_each_encoding
from tests.exporting import demo

RATIOS = (0.6, 0.9)


@pytest.fixture(scope="module")
def found():
    model = hawk_compile.optimize(demo.model(), ratio=0.3, backend="eager")
    seen = []
    result = evaluate(
        model, demo.processor(), "demo:tune", ratios=RATIOS, selectors=("hawk", "random", "divprune"), limit=14,
        batch=7, backend="eager", max_new_tokens=2, progress=seen.append,
    )  # fmt: skip
    assert seen[-1] == hawk_compile.Progress(7 * 14, 7 * 14)
    assert model.__dict__["_hawk_runtime"].config.ratio == 0.3  # as it was
    hawk_compile.restore(model)
    return result


def test_scores_are_those_of_single_questions(found):
    model = demo.model()
    for method, ratio in (("hawk", 0.6), ("divprune", 0.9)):
        hawk_compile.optimize(model, ratio=ratio, selector=method, backend="eager")
        alone = [said(model, sample) == sample.answers[0] for sample in found.samples]
        assert found.row(method, ratio).scores.tolist() == alone
    hawk_compile.restore(model)
    assert found.unpruned.scores.tolist() == [said(model, sample) == sample.answers[0] for sample in found.samples]


def said(model, sample):
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    text = demo.processor().apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = demo.processor()(text=[text], images=[sample.pictures()], return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return demo.processor().decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_what_is_counted_and_timed(found):
    assert [(row.method, row.ratio) for row in found.rows] == [
        (name, ratio) for name in ("hawk", "random", "divprune") for ratio in RATIOS
    ]
    for row in found.rows:
        assert row.kept == pytest.approx(found.visual * (1 - row.ratio), abs=1) and row.seconds > 0


def test_controls_of_the_demo(found):
    rows = control_rows(demo.model(), demo.processor(), found)
    hawk_compile.restore(demo.model())
    assert [(row.method.split(",")[0], row.ratio) for row in rows] == [
        (name, ratio) for name in ("hawk", "oracle") for ratio in RATIOS
    ]
    oracle = np.mean([row.scores.mean() for row in rows if row.method == "oracle"])
    assert oracle >= np.mean([row.scores.mean() for row in rows if row.method != "oracle"])


def test_the_table(found):
    text = markdown(found)
    assert "14 questions of demo:tune, exact_match" in text and "| removed | method |" in text
    assert len(text.strip().splitlines()) == 2 + 2 + 1 + 6
    first, *others = lines(found)
    assert first.row is found.unpruned and first.gap is None
    for line in others:
        assert (line.gap is None) == (line.row.method == "hawk")
        if line.gap is not None:
            base = found.row("hawk", line.row.ratio).scores
            assert line.gap.mean == pytest.approx((line.row.scores - base).mean())


def test_verdicts(found):
    """20 of 24 questions won, 20 lost, one lost."""
    base, won = np.repeat([0.0, 1.0], [20, 4]), np.ones(24)
    made = {"hawk": base, "good": won, "bad": np.zeros(24), "like it": np.repeat([0.0, 1.0], [21, 3])}
    for method, verdict in (("good", "better"), ("bad", ""), ("like it", "")):
        rows = [Row(name, 0.5, made[name]) for name in ("hawk", method)]
        assert [line.verdict for line in lines(dataclasses.replace(found, rows=rows)) if line.row.method == method] == [
            verdict
        ]
    rows = [Row("hawk", 0.5, won), Row("worst", 0.5, base)]
    assert [line.verdict for line in lines(dataclasses.replace(found, rows=rows))][1:] == ["", "worse"]
    nothing = dataclasses.replace(found, unpruned=Row("unpruned", 0.0, np.zeros(24)), rows=rows)
    assert as_json(nothing)["rows"][1]["relative"] is None and "| 0.5 | hawk | 1.000 |" in markdown(nothing)


def test_bad_settings():
    model, processor = demo.model(), demo.processor()
    before = model.__dict__.get("_hawk_runtime")
    for settings, message in (
        ({"selectors": ["best"]}, "selector must be one of"),
        ({"ratios": [1.0]}, "each of ratios is the fraction of visual tokens removed"),
        ({"baseline": "dart", "selectors": ["hawk"]}, "baseline must be one of the methods hawk, got 'dart'"),
        ({"metric": "bleu"}, "metric must be one of exact_match, anls, relaxed_accuracy or a function, got 'bleu'"),
        ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"ratios": []}, "ratios must hold at least one fraction"),
        ({"batch_size": 4}, "unknown setting batch_size"),
        ({"ratio": 0.5}, "ratio must be left out here, got 0.5: give ratios"),
        ({"config": hawk_compile.HawkConfig()}, "either a config or single settings, got a config and backend"),
        ({"selectors": {"unpruned": {}}, "baseline": "unpruned"}, 'a method must not be called "unpruned"'),
        ({"selectors": {"hawk": {"ratio": 0.5}}}, "nor set ratio, got 'hawk'"),
        ({"selectors": {"hawk": {"selector": "best"}}}, "selector must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(model, processor, "demo:tune", limit=2, **{"selectors": ["hawk"], "backend": "eager", **settings})
    with pytest.raises(InputError, match=r"tune scene 0: the metric must give a number in \[0, 1\], got nan"):
        evaluate(model, processor, "demo:tune", limit=1, selectors=["hawk"], metric=lambda *_: float("nan"))
    with pytest.raises(InputError, match="limit must be a whole number of at least 1, got 0"):
        evaluate(model, processor, "demo:tune", limit=0, selectors=["hawk"])
    assert model.__dict__.get("_hawk_runtime") is before


def test_methods_are_called_by_their_selectors():
    """Names, objects with options and functions; what fixes the head weights is not given any."""

    def brightest(embeddings, *, power: float = 1.0):
        return embeddings.float().abs().sum(2) ** power

    few = selectors.DART(pivots=1)
    base = hawk_compile.HawkConfig(head_weights=(1.0,), backend="eager")
    made = methods_of(["dart", few, brightest, "uniform"], base)
    assert [*made] == ["dart", "dart(pivots=1)", "brightest", "uniform"]
    assert made["dart(pivots=1)"].method == few and made["brightest"].method.ranking is brightest
    assert [made[name].head_weights for name in ("dart", "uniform")] == [(1.0,), "auto"]
    assert {config.backend for config in made.values()} == {"eager"}
    assert [*methods_of(few, base)] == ["dart(pivots=1)"] and [*methods_of("all", base)] == [*SELECTORS]
    by_hand = methods_of({"mine": {"query": "each"}}, base)["mine"]
    assert (by_hand.query, by_hand.backend, by_hand.selector) == ("each", "eager", "hawk")
    with pytest.raises(ConfigError, match="must have different names, got brightest twice"):
        methods_of([brightest, selectors.Ranking(few.ranking, name="brightest")], base)


def test_what_the_metric_fails_on_is_skipped():
    """The first question of three has no score, after any method: it is left out of all rows."""
    samples, told = read_samples("demo:tune", limit=3), []

    def metric(said, answers):
        return float("nan") if list(answers) == list(samples[0].answers) else 1.0

    left = [each for each in samples if each.answers != samples[0].answers]
    found = evaluate(
        demo.model(), demo.processor(), samples, selectors=["hawk"], ratios=[0.5], metric=metric, backend="eager",
        max_new_tokens=1, skip_bad=True, progress=lambda now: now.text and told.append(now.text),
    )  # fmt: skip
    assert left and found.samples == left and all(len(row.scores) == len(left) for row in found.rows)
    assert told[0] == f"skipped: {samples[0].origin}: the metric gives no number in [0, 1]"
    assert len(told) == 3 - len(left)


def test_questions_of_one_picture_encode_it_once(monkeypatch):
    """One batch after another, those of one batch, and what generate has encoded before; the scores are the same."""
    model, calls = demo.model(), []
    samples = read_samples("demo:tune", limit=2)
    questions = [dataclasses.replace(each, images=samples[0].images) for each in (*samples, samples[0])]
    at_each_encoding(monkeypatch, model, lambda: calls.append(1))
    ask = functools.partial(
        evaluate, model, demo.processor(), questions, selectors=["hawk"], ratios=[0.5], backend="eager",
        max_new_tokens=1, batch=1,
    )  # fmt: skip
    encoded_calls = []
    for settings in ({}, {"image_cache": "32MB"}):
        calls.clear()
        found = ask(**settings)
        encoded_calls.append((len(calls), found.rows[0].scores.tolist()))
    assert [number for number, _ in encoded_calls] == [3, 1] and encoded_calls[0][1] == encoded_calls[1][1]
    hawk_compile.optimize(model, ratio=0.5, backend="eager", image_cache="32MB")
    said(model, questions[0])
    calls.clear()
    ask()
    assert not calls and model.__dict__["_hawk_runtime"].images.use().images == 1
    said(model, questions[1])
    assert not calls
    hawk_compile.restore(model)


def test_the_command_line(tmp_path):
    samples = read_samples("demo:tune", limit=4)
    records = []
    for number, sample in enumerate(samples):
        sample.images[0].save(tmp_path / f"{number}.png")
        records.append({"image": f"{number}.png", "question": sample.question, "answer": sample.answers[0]})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [*records, {"question": "?"}])))
    arguments = ["evaluate", demo.FOLDER, "--data", str(tmp_path / "data.jsonl"), "--ratios", "0.8", "--tokens", "2",
                 "--selectors", "hawk,stride", "--backend", "eager", "--out", str(tmp_path / "out")]  # fmt: skip
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and "line 5: a question needs an image" in refused.stderr
    called = CliRunner().invoke(app, [*arguments, "--skip-bad"], env={"COLUMNS": "200"})
    assert called.exit_code == 0, called.output
    assert "skipped: " in called.stdout and "line 5" in called.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"evaluation.{s}" for s in ("md", "json", "png")}
    held = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert held["rows"][0]["method"] == "unpruned" and len(held["rows"][0]["scores"]) == 4
