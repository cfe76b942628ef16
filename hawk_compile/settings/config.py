"""The settings of an optimised model."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from os import PathLike
from typing import Any

from torch import Tensor

from hawk_compile.errors import ConfigError
from hawk_compile.settings.budgets import Adaptive, is_number
from hawk_compile.settings.closest import meant
from hawk_compile.settings.selector import RankingFunction, Selector
from hawk_compile.settings.selectors import selector_of, warn_of_old_spelling, with_options
from hawk_compile.settings.sizes import bytes_in

NORMALIZATIONS = ("l2", "softmax", "minmax")
BACKENDS = ("inductor", "aot_eager", "eager")
QUOTAS = ("prompt", "image")
QUERIES = ("mean", "last", "each", "content")
QUESTIONS = ("newest", "own")
MODALITIES = ("image", "video", "audio")
MAX_DENOMINATOR = 10**6
"""Ratios are read as the nearest fraction with at most this denominator, so that 0.7 of 10 tokens is 7, not 6."""


@dataclass(frozen=True, eq=False)
class HawkConfig:
    """How visual tokens are scored and how many are removed.

    Attributes:
        ratio: fraction of visual tokens removed from each row, in [0, 1). A row with V visual tokens keeps
            max(1, ceil(V * (1 - ratio))) of them.
        budget: `Adaptive(...)`: each row keeps as few visual tokens as hold a share of its score, at most what `ratio`
            leaves. None: exactly what `ratio` leaves.
        min_per_image: visual tokens that every image (or frame of a video) keeps at least, or all it has. A row keeps
            more than `ratio` leaves if its images need it.
        quota: "prompt": `ratio` is of all visual tokens of a row, for which its images compete; "image": of every
            image (or frame of a video) by itself.
        bucket: a row keeps as many more visual tokens as make its pruned length a multiple of this, or all it has, so
            that a few lengths serve all prompts; 1: exactly what the other settings leave.
        head_weights: importance of each query head of the scoring layer, [H], >= 0, not all 0 (only proportions
            matter). "auto": the weights published for the checkpoint, or those that lie beside it, else equal ones.
            "uniform": equal weights. A path: a JSON or safetensors file. "org/name" or "org/name@revision":
            head_weights.json of that Hugging Face Hub repository. A tensor or a sequence of numbers.
        normalization: how each head's scores are made comparable over a row's visual tokens: "l2" (the paper's
            default), "softmax" or "minmax". None: as the selector has it, "l2" for "hawk".
        normalize_per: over which tokens: "prompt": all visual tokens of a row that one question scores; "image": those
            of every image (or frame of a video) by itself, as a server has it, which sees images one by one.
        modalities: whose tokens may be removed: a tuple of "image", "video" and "audio". Those of several compete for
            one budget; those of others stay whole, and do not vote. "Visual tokens" are those of all asked for.
        selector: how visual tokens are ranked: "hawk" (by its score) or another name, a selector with options such as
            `hawk_compile.selectors.IDPruner(importance=0.3)`, or a ranking function of one's own.
        selector_options: deprecated: options of a selector that `selector` names.
        question: whose text votes: "newest": the newest user's, on all images; "own": every image is scored by the
            text of its own turn, whatever is asked later, which is what a cache of common prefixes needs (with
            `quota="image"` what an image keeps is then fixed, too). A call's own `question_ids` ([B, T] or a list for
            each row: tokens of the prompt) or `question_mask` ([B, S]) go before both.
        processor: the model's processor or tokenizer, whose chat template says where users' texts stand. None: that of
            the model's checkpoint, if it lies on this machine; where there is none, the ids alone say it.
        query: how the question's tokens count: "mean" (their mean query, as in the paper), "last" (the last alone),
            "each" (every token's own normalised scores, alike) or "content" (those by how specific the token's
            attention is); see `hawk_compile.kernels.score.by_token`. None: as the selector has it, "mean" for "hawk".
        backend: what compiles the rewritten graph: "inductor", "aot_eager" or "eager".
        compile_decode: also compile the decode step (one token per row, no pruning in it).
        compile_vision: also compile the vision encoder, as graphs of its own for images of all sizes.
        image_cache: bytes of encoded images and videos that are kept for later calls that hold the same ones: a number,
            or "256MB" and the like. None: nothing is kept.
        vision_end_token_id: id that closes an image in the prompt; text behind the last one of a turn votes. None:
            taken from the model's config, else the text behind the last visual token.
        end_of_turn_token_id: ids that end a turn. None: the generation config's eos_token_id. If given, these ids say
            where users' texts stand unless a `processor` is given too.
    """

    ratio: float = 0.8
    budget: Adaptive | None = None
    min_per_image: int = 0
    quota: str = "prompt"
    bucket: int = 1
    head_weights: "str | PathLike[str] | Tensor | tuple[float, ...]" = "auto"
    normalization: str | None = None
    normalize_per: str = "prompt"
    modalities: tuple[str, ...] = ("image", "video")
    selector: str | Selector | RankingFunction = "hawk"
    selector_options: Mapping[str, Any] = field(default_factory=dict)
    question: str = "newest"
    processor: Any = field(default=None, repr=False)
    query: str | None = None
    backend: str = "inductor"
    compile_decode: bool = False
    compile_vision: bool = False
    image_cache: int | str | None = None
    vision_end_token_id: int | None = None
    end_of_turn_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_budget(self)
        check_bucket(self)
        check_choice("backend", self.backend, BACKENDS)
        if self.normalization is not None:
            check_choice("normalization", self.normalization, NORMALIZATIONS)
        check_choice("normalize_per", self.normalize_per, QUOTAS)
        if self.query is not None:
            check_choice("query", self.query, QUERIES)
        check_modalities(self.modalities)
        check_selector(self)
        check_question(self)
        if self.image_cache is not None:
            bytes_in("image_cache", self.image_cache)
        check_ids("vision_end_token_id", self.vision_end_token_id, several=False)
        check_ids("end_of_turn_token_id", self.end_of_turn_token_id, several=True)
        for name in ("compile_decode", "compile_vision"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")

    @functools.cached_property
    def method(self) -> Selector:
        """The selector that `selector` means."""
        return selector_of(self.selector)

    @property
    def used_query(self) -> str:
        """`query`, or what the selector has for it."""
        return self.query or self.method.query

    @property
    def used_normalization(self) -> str:
        """`normalization`, or what the selector has for it."""
        return self.normalization or self.method.normalization

    @property
    def used_head_weights(self) -> Any:
        """`head_weights`, unless the selector fixes them."""
        return self.method.head_weights or self.head_weights

    @property
    def image_cache_bytes(self) -> int | None:
        """`image_cache` as a number."""
        return None if self.image_cache is None else bytes_in("image_cache", self.image_cache)

    @property
    def per_image(self) -> bool:
        """Whether anything is said of single images."""
        return "image" in (self.quota, self.normalize_per) or self.min_per_image > 0

    def floor(self, count: int) -> int:
        """How many visual tokens an image with `count` of them keeps at least."""
        return max(self.kept(count) if self.quota == "image" else 0, min(self.min_per_image, count))

    def bounds(self, count: int, floor: int = 0, others: int = 0) -> tuple[int, int]:
        """(least, most) visual tokens that a row with `count` of them keeps.

        Args:
            floor: how many its images need.
            others: tokens of the row that stay whatever is removed.
        """
        least = most = 0 if self.quota == "image" else self.kept(count)
        if self.budget is not None:
            least, most = self.budget.bounds(count, most)
        floor = min(floor, count)
        least, most = max(least, floor), max(most, floor)
        more = -(most + others) % self.bucket
        return min(least + more, count), min(most + more, count)

    @functools.cached_property
    def removed(self) -> Fraction:
        """`ratio` as the fraction it was meant to be."""
        return Fraction(self.ratio).limit_denominator(MAX_DENOMINATOR)

    def kept(self, count: int) -> int:
        """How many of `count` visual tokens a row keeps: max(1, ceil(count * (1 - ratio))), and 0 of 0."""
        return max(1, math.ceil(count * (1 - self.removed))) if count else 0


def check_ratio(ratio: Any, argument: str = "ratio is the fraction") -> None:
    rule = f"{argument} of visual tokens removed and must be a number in [0, 1)"
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if not number or not 0 <= ratio < 1:
        percent = number and 1 < ratio < 100
        remedy = f"to remove {ratio:g} %, give {ratio / 100:g}" if percent else "give a number such as 0.8"
        raise ConfigError(f"{rule}, got {ratio!r}; {remedy}")


def check_budget(config: HawkConfig) -> None:
    if config.budget is not None and not isinstance(config.budget, Adaptive):
        raise ConfigError(f"budget must be hawk_compile.Adaptive(...) or None, got {config.budget!r}")
    check_choice("quota", config.quota, QUOTAS)
    fewest = config.min_per_image
    if isinstance(fewest, bool) or not isinstance(fewest, int) or fewest < 0:
        raise ConfigError(f"min_per_image must be a number of visual tokens, an int of at least 0, got {fewest!r}")
    if config.budget is not None and config.quota == "image":
        raise ConfigError(
            'budget finds one number for all images of a row, and quota="image" sets one for each: give one of them, '
            "or budget with min_per_image"
        )


def check_bucket(config: HawkConfig) -> None:
    check_at_least_1("bucket", config.bucket)
    if config.bucket > 1 and config.budget is not None:
        raise ConfigError(
            f"bucket={config.bucket} fixes a row's length before its score is known, and budget finds one by the "
            "score: give one of them"
        )


def check_modalities(modalities: Any) -> None:
    known = isinstance(modalities, tuple) and all(isinstance(name, str) and name in MODALITIES for name in modalities)
    if not known or not modalities or len(set(modalities)) < len(modalities):
        raise ConfigError(
            f"modalities must be a tuple of one or more of {', '.join(MODALITIES)}, each once, got {modalities!r}: for "
            'audio alone give ("audio",)'
        )


def check_selector(config: HawkConfig) -> None:
    method = config.method
    if config.selector_options or not isinstance(config.selector_options, Mapping):
        method = with_options(method, config.selector_options)
        warn_of_old_spelling(
            f"selector_options is deprecated: give selector=selectors.{method!r}, after `from hawk_compile import "
            "selectors`"
        )
        for name, value in (("selector", method), ("selector_options", {}), ("method", method)):
            object.__setattr__(config, name, value)
    if method.head_weights == "uniform" and not (
        isinstance(config.head_weights, str) and config.head_weights in ("auto", "uniform")
    ):
        raise ConfigError(
            f'selector "{method.name}" weights all heads alike: leave head_weights out, or take selector "hawk"'
        )


def check_question(config: HawkConfig) -> None:
    check_choice("question", config.question, QUESTIONS)
    if config.question == "own" and config.method.reads("question_mask"):
        raise ConfigError(
            f'question="own" gives every image a text of its own, and selector "{config.selector}" compares all images '
            'with one: leave question out, or take selector="hawk"'
        )
    if config.processor is not None and not hasattr(config.processor, "apply_chat_template"):
        raise ConfigError(
            f"processor must be a processor or tokenizer of transformers, got {type(config.processor).__name__}: give "
            "what AutoProcessor.from_pretrained returns"
        )


def check_ids(name: str, value: Any, several: bool) -> None:
    ids = value if several and isinstance(value, tuple) else () if value is None else (value,)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
        kind = "an id (int) or a tuple of ids" if several else "an id (int)"
        raise ConfigError(
            f"{name} must be {kind} or None, got {value!r}; tokenizer.convert_tokens_to_ids gives the id of a token"
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{meant(value, choices)}")


def check_at_least_1(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")


def make_config(config: HawkConfig | None, options: dict[str, Any]) -> HawkConfig:
    """A config from a ready one or from single settings, refusing both at once and names that do not exist."""
    if config is not None and not isinstance(config, HawkConfig):
        example = f"ratio={config!r}" if is_number(config) else "ratio=0.8"
        raise ConfigError(
            f"config must be a HawkConfig, got {type(config).__name__}; give single settings by name, as {example}"
        )
    if config is not None and options:
        raise ConfigError(f"give either a config or single settings, got a config and {', '.join(sorted(options))}")
    check_names(options)
    return config if config is not None else HawkConfig(**options)


def changed(config: HawkConfig, settings: Mapping[str, Any]) -> HawkConfig:
    """A config with other values of some settings; a name that does not exist is refused."""
    check_names(settings)
    return replace(config, **settings)


def make_config_of_ratios(config: HawkConfig | None, settings: dict[str, Any], ratios: Any) -> HawkConfig:
    """`make_config` for a call that goes through `ratios`, which stand in the place of the config's own ratio."""
    if "ratio" in settings:
        raise ConfigError(f"ratio must be left out here, got {settings['ratio']!r}: give ratios")
    if not isinstance(ratios, Sequence) or isinstance(ratios, str):
        raise ConfigError(f"ratios must be a sequence of fractions in [0, 1), got {ratios!r}")
    if not ratios:
        raise ConfigError("ratios must hold at least one fraction in [0, 1), got none")
    for ratio in ratios:
        check_ratio(ratio, "each of ratios is the fraction")
    return make_config(config, settings)


def check_names(settings: Mapping[str, Any]) -> None:
    names = [setting.name for setting in fields(HawkConfig)]
    if unknown := sorted(set(settings) - set(names)):
        raise ConfigError(
            f"unknown setting {', '.join(unknown)}; the settings are {', '.join(names)}{meant(unknown[0], names)}"
        )
