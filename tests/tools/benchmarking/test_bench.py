"""`bench` on a profile too small to time: that everything it promises is measured and right, and what it refuses."""

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import hawk_compile
from hawk_compile.capture.features import fresh
from hawk_compile.errors import ConfigError, HawkError, InputError, UnsupportedModelError
from hawk_compile.runtime.tracked import opened
from hawk_compile.tools.benchmarking import commands, prompts, savings, scoring
from hawk_compile.tools.benchmarking import floors as floors_module
from hawk_compile.tools.benchmarking.bench import SHAPES, bench
from hawk_compile.tools.benchmarking.floors import Rates
from hawk_compile.tools.benchmarking.images import picture, pixels
from hawk_compile.tools.benchmarking.measured import Measurement
from hawk_compile.tools.benchmarking.models import load
from hawk_compile.tools.benchmarking.profiles import PROFILES, internvl3_8b, llava_onevision_7b, tiny
from hawk_compile.tools.benchmarking.stages import STAGES
from hawk_compile.tools.benchmarking.subjects import Subjects
from hawk_compile.tools.benchmarking.table import as_json, markdown, over, write
from hawk_compile.tools.benchmarking.timing import Spread, spread
from hawk_compile.tools.cli import app
from hawk_compile.tools.inspection.without_weights import on_meta
from tests import zoo

RATIOS = (0.5, 0.8)
CPU = torch.device("cpu")
SETTINGS = {"ratios": RATIOS, "text": 12, "batch": 2, "layers": 1, "rounds": 2, "backend": "eager"}


def uncompiled(model, runtime, forward, kwargs):
    with opened(kwargs.get("past_key_values")):
        return forward(**kwargs)


@pytest.fixture(scope="module")
def found():
    """Decode steps run uncompiled here, since compiling them takes longer than all else; and what other tests hold is
    not searched at each of many collections."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floors_module, "COPIED", {"cpu": 2**16})
        patch.setattr(floors_module, "SIDE", {"cpu": 64})
        patch.setattr(Subjects, "compiled_step", lambda self, **given: self.unpruned(**given))
        patch.setattr("hawk_compile.runtime.forward.step", uncompiled)
        yield bench("tiny", tokens=(17, 36), **SETTINGS)
    gc.unfreeze()


def test_every_stage_and_column_is_measured(found):
    assert [size.visual_tokens for size in found.sizes] == [16, 36]
    assert (found.layers, found.all_layers) == (1, 2)
    for visual in (16, 36):
        assert found.of(visual, "vision", "eager") and found.of(visual, "vision", "compiled")
        for stage in ("prefill", "first", "decode"):
            whole, short = (("eager", [None]), ("compiled", [None])), (("short", RATIOS),) * (stage == "prefill")
            for column, ratios in (*whole, *short, ("authors", RATIOS), ("hawk", RATIOS)):
                for ratio in ratios:
                    each = found.of(visual, stage, column, ratio)
                    assert each and len(each.seconds) == 2 and min(each.seconds) > 0 and each.first_call > 0
        assert all(found.of(visual, "scoring", name, ratio) for name in ("authors", "hawk") for ratio in RATIOS)
    assert len(found.measurements) == 2 * (2 + 4 + 3 * 6 + 2)


def test_a_cache_holds_what_is_kept(found):
    per_token = 2 * 2 * 64 * 4  # keys and values, two rows, one KV head of 64, fp32
    assert found.of(36, "prefill", "eager").cache_bytes == (36 + 12) * per_token
    for column in ("short", "authors", "hawk"):
        assert found.of(36, "prefill", column, 0.8).cache_bytes == (8 + 12) * per_token


def test_one_compilation_serves_all_sizes(found):
    assert len(found.shapes) == 2 + SHAPES
    assert len({(shape.visual_tokens, shape.prompt_tokens) for shape in found.shapes}) == 2 + SHAPES
    assert found.shapes[1].compilations <= 2
    assert {shape.compilations for shape in found.shapes[1:]} == {found.shapes[1].compilations}


def test_floors_are_those_worked_out_by_hand(found):
    """Two rows of 16 + 12 tokens, one layer: width 128, 2 heads and 1 KV head of 64, 512 in the middle, 1,024 words."""
    floor = found.sizes[0].floors[0]

    def work(length):
        linear = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 512
        return 2 * 2 * (length * linear + 2 * 2 * 64 * length**2 + 128 * 1024)

    assert (floor.ratio, floor.prompt_tokens, floor.kept_tokens) == (0.5, 28, 20)
    assert (floor.flops, floor.kept_flops) == (work(28), work(20))
    attention, kept_attention = (2 * 2 * 2 * 2 * 64 * length**2 for length in (28, 20))
    least = work(20) - kept_attention / 2 + floor.scoring_flops
    assert (floor.attention_flops, floor.kept_attention_flops) == (attention, kept_attention)
    assert floor.causal_flop_ratio == least / (work(28) - attention / 2)
    assert floor.scoring_flops == 2 * 2 * (2 * 128 * 2 * 64 + 28 * 128 * 2)
    assert floor.flop_ratio == (work(20) + floor.scoring_flops) / work(28)
    assert floor.scoring_bytes == 4 * (2 * (28 + 2 * 20) * 128 + 3 * 64 * 128)
    layer = 128 * 128 + 128 + 2 * (128 * 64 + 64) + 128 * 128 + 3 * 128 * 512 + 2 * 128
    assert floor.kept_decode_bytes == 4 * (layer + 128 * 1024 + 2 * 2 * 64 * 20)
    rates = Rates(bandwidth=1e9, matmul=1e12)
    assert floor.seconds("prefill", rates) == least / 1e12
    assert floor.seconds("scoring", rates) == floor.scoring_bytes / 1e9
    assert floor.seconds("decode", rates) == floor.kept_decode_bytes / 1e9
    assert floor.seconds("first", rates) is None


def test_what_is_written_holds_every_number(found, tmp_path):
    written = write(found, tmp_path)
    assert [path.name for path in written] == ["bench.md", "bench.json", "bench.png"]
    held = json.loads(written[1].read_text())
    for name in ("machine", "versions", "command", "date", "settings", "rates", "sizes", "shapes", "notes"):
        assert held[name], name
    assert held["versions"]["torch"] and held["command"].startswith("hawk_compile.bench(")
    assert len(held["measurements"]) == len(found.measurements)
    first = held["measurements"][0]
    assert first["median_seconds"] == pytest.approx(sum(first["seconds"]) / 2) and first["iqr_seconds"] >= 0
    assert held["sizes"][0]["floors"][0]["flop_ratio"] == found.sizes[0].floors[0].flop_ratio
    text = markdown(found)
    assert "CUT to the first 1 of 2 layers" in text and "17 visual tokens: no image gives so many" in text
    assert "Compilations of the pruned prefill: 1 for 12 prompt and image sizes" in text
    assert text.count("| prefill |") == text.count("| decode step |") == text.count("| first token |") == 4


def test_savings_are_those_worked_out_by_hand(found):
    taken = [
        Measurement(16, stage, column, ratio, (seconds,) * 2, 0.0, held)
        for stage, column, ratio, seconds, held in (
            ("first", "compiled", None, 10.0, None), ("first", "hawk", 0.5, 6.0, None),
            ("vision", "compiled", None, 2.0, None), ("scoring", "hawk", 0.5, 0.3, None),
            ("prefill", "compiled", None, 7.0, 100), ("prefill", "hawk", 0.5, 3.0, 25),
            ("decode", "compiled", None, 1.0, None), ("decode", "hawk", 0.5, 0.75, None),
        )
    ]  # fmt: skip
    times = ("16", "0.5", "40.0 %"), ("10000.0", "6000.0")
    whole = [(*times[0], "25.0 %", "75.0 %", *times[1], "33.3 %", "50.0 %", "5.0 %", "16.7 %")]
    assert savings.rows(replace(found, measurements=taken)) == whole
    assert savings.rows(replace(found, measurements=taken[:2])) == [(*times[0], "", "", *times[1], "", "", "", "")]
    assert savings.rows(replace(found, measurements=taken[1:])) == []


def test_ratios_are_taken_round_by_round():
    assert spread([4.0, 1.0, 2.0, 3.0]) == Spread(2.5, 1.5)
    made = [Measurement(16, "prefill", name, None, times, 0.0)
            for name, times in (("hawk", (1.0, 30.0, 2.0)), ("compiled", (2.0, 10.0, 8.0)))]  # fmt: skip
    assert over(*made) == Spread(0.5, 1.375)
    assert over(None, made[0]) is None


def test_scoring_by_itself_makes_no_more_than_the_first_layer():
    model, total = load("qwen3-vl-4b", CPU, torch.float32, 1, True)
    held = sum(each.numel() for each in model.parameters() if each.device == CPU)
    assert total == 36 and held < 30e6  # of 4,437 million
    layer = scoring.first_layer(model)
    image = picture(model.config, 12)
    prompt = prompts.make(model, image, 9, 2, CPU)
    chosen = scoring.selection(model, prompt, 5)
    hidden = torch.randn(2, prompt.length, 2560)
    with torch.no_grad():
        expected = scoring.authors_keep(layer, chosen, hidden)
        keep, rows = scoring.hawk(
            layer, hidden, chosen.visual, chosen.question_mask, chosen.weights, chosen.budget, chosen.length
        )  # fmt: skip
    assert keep.tolist() == expected.tolist()
    torch.testing.assert_close(rows, scoring.take(hidden, expected))


@pytest.mark.parametrize("name", ["qwen3_vl", pytest.param("llava_onevision", marks=pytest.mark.slow)])
def test_the_method_by_hand_is_the_optimised_model(name, monkeypatch):
    """Two rows; positions that hold images and positions that do not; features for later layers. And wrong logits."""
    model = zoo.build(name, layers=1)
    subjects = Subjects(model, hawk_compile.HawkConfig(backend="eager", compile_vision=True))
    monkeypatch.setattr(subjects, "compiled", lambda given: subjects.plain(**fresh(given)))
    prompt = prompts.make(model, picture(model.config, 16), 14, 2, CPU)
    kept = hawk_compile.HawkConfig(ratio=0.6).kept(prompt.image.tokens)
    with torch.no_grad():
        expected = subjects.authors(prompt, prompt.whole, kept).logits
        actual = subjects.optimized(0.6)(**prompt.whole).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        report = hawk_compile.report(subjects.model)
        assert report.visual_tokens.tolist() == [prompt.image.tokens] * 2
        assert report.kept_visual_tokens.tolist() == [kept] * 2
        given = prompts.encode(subjects.plain, prompt)
        subjects.check(prompt, given, [0.6])
        monkeypatch.setattr(scoring, "take", lambda hidden, keep: hidden[:, : keep.shape[1]])
        with pytest.raises(HawkError, match=r"nothing is timed: with 0\.6 of \d+ visual tokens"):
            subjects.check(prompt, given, [0.6])


@pytest.mark.parametrize(
    ("name", "asked", "given"),
    [
        ("small", 576, 576), ("qwen2.5-vl-7b", 1301, 1300), ("internvl3-8b", 4096, 3328),
        ("llava-onevision-7b", 2048, 2052),
    ],
)  # fmt: skip
def test_an_image_gives_the_nearest_number_of_tokens(name, asked, given):
    assert picture(PROFILES[name](), asked).tokens == given


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "small"])
def test_a_profile_has_the_size_of_its_model(name):
    millions = {"light": 25.6, "tiny": 0.8, "qwen2.5-vl-3b": 3754.6, "qwen2.5-vl-7b": 8292.2, "qwen3-vl-4b": 4437.8,
                "internvl3-8b": 7944.4, "llava-onevision-7b": 8029.9}  # fmt: skip
    held = sum(parameter.numel() for parameter in on_meta(PROFILES[name]()).parameters())
    assert round(held / 1e6, 1) == millions[name]


def test_tiles_are_laid_as_the_processor_lays_them():
    tiles = pixels(internvl3_8b(), picture(internvl3_8b(), 768), 2)
    assert tiles["pixel_values"].shape == (6, 3, 448, 448)
    config = llava_onevision_7b()
    image = picture(config, 1485)
    assert image.tokens == 729 + 27 * 28 and pixels(config, image, 1)["pixel_values"].shape == (1, 2, 3, 384, 384)


def test_what_does_not_fit_is_skipped_and_named(monkeypatch, found):
    def too_large(subjects, prompt, given, ratios):
        if prompt.image.tokens == 36:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return STAGES["vision"](subjects, prompt, given, ratios)

    site = SimpleNamespace(form="folded", width=128, heads=2, kv_heads=1, head_dim=64, layers=1)
    monkeypatch.setattr("hawk_compile.tools.benchmarking.bench.inspect_model", lambda *_, **__: site)
    monkeypatch.setattr("hawk_compile.tools.benchmarking.bench.measure_rates", lambda *_: found.rates)
    monkeypatch.setitem(STAGES, "scoring", too_large)
    told = []
    made = bench("tiny", tokens=(36, 16), **SETTINGS, stages=["scoring", "vision"], progress=told.append)
    assert [(now.done, now.text) for now in told[2:]] == [
        (0, "36 visual tokens: vision"), (1, "36 visual tokens: scoring"), (2, "16 visual tokens: vision"),
        (3, "16 visual tokens: scoring"), (4, ""),
    ]  # fmt: skip
    assert made.notes == ["36 visual tokens, scoring: skipped, out of memory on cpu"]
    assert [(each.visual_tokens, each.stage) for each in made.measurements] == [
        (36, "vision"), (36, "vision"), (16, "vision"), (16, "vision"), (16, "scoring"), (16, "scoring"),
    ]  # fmt: skip
    assert made.sizes[1].floors == found.sizes[0].floors
    as_json(made)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"source": "qwen9"}, InputError, "config must be one of small, .*got 'qwen9'"),
        ({"ratios": (0.5, 1.0)}, ConfigError, r"each of ratios is the fraction .* \[0, 1\), got 1\.0"),
        ({"ratios": (0.5, 0.5)}, ConfigError, "ratios must be one or several different values"),
        ({"tokens": ()}, ConfigError, "tokens must be one or several different values"),
        ({"tokens": (1,)}, InputError, "tokens must be at least 2, got 1"),
        ({"text": 3}, InputError, "text must be at least 8 tokens, got 3"),
        ({"layers": 0}, InputError, "layers must be at least 1, got 0"),
        ({"stages": ("scores",)}, ConfigError, "stages must be one of vision, .*got 'scores'"),
        ({"device": "meta"}, InputError, "device must be cpu or cuda, got 'meta'"),
        ({"min_per_image": 4}, ConfigError, "budget, min_per_image, quota, bucket and normalize_per must be left out"),
        ({"ratio": 0.5}, ConfigError, "ratio must be left out here, got 0.5: give ratios"),
        ({"dtype": "int8"}, InputError, "dtype must be one of fp32, fp16, bf16, got 'int8'"),
    ],
)  # fmt: skip
def test_refused_by_name(given, kind, message):
    with pytest.raises(kind, match=message):
        bench(**{"source": "tiny", "backend": "eager", **given})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(InputError, match=r"device must be one that torch has here, .*got 'cuda'"):
        bench("tiny", device="cuda")


def test_a_model_of_unknown_images_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"bench makes images for qwen2_vl, .* this model is gemma3"):
        bench(zoo.build("gemma3", layers=1).config, backend="eager")


def test_the_command_line_refuses_in_one_line(tmp_path):
    for arguments, message in (
        ([str(tmp_path)], "checkpoint must be a folder with a config.json"),
        ([str(tmp_path), "--config", "tiny"], "give a checkpoint or a config, got both"),
        (["--config", "tiny", "--tokens", "many"], "tokens must be whole numbers"),
        (["--config", "tiny", "--ratios", "1.5"], "each of --ratios is the fraction of visual tokens removed"),
    ):
        result = CliRunner().invoke(app, ["bench", *arguments])
        assert result.exit_code == 2 and result.stderr.startswith("error: ") and message in result.stderr


def test_a_checkpoint_is_read_and_cut(tmp_path):
    zoo.build("qwen2_5_vl", layers=2).save_pretrained(tmp_path)
    model, total = load(tmp_path, CPU, torch.float32, 1, False)
    assert (total, len(model.get_decoder().layers), model.config.get_text_config().num_hidden_layers) == (2, 1, 1)
    assert tiny().get_text_config().num_hidden_layers == 2


def test_the_command_line_prints_what_was_measured(found, monkeypatch, tmp_path):
    asked = {}
    measured = replace(commands.COMMAND, bench=lambda *a, **k: asked.update(k, source=a) or found)
    monkeypatch.setattr(commands, "COMMAND", measured)
    arguments = ["--config", "tiny", "--tokens", "17,36", "--stages", "prefill,first", "--layers", "1"]
    result = CliRunner().invoke(app, ["bench", *arguments, "--out", str(tmp_path)], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert asked["source"] == ("tiny",) and asked["tokens"] == [17, 36] and asked["stages"] == ["prefill", "first"]
    assert asked["layers"] == 1 and asked["ratios"] == [0.5, 0.8, 0.9]
    for expected in ("HAWK's own share", "pruned / compiled", "28 -> 20", "Vision encoder", "CUT", "bench.json"):
        assert expected in result.stdout
    assert "| ---: |" in CliRunner().invoke(app, ["bench", "--markdown"]).stdout
