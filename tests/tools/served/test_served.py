"""`bench --engine vllm` without vLLM: what is refused, what is asked of an engine, and the tables; the engine is a fake
one. tests/serving/test_vllm_bench.py has the real one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner

from hawk_compile.errors import ConfigError, HawkError, InputError
from hawk_compile.settings.config import HawkConfig
from hawk_compile.tools.benchmarking.profiles import PROFILES
from hawk_compile.tools.benchmarking.table import as_markdown
from hawk_compile.tools.cli import app
from hawk_compile.tools.served import bench as module
from hawk_compile.tools.served.bench import bench_served
from hawk_compile.tools.served.checkpoint import write_random
from hawk_compile.tools.served.measured import Answer, Served, Together
from hawk_compile.tools.served.prompts import Maker, Turns
from hawk_compile.tools.served.table import head, tables

VISUAL, TEXT, BLOCK = 36, 20, 16
SMALL: dict[str, Any] = {"ratios": (0.5, 0.8), "tokens": (VISUAL,), "text": 8, "rounds": 2, "requests": 3, "answer": 4}


class FakeEngine:
    """Prunes by what `HawkConfig` keeps; of a `question` that it has seen about a picture it caches all."""

    started: ClassVar[list[tuple[dict[str, Any] | None, dict[str, Any]]]] = []
    keeps: Any = staticmethod(lambda ratio: HawkConfig(ratio=ratio).kept(VISUAL))

    def __init__(self, folder: Path, hawk: dict[str, Any] | None, dtype: str, options: dict[str, Any]) -> None:
        assert (folder / "config.json").is_file()
        self.started.append((hawk, options))
        self.block_size = BLOCK
        self.seen: set[Any] = set()

    def ask(self, turns: Turns, ratio: float) -> Answer:
        kept = self.keeps(ratio) if ratio else VISUAL
        key = (str(turns.data)[:80], ratio, ratio and turns.texts[0])
        cached = BLOCK if key in self.seen else 0
        self.seen.add(key)
        prompt = TEXT + kept
        return Answer(0.1 + prompt / 1000, 0.1, prompt, kept, cached, -(-prompt // BLOCK))

    def ask_together(self, requests: Sequence[Turns], ratio: float, tokens: int) -> Together:
        assert len({turns.texts for turns in requests}) == len(requests)
        kept = self.keeps(ratio) if ratio else VISUAL
        return Together(kept / 100, len(requests) * tokens, len(requests) * kept)

    def close(self) -> None:
        self.seen.clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(FakeEngine, "started", [])
    monkeypatch.setattr(module, "Engine", FakeEngine)
    monkeypatch.setattr(module, "check_installed", lambda: None)
    monkeypatch.setattr(module, "prunes_videos", lambda architecture: True)
    return FakeEngine


@pytest.fixture
def found(fake: type[FakeEngine]) -> Served:
    return bench_served("tiny", command="hawk-compile bench", options={"block_size": BLOCK}, **SMALL)


def test_three_engines_and_what_each_is_asked(found: Served, fake: type[FakeEngine]) -> None:
    """The first round of each line is not counted; `prefixes` and `video` take the middle ratio."""
    hawk, free, evs = fake.started
    assert hawk == ({"ratio": 0.8}, {"block_size": BLOCK})
    assert free == ({"ratio": 0.8, "selector": "divprune"}, {"block_size": BLOCK})
    assert evs == (None, {"block_size": BLOCK, "video_pruning_rate": 0.8})
    assert [(line.method, line.subject, line.ratio) for line in found.lines] == [
        *(("hawk", "picture", ratio) for ratio in (0, 0.5, 0.8)),
        *((method, subject, ratio) for method in ("hawk",) for ratio in (0, 0.8)
          for subject in ("picture", "another question", "next turn")),
        ("hawk", "picture", 0), ("hawk", "video", 0), ("hawk", "video", 0.8),
        *(("divprune", subject, ratio) for ratio in (0, 0.8)
          for subject in ("picture", "another question", "next turn")),
        ("EVS", "picture", 0), ("EVS", "video", 0.8),
    ]  # fmt: skip
    assert {len(line.answers) for line in found.lines} == {2}
    assert [len(line.together) for line in found.lines] == [2] * 3 + [0] * (len(found.lines) - 3)


def test_the_tables(found: Served, tmp_path: Path) -> None:
    """Every row has every column, and says what was measured."""
    shown = tables(found)
    assert [len(rows) for _, _, rows in shown] == [3, 12, 5]
    for _, headings, rows in shown:
        assert all(len(row) == len(headings) and all(row) for row in rows)
    ratios = [dict(zip(shown[0][1], row, strict=True)) for row in shown[0][2]]
    assert [row["prompt tokens"] for row in ratios] == ["56", "38", "28"]
    assert [row["KV blocks"] for row in ratios] == ["4", "3", "2"]
    assert [row["without encoder"] for row in ratios] == ["1.000 (0.000)", "0.679 (0.000)", "0.500 (0.000)"]
    assert [row["throughput / unpruned"] for row in ratios] == ["1.000 (0.000)", "2.000 (0.000)", "4.500 (0.000)"]
    prefixes = [dict(zip(shown[1][1], row, strict=True)) for row in shown[1][2]]
    assert [row["from the cache"] for row in prefixes[:6]] == ["0", "16", "16", "0", "0", "16"]
    above = head(found)
    assert "vLLM" in above[0] and "`hawk-compile bench`" in above
    text = as_markdown(above, shown)
    assert [path.name for path in found.write(tmp_path, text)] == ["bench.md", "bench.json"]
    assert json.loads((tmp_path / "bench.json").read_text())["lines"] == [
        dataclasses.asdict(line) for line in found.lines
    ]


def test_an_engine_that_does_not_prune_gives_no_table(fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "keeps", staticmethod(lambda ratio: VISUAL))
    with pytest.raises(
        HawkError, match=r"with 0.5 of 36 visual tokens removed a prompt must have 38 tokens, and .* 56"
    ):
        bench_served("tiny", stages=["ratios"], **SMALL)


def test_a_selector_without_text_needs_no_second_engine(fake: type[FakeEngine]) -> None:
    bench_served("tiny", stages=["prefixes"], hawk={"selector": "norm"}, **SMALL)
    assert [hawk for hawk, _ in fake.started] == [{"ratio": 0.8, "selector": "norm"}]


@pytest.mark.parametrize(("settings", "note"), [({}, "does not prune those of Qwen2_5_VL"), (
    {"modalities": ["image"]}, "modalities are image",
)])  # fmt: skip
def test_videos_that_are_left_out_are_noted(
    settings: dict[str, Any], note: str, fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "prunes_videos", lambda architecture: bool(settings))
    made = bench_served("tiny", stages=["video"], hawk=settings, **SMALL)
    assert not made.lines and note in made.notes[0] and len(fake.started) == 1
    assert not tables(made) and any(note in line for line in head(made))


@pytest.mark.parametrize(("given", "message"), [
    ({"ratios": (0.0, 0.5)}, "ratios must remove something"),
    ({"ratios": (80.0,)}, "to remove 80 %, give 0.8"),
    ({"stages": ["video", "video"]}, "stages must be one or several different values"),
    ({"stages": ["prefill"]}, "stages must be one of ratios, prefixes, video"),
    ({"answer": 1}, "answer must be at least 2"),
    ({"hawk": {"quota": "image"}}, "quota cannot be set for a server"),
    ({"source": "qwen3-vl-4b"}, "take small, light, tiny or a qwen2.5-vl profile"),
    ({"source": "large"}, "config must be one of small"),
])  # fmt: skip
def test_what_cannot_be_measured(given: dict[str, Any], message: str, fake: type[FakeEngine]) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        bench_served(**{"source": "tiny", **SMALL, **given})
    assert not fake.started


@pytest.mark.parametrize(("arguments", "message"), [
    (["--engine", "vlm"], "did you mean 'vllm'?"),
    (["--requests", "4"], "--requests is for engine vllm, and engine is torch"),
    (["--vllm", "block_size=32"], "--vllm is for engine vllm"),
    (["--engine", "vllm", "--backend", "eager"], "--backend is for engine torch, and engine is vllm"),
    (["--engine", "vllm", "--vllm", "block_size"], "vllm must be NAME=VALUE"),
    (["--engine", "vllm", "--config", "tiny", "no-such-folder"], "give a checkpoint or a config, got both"),
    (["--engine", "vllm", "--set", "rounds=3"], "hawk has no setting 'rounds'"),
    (["--engine", "vllm"], "engine vllm needs vLLM"),
])  # fmt: skip
def test_the_command_line_refuses(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawk_compile.tools.served.engine.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_the_command_line_prints_tables(fake: type[FakeEngine], tmp_path: Path) -> None:
    given = ["--tokens", str(VISUAL), "--rounds", "1", "--requests", "2", "--ratios", "0.5", "--vllm", "block_size=16"]
    result = CliRunner().invoke(app, ["bench", "--engine", "vllm", "--config", "tiny", *given, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "without encoder" in result.stdout and "from the cache" in result.stdout and "EVS" in result.stdout
    assert fake.started[0] == ({"ratio": 0.5}, {"block_size": 16}) and (tmp_path / "bench.json").is_file()


def test_a_random_checkpoint_is_whole(tmp_path: Path) -> None:
    """A picture has as many visual tokens as were asked for, and a prompt no unknown word; the model takes both. Its
    processor as a whole needs torchvision, and is tried in the engine."""
    folder = write_random("tiny", tmp_path / "tiny", torch.float32, 200)
    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    make = Maker(model.config, 64, 8, seed=0)
    picture, film = make.image(), make.film()
    pixels = AutoImageProcessor.from_pretrained(folder)(images=picture.data["image"], return_tensors="pt")
    assert pixels["image_grid_thw"].prod() == 4 * 64
    text = picture.rendered(words).replace("<|image_pad|>", "<|image_pad|>" * 64)
    ids = words(text, return_tensors="pt")["input_ids"]
    assert int((ids == model.config.image_token_id).sum()) == 64 and words.unk_token_id not in ids
    assert torch.isfinite(model(input_ids=ids, **pixels).logits).all()
    ((frames, known),) = film.data["video"]
    assert len(frames) == known["total_num_frames"] == 16 and frames[0].shape == (84, 84, 3)
    assert words(film.rendered(words))["input_ids"].count(model.config.video_token_id) == 1


def test_pictures_come_once() -> None:
    config = PROFILES["tiny"]()
    one, again, other = (Maker(config, 16, 8, seed) for seed in (0, 0, 1))
    first = one.image()
    assert first.texts == again.image().texts
    assert first.data["image"].tobytes() not in {
        one.image().data["image"].tobytes(),
        other.image().data["image"].tobytes(),
    }
