"""Optimised models in lmms-eval: `lmms-eval --model hawk --model_args pretrained=FOLDER,ratio=0.8 --tasks ...`.

An entry point in the group `lmms_eval.models` tells it of `manifest`. Prompts are those of `evaluate`: pictures, then
the text of the task, by the checkpoint's own chat template. Answers are generated; what needs the likelihood of given
answers, several rounds, video or sound is refused.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from hawk_compile.errors import ConfigError, InputError, UnsupportedCallError
from hawk_compile.runtime.api import optimize
from hawk_compile.settings.config import HawkConfig, check_at_least_1, make_config
from hawk_compile.settings.selectors import selector_named
from hawk_compile.tools.checkpoints import fit, prompts, read_for_tasks
from hawk_compile.tools.evaluation.sample import picture

MARK = "<image>"
"""How tasks mark a picture's place in their text. Here pictures come first, and some tokenizers know it as an id."""
SAMPLING = ("temperature", "top_p", "top_k")
PASSED_ON = ("num_beams", "repetition_penalty", "length_penalty")
UNUSED = ("image_aspect_ratio",)
"""Asks LLaVA's own code to cut pictures in one way; here the checkpoint's processor decides."""


def manifest() -> Any:
    """What lmms-eval wants to know of a model from another package."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="hawk", simple_class_path=f"{__name__}.Hawk")


class Hawk(lmms):
    """A checkpoint, optimised.

    Args:
        pretrained: a checkpoint folder.
        dtype, device: as on the command line, "fp32", "fp16" or "bf16", and "cpu" or "cuda".
        batch_size: questions that are answered together.
        max_new_tokens: most tokens of an answer, for tasks that do not say.
        **settings: of `optimize`, selector_options as JSON: ratio, selector, head_weights, backend, ...

    Raises:
        ConfigError, HeadWeightsError, UnsupportedModelError: as `optimize`.
        InputError: a folder that is no checkpoint, an unknown dtype or device.
    """

    def __init__(
        self, pretrained: str, *, dtype: str = "fp32", device: str | None = None, batch_size: int | str = 1,
        max_batch_size: int | None = None, max_new_tokens: int = 1024, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        check_at_least_1("batch_size", self.batch_size)
        check_at_least_1("max_new_tokens", max_new_tokens)
        if max_batch_size is not None:
            raise ConfigError(f"max_batch_size must be left out, got {max_batch_size}: give batch_size")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(f"WORLD_SIZE must be 1, got {os.environ['WORLD_SIZE']}: start lmms-eval as one process")
        self.max_new_tokens = max_new_tokens
        config = make_config(None, with_options(settings))
        self.model, self.processor = read_for_tasks(Path(str(pretrained)), dtype, device)
        optimize(self.model, config)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model says to each request, cut before the first text of `until`.

        Raises:
            UnsupportedCallError: generation settings that are not known here.
            InputError: a request with something else than pictures.
        """
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(place)
        groups = [(places, *self.generation(requests[places[0]].args[1])) for places in alike.values()]
        for request in {each.args[4]: each for each in requests}.values():  # of each task one, before hours are spent
            self.pictures(request)
        said = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers") as bar:
            for places, settings, until in groups:
                for start in range(0, len(places), int(self.batch_size)):
                    part = places[start : start + int(self.batch_size)]
                    texts = self.answers([requests[each] for each in part], settings)
                    for place, text in zip(part, texts, strict=True):
                        said[place] = cut(text, until)
                        self.cache_hook.add_partial("generate_until", requests[place].args[:2], said[place])
                    bar.update(len(part))
        return said

    def answers(self, requests: list[Instance], settings: dict[str, Any]) -> list[str]:
        shown = [self.pictures(each) for each in requests]
        texts = [each.args[0].replace(MARK, "").strip() for each in requests]
        found = [""] * len(requests)
        for some in (True, False):  # processors take no batch of which a part has pictures
            rows = [row for row, each in enumerate(shown) if bool(each) == some]
            if not rows:
                continue
            made = prompts(self.processor, [shown[row] for row in rows], [texts[row] for row in rows])
            inputs = fit(self.model, made)
            out = self.model.generate(**inputs, **settings)
            new = out[:, inputs["input_ids"].shape[1] :]
            for row, text in zip(rows, self.processor.batch_decode(new, skip_special_tokens=True), strict=True):
                found[row] = text
        return found

    def pictures(self, request: Instance) -> list[Image.Image]:
        _, _, doc_to_visual, number, task, split = request.args
        given = doc_to_visual(self.task_dict[task][split][number]) if doc_to_visual is not None else None
        for each in given or []:
            if not isinstance(each, Image.Image):
                raise InputError(
                    f"task {task}, document {number}: hawk takes pictures (PIL images), not video or sound, got "
                    f"{type(each).__name__}: leave the task out"
                )
        return [picture(each, f"task {task}, document {number}") for each in given or []]

    def generation(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A task's generation_kwargs as arguments of `generate`, and the texts that end an answer."""
        known = ("until", "max_new_tokens", "do_sample", *SAMPLING, *PASSED_ON, *UNUSED)
        if unknown := [name for name in given if name not in known]:
            raise UnsupportedCallError(
                f"generation_kwargs must be of {', '.join(known)}, got {', '.join(unknown)}: leave the task out"
            )
        most = given.get("max_new_tokens")
        heat = given.get("temperature")
        sample = bool(given.get("do_sample", heat)) and heat != 0
        until = given.get("until") or []
        settings = {name: given[name] for name in PASSED_ON if given.get(name) is not None}
        settings |= {name: given.get(name) if sample else None for name in SAMPLING if sample or name in given}
        settings |= {"max_new_tokens": self.max_new_tokens if most is None else int(most), "do_sample": sample}
        return settings, [until] if isinstance(until, str) else [each for each in until if each]

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        refuse("loglikelihood", "multiple_choice or loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        refuse("generate_until_multi_round", "generate_until_multi_round")


def with_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with a selector of the options that stand beside its name, as text."""
    others = {name: value for name, value in settings.items() if name != "selector_options"}
    text = settings.get("selector_options")
    if text is None:
        return others
    try:
        options = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise ConfigError(f'selector_options must be a JSON object such as {{"bits":8}}, got {text!r}')
    return {**others, "selector": selector_named(settings.get("selector", HawkConfig.selector), options)}


def cut(text: str, until: list[str]) -> str:
    return min((text.split(each, 1)[0] for each in until), key=len, default=text)


def refuse(request: str, types: str) -> NoReturn:
    raise UnsupportedCallError(
        f"hawk answers requests of type generate_until, got {request}: leave out tasks whose output_type is {types}"
    )
