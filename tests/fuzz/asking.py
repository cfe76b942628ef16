"""What a drawn case asks of a model, and who votes by the layout of its rows."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hawk_compile.plan.ids import special_ids
from hawk_compile.plan.question import find_question
from hawk_compile.settings.config import HawkConfig
from tests.fuzz import prompts
from tests.fuzz.built import Case
from tests.fuzz.prompts import Group, Line
from tests.runtime.load.calls import Collected
from tests.runtime.reference import vision_ends
from tests.zoo import common as c


class Wrong(Exception):
    """What a pruned model did is not what the plain model does on hand-gathered inputs."""


@dataclass
class Held:
    """What a case was held to.

    Attributes:
        prompts: rows that were prefilled and compared.
        pruned: those of them that lost visual tokens.
        ties: rows that keep other tokens than by hand, by rounding alone.
        unsure: rows of whose layout nothing says who votes: the product's own rule is asked, of the row alone.
    """

    prompts: int = 0
    pruned: int = 0
    ties: int = 0
    unsure: int = 0


class Asking:
    """A case under way.

    Attributes:
        lines: of each row, what stands in it.
        singles: of each row, its inputs alone.
    """

    def __init__(self, case: Case, plain: Any, model: Any, config: HawkConfig) -> None:
        self.case, self.call, self.name = case, case["call"], case["model"]["name"]
        self.plain, self.model, self.config = plain, model, config
        self.held = Held()
        self.lines, self.singles = self.rows(self.call["rows"])
        weights = case["model"].get("head_weights") or [1.0] * c.HEADS
        self.weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)

    def rows(self, drawn: list[Case]) -> tuple[list[Line], list[dict[str, Tensor]]]:
        lines = [prompts.line_of(self.name, row, vision_ends(self.plain), self.config.modalities) for row in drawn]
        return lines, [prompts.inputs_of(self.name, row, line) for row, line in zip(drawn, lines, strict=True)]

    def asked(self, batch: dict[str, Tensor], side: str) -> tuple[dict[str, Any], list[list[Group]]]:
        """(arguments, by row the groups of visual tokens with those who vote on them)."""
        how = self.call.get("asked")
        texts = [[place for place, number in enumerate(line.ids) if number >= c.FIRST_TEXT] for line in self.lines]
        if not how or not all(texts):
            return {}, [self.groups(line, single) for line, single in zip(self.lines, self.singles, strict=True)]
        chosen = []
        for line, text, row in zip(self.lines, texts, self.call["rows"], strict=True):
            draw = random.Random(row["seed"])
            begin = draw.randrange(len(text))
            places = [text[begin]]
            while len(places) < 3 and places[-1] + 1 in text:
                places.append(places[-1] + 1)
            if how == "ids":
                ids = [line.ids[place] for place in places]
                last = max(at for at in range(len(line.ids)) if line.ids[at : at + len(ids)] == ids)
                places = list(range(last, last + len(ids)))
            chosen.append(places)
        groups = [[Group(line.visual, places)] for line, places in zip(self.lines, chosen, strict=True)]
        if how == "ids":
            texts = [[line.ids[at] for at in places] for line, places in zip(self.lines, chosen, strict=True)]
            return {"question_ids": texts}, groups
        mask = torch.zeros_like(batch["input_ids"])
        for row, (line, places) in enumerate(zip(self.lines, chosen, strict=True)):
            mask[row, torch.tensor(places) + (mask.shape[1] - len(line.ids) if side == "left" else 0)] = 1
        return {"question_mask": mask}, groups

    def groups(self, line: Line, single: dict[str, Tensor]) -> list[Group]:
        """Who votes on what, by the row's layout; where that does not say it, by the product's rule."""
        own = self.config.question == "own"
        with_images = [turn for turn in line.turns if turn.visual]
        newest = next((turn for turn in reversed(line.turns) if turn.question), None)
        if not line.visual:
            return []
        if line.sure and newest is not None:
            return with_images if own else [Group(line.visual, newest.question)]
        self.held.unsure += 1
        ids = single["input_ids"]
        visual = torch.isin(ids, torch.tensor(prompts.VISUAL))
        found = find_question(ids, visual, torch.ones_like(visual), special_ids(self.plain, self.config), own=own)
        if found.images is None:
            return [Group(line.visual, found.mask[0].nonzero()[:, 0].tolist())]
        pairs = [
            (seen.nonzero()[:, 0].tolist(), text.nonzero()[:, 0].tolist())
            for text, seen in zip(found.mask[0], found.images[0], strict=True)
        ]
        return [Group([place for place in seen if place in line.visual], text) for seen, text in pairs]

    def cache(self) -> Any:
        kind = self.call.get("cache")
        config = self.plain.config.get_text_config()
        if kind == "own_static":
            return StaticCache(config=config, max_cache_len=512)
        return {"dynamic": DynamicCache, "config": lambda: DynamicCache(config=config)}.get(kind, lambda: None)()

    def options(self, cache: Any) -> dict[str, Any]:
        call, kind = self.call, self.call.get("cache")
        options: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
        if kind == "static":
            options["cache_implementation"] = "static"
        if kind == "none":
            options["use_cache"] = False
        if call["mode"] == "beams":
            options |= {"num_beams": call["beams"], "num_return_sequences": call["beams"], "output_scores": True}
        if call["mode"] == "sample":
            torch.manual_seed(call.get("seed", 0))
            options |= {"do_sample": True, "num_return_sequences": call.get("returns", 1)}
        if call.get("chunk"):
            options["prefill_chunk_size"] = call["chunk"]
        if call.get("lookup"):
            options["prompt_lookup_num_tokens"] = call["lookup"]
        if call.get("streamer"):
            options["streamer"] = self.streamer = Collected()
        if call.get("embeds"):
            options["inputs_embeds"] = "of the ids"
        return options

    def generate(self, inputs: dict[str, Any], **options: Any) -> Any:
        if options.get("inputs_embeds"):
            options["inputs_embeds"] = self.plain.get_input_embeddings()(inputs["input_ids"]).detach()
        tokens = self.call["tokens"]
        options = {"do_sample": False} | options
        out = self.model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, return_dict_in_generate=True, output_logits=True,
            **options,
        )  # fmt: skip
        if "streamer" in options and options["streamer"].ids != out.sequences[0].tolist():
            raise Wrong("the streamer was not given what was generated")
        return out
