"""lmms-eval runs an optimised model on a task of its own kind, from a YAML file, and counts what `evaluate` counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hawk_compile
from hawk_compile import selectors
from hawk_compile.errors import ConfigError, InputError, UnsupportedCallError
from hawk_compile.tools.evaluation.samples import read_samples
from tests.exporting import demo

pytest.importorskip("lmms_eval", reason="lmms-eval brings 80 packages, one in a version that the executorch extra "
                    "excludes: pip install lmms-eval in an environment of its own")  # fmt: skip

from hawk_compile.tools.evaluation import lmms

TASK = """
task: scenes
dataset_path: json
dataset_kwargs:
  data_files: {test: FOLDER/data.jsonl}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 2, temperature: 0, do_sample: false, until: ["\\n"]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
UTILS = "from PIL import Image\n\ndef pictures(doc):\n    return [Image.open(doc['image'])]\n"


def test_a_task_counts_what_evaluate_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth token kept, of whatever is asked: some answers are wrong, and those are the same."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    records = []
    for number, sample in enumerate(read_samples("demo:tune", limit=12)):
        sample.images[0].save(tmp_path / f"{number}.png")
        path = str(tmp_path / f"{number}.png")
        records.append({"image": path, "question": sample.question, "answer": sample.answers[0]})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "scenes.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    (tmp_path / "tasks" / "utils.py").write_text(UTILS)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    settings = {"selector": "stride", "backend": "eager"}
    found: Any = simple_evaluate(
        model="hawk", model_args=f"pretrained={demo.FOLDER},ratio=0.9,selector=stride,backend=eager", batch_size=4,
        tasks=["scenes"], task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        log_samples=True,
    )  # fmt: skip
    wanted = hawk_compile.evaluate(
        demo.model(), demo.processor(), records, ratios=[0.9], selectors={"hawk": settings}, batch=4, max_new_tokens=2
    )
    scores = wanted.row("hawk", 0.9).scores
    assert 0 < scores.mean() < 1
    assert found["results"]["scenes"]["exact_match,none"] == pytest.approx(scores.mean())
    answered = {each["doc_id"]: each["exact_match"] for each in found["samples"]["scenes"]}
    assert [answered[number] for number in range(12)] == scores.tolist()


def asked(*visuals: Any, text: str = "color 6", **settings: Any) -> Any:
    """A request as lmms-eval makes it."""
    return SimpleNamespace(args=(text, settings, lambda doc: list(visuals), 0, "scenes", "test"))


@pytest.fixture(scope="module")
def model() -> lmms.Hawk:
    made = lmms.Hawk(demo.FOLDER, ratio=0.8, selector="qapruner", selector_options='{"bits": 8}', backend="eager")
    made.task_dict = {"scenes": {"test": [{}]}}
    return made


def test_settings_of_tasks(model: lmms.Hawk) -> None:
    """Texts that end an answer, marks of pictures, prompts without any, and what `generate` is given."""
    config = model.model.__dict__["_hawk_runtime"].config
    assert (config.ratio, config.selector) == (0.8, selectors.QAPruner(bits=8))
    sample = read_samples("demo:tune", limit=1)[0]
    picture = sample.pictures()[0]
    plain, marked, cut_short, _ = model.generate_until([
        asked(picture, text=sample.question, max_new_tokens=2),
        asked(picture, text=f"<image>\n{sample.question}", max_new_tokens=2),
        asked(picture, text=sample.question, max_new_tokens=2, until=[sample.answers[0][1:]]),
        asked(text="color 6", max_new_tokens=2),
    ])  # fmt: skip
    assert plain == marked == sample.answers[0] and cut_short == sample.answers[0][0]
    for given, expected in (
        ({}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0, "do_sample": True}, {"max_new_tokens": 1024, "do_sample": False, "temperature": None}),
        ({"temperature": 0.5, "max_new_tokens": 3}, {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5}),
    ):
        made, until = model.generation(given)
        held = {name: each for name, each in made.items() if name in expected or each is not None}
        assert until == [] and held == expected


def test_refusals(model: lmms.Hawk, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedCallError, match="of type generate_until, got loglikelihood"):
        model.loglikelihood([])
    with pytest.raises(UnsupportedCallError, match="got generate_until_multi_round"):
        model.generate_until_multi_round([])
    with pytest.raises(InputError, match=r"task scenes, document 0: hawk takes pictures .* not video .* got str"):
        model.generate_until([asked("film.mp4")])
    with pytest.raises(UnsupportedCallError, match=r"generation_kwargs must be of .*, got visual_cot"):
        model.generate_until([asked(visual_cot=True)])
    for settings, match in (
        ({"batch_size": "auto"}, "batch_size must be a whole number of at least 1, got 'auto'"),
        ({"max_batch_size": 64}, "max_batch_size must be left out, got 64"),
        ({"rato": 0.5}, "unknown setting rato"),
        ({"selector_options": "bits=8"}, "selector_options must be a JSON object"),
    ):
        with pytest.raises(ConfigError, match=match):
            lmms.Hawk(demo.FOLDER, **settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE must be 1, got 2: start lmms-eval as one process"):
        lmms.Hawk(demo.FOLDER)
