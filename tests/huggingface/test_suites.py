"""transformers' own tests on optimised models, where these tests are at hand, and how they are run and compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import __version__

from tests.huggingface.suites import (
    MODELS,
    VARIABLE,
    Cause,
    Compared,
    Outcome,
    compare,
    known_causes,
    missing,
    run,
    table,
)
from tests.messages import texts

ARCHITECTURE = Path(__file__).parents[1] / "architectures/llava.json"
TESTS = f"""
import unittest
from pathlib import Path
from hawk_compile.tools.survey.tiny import build, prompt, read

TINY = read(Path({str(ARCHITECTURE)!r}))

class TinyTest(unittest.TestCase):
    has_attentions = True

    def setUp(self):
        self.model = build(TINY).eval()
        self.inputs = prompt(TINY, rows=1)

    def test_forward(self):
        self.model(**self.inputs)

    def test_loss(self):
        self.model(**self.inputs, labels=self.inputs["input_ids"])

    def test_leaves_the_class_its_forward(self):
        assert "forward" not in vars(self.model)

    def test_parts(self):
        with self.subTest("part"):
            self.fail("plain too")

    def test_pipeline(self):
        self.fail("not chosen")
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("model", MODELS)
def test_fails_only_by_known_causes(model: str, tmp_path: Path) -> None:
    compared = compare(run(model, None, tmp_path), run(model, 0.0, tmp_path), known_causes())
    assert compared.prefilled > 10 and not compared.unknown, table({model: compared})


def test_compares_by_test() -> None:
    plain = {name: Outcome("passed", "", 0) for name in ("A::good", "A::loss", "A::bad", "A::skips", "A::lost")}
    plain |= {"A::never": Outcome("failed", "TypeError: x", 0)}
    wrapped = {
        "A::good": Outcome("passed", "", 2), "A::loss": Outcome("failed", "ours.Refused: labels (file.py:3)", 1),
        "A::bad": Outcome("failed", "IndexError: 3", 1), "A::skips": Outcome("skipped", "", 0),
        "A::never": Outcome("failed", "ours.Refused: labels", 0),
    }  # fmt: skip
    compared = compare(plain, wrapped, [Cause("loss", "Refused: labels", "no loss"), Cause("good|loss", "Index", "no")])
    unknown = {"A::bad": "IndexError: 3", "A::skips": "it was skipped", "A::lost": "it was not run"}
    assert compared == Compared(5, 1, 1, {"no loss": ["A::loss"]}, unknown)
    lines = table({"tiny": compared}).splitlines()
    assert lines[2] == "| tiny | 5 | 1 | 1 | 1 | 3 |" and "- 1 x no loss: loss" in lines
    assert "- UNKNOWN tiny A::bad: IndexError: 3" in lines


def test_no_cause_explains_a_crash() -> None:
    crash = "RuntimeError: index_select(): self indexing axis dim should be positive (graph_module.py:505)"
    for cause in known_causes(0.5):
        assert cause.cause and not cause.explains("test_batching_equivalence_loss_assisted_decoding", crash)
    numbers = "AssertionError: Tensor-likes are not close!"
    assert not any(cause.explains("test_loss", numbers) for cause in known_causes())
    assert any(cause.explains("test_loss", numbers) for cause in known_causes(0.5))


def test_every_cause_is_of_tests_that_it_names() -> None:
    """And quotes an error that the package still raises, where it quotes one of ours."""
    causes = known_causes()
    assert causes and all(cause.test and cause.error for cause in causes)
    quoted = [cause.error.partition("Error: ")[2] for cause in causes]
    ours = [text.removeprefix(".*").strip() for text in quoted if text]
    assert len(ours) > 2 and [text for text in ours if not any(text in each for each in texts())] == []


def test_why_the_tests_are_not_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert f"{VARIABLE} is not set" in missing()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert "holds no tests/models" in missing()
    checkout(tmp_path, "5.0.0")
    assert f"is 5.0.0, and transformers {__version__} is installed" in missing()
    checkout(tmp_path, __version__)
    assert missing() == ""


def checkout(folder: Path, version: str) -> None:
    """What stands for a checkout of transformers' repository."""
    for name, text in (("src/transformers/__init__.py", f'__version__ = "{version}"\n'),
                       ("tests/models/tiny/test_modeling_tiny.py", TESTS)):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.slow
def test_runs_a_models_tests_plain_and_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout(tmp_path, __version__)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    plain, wrapped = run("tiny", None, tmp_path), run("tiny", 0.5, tmp_path)
    names = ("forward", "leaves_the_class_its_forward", "loss", "parts")
    assert [*plain] == [*wrapped] == [f"TinyTest::test_{name}" for name in names]
    assert [outcome.outcome for outcome in plain.values()] == ["passed", "passed", "passed", "failed"]
    assert [outcome.prefills for outcome in wrapped.values()] == [2, 1, 2, 1]  # `build` tries the model with one
    assert "AssertionError: plain too" in plain["TinyTest::test_parts"].error
    compared = compare(plain, wrapped, known_causes())
    assert (compared.plain, compared.wrapped, compared.prefilled) == (3, 1, 1)
    assert sum(map(len, compared.known.values())) == 1
    assert "AssertionError: assert 'forward' not in" in compared.unknown["TinyTest::test_leaves_the_class_its_forward"]
    with pytest.raises(FileNotFoundError, match="has no tests of other"):
        run("other", None, tmp_path)
