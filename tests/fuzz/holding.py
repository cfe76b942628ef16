"""One drawn case, held to what the plain model gives on hand-gathered inputs of each row alone."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor

import hawk_compile
from hawk_compile.errors import HawkError
from hawk_compile.settings.config import HawkConfig
from tests.fuzz import prompts
from tests.fuzz.asking import Asking, Held, Wrong
from tests.fuzz.built import LAYERS, Case, exported, models, settings_of
from tests.fuzz.prompts import Group, Line
from tests.fuzz.selection import Row, compared
from tests.runtime.reference import Conversation, decoder_inputs

CLOSE = 1e-4
"""Log-probabilities in float32 of matrix products of other shapes; logits have magnitude 1 to 10."""
SCORES = 2e-5
"""Of the largest score of a row."""
PIXELS = ("pixel_values", "pixel_values_videos", "input_features")


class Upstream(Exception):
    """The plain model itself answers otherwise than its rows alone."""


def hold(case: Case) -> Held:
    """
    Raises:
        Wrong: other tokens kept, or other log-probabilities.
        Upstream: so does the plain model, of several sequences of a row, or of embeddings in chunks.
        HawkError: what the case asks for is refused.
    """
    config = HawkConfig(**settings_of(case))
    if "format" in case["model"]:
        plain, model = exported(json.dumps(case["model"]))
        return Holding(case, plain, model.at(config.ratio), config).run()
    plain, model = models(case["model"]["name"], case["model"].get("layers", LAYERS))
    hawk_compile.optimize(model, config)
    return Holding(case, plain, model, config).run()


class Holding(Asking):
    """A case under way.

    Attributes:
        by_hand: of each row, the plain model's conversation.
    """

    def __init__(self, case: Case, plain: Any, model: Any, config: HawkConfig) -> None:
        super().__init__(case, plain, model, config)
        self.by_hand: list[Conversation] = []

    def run(self) -> Held:
        try:
            return self.held_to_its_rows()
        except (Wrong, HawkError, RuntimeError) as wrong:
            if self.repeats() > 1 and not self.plain_repeats_rightly():
                raise Upstream from wrong
            if self.chunks_of_embeddings() and not self.plain_cuts_embeddings_rightly():
                raise Upstream from wrong
            raise

    def repeats(self) -> int:
        return max(self.call.get("beams", 1), self.call.get("returns", 1))

    def plain_repeats_rightly(self) -> bool:
        """Whether the plain model gives several sequences of a row the images, videos and audio of that row."""
        return self.plain_answers_rows(self.repeats(), do_sample=True, num_return_sequences=self.repeats())

    def chunks_of_embeddings(self) -> bool:
        """Whether transformers alone prefills embeddings of a text in chunks."""
        asked = self.call.get("chunk") and self.call.get("embeds")
        return bool(asked) and not any(line.visual for line in self.lines)

    def plain_cuts_embeddings_rightly(self) -> bool:
        ids = prompts.joined(self.singles, "left")["input_ids"]
        embeddings = self.plain.get_input_embeddings()(ids).detach()
        return self.plain_answers_rows(1, inputs_embeds=embeddings, prefill_chunk_size=self.call["chunk"])

    def plain_answers_rows(self, count: int, **options: Any) -> bool:
        """Whether the plain model gives `count` sequences of each row what it gives the row alone."""
        asked = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
        batch = prompts.joined(self.singles, "left")
        try:
            out = self.plain.generate(**{**batch, **asked, **options}).logits[0]
        except (ValueError, RuntimeError):  # as where features are lost, or another number than the prompt has places
            return False
        alone = [self.plain.generate(**single, **asked).logits[0] for single in self.singles]
        return float((out - torch.cat(alone).repeat_interleave(count, 0)).abs().max()) < CLOSE

    def held_to_its_rows(self) -> Held:
        side = self.call.get("side", "left")
        batch = prompts.joined(self.singles, side)
        asked, groups = self.asked(batch, side)
        if self.call["mode"] == "forward":
            self.forward(batch, asked, groups, side)
            return self.held
        cache = self.cache()
        options = self.options(cache)
        out = self.generate({**batch, **asked}, **options)
        self.prefilled(out, self.lines, self.singles, groups, batch["input_ids"].shape[1], "left")
        if self.call["mode"] == "beams":
            self.beams(out, batch)
        else:
            self.steps(out, batch["input_ids"].shape[1])
        for turn in self.call.get("turns", ()):
            batch, out = self.turn(batch, out, cache, turn)
        return self.held

    def prefilled(
        self, out: Any, lines: list[Line], singles: list[dict[str, Tensor]], groups: list[list[Group]], length: int,
        side: str, again: int = 0,
    ) -> None:  # fmt: skip
        """Hold what every row keeps to what it keeps by hand, and let the plain model read that.

        Args:
            out: of the call, which knows what its prefill did.
            again: tokens in front of the rows, behind a conversation that is there already.
        """
        record, report = out.hawk_record, hawk_compile.report(out)
        repeated = len(report.keep_indices) // len(lines)
        for number, (line, single, asked) in enumerate(zip(lines, singles, groups, strict=True)):
            merged = decoder_inputs(self.plain, single)
            shift = (length - len(line.ids) if side == "left" else 0) + again
            places = torch.arange(len(line.ids))
            if record.keep is not None:
                for copy in range(repeated):
                    places = report.keep_indices[number * repeated + copy] - shift
                    self.selected(line, merged, asked, places[places >= 0], report, number * repeated + copy, shift)
                places = places[places >= 0]
            elif line.visual:
                raise Wrong(f"row {number} has {len(line.visual)} visual tokens, none of them scored: {report.reason}")
            if not again:
                self.by_hand.append(Conversation(self.plain, 0.0))
            self.by_hand[number].gathered(merged, line.ids, single, places)
            self.held.prompts += 1
            self.held.pruned += len(places) < len(line.ids)

    def selected(
        self, line: Line, merged: dict[str, Any], groups: list[Group], keep: Tensor, report: Any, row: int, shift: int
    ) -> None:
        visual = {*line.visual}
        found = [place for place in keep.tolist() if place in visual]
        if {*keep.tolist()} - visual != {*range(len(line.ids))} - visual:
            raise Wrong(f"row {row} keeps {keep.tolist()}, not all of its other tokens")
        if not visual:
            return
        one = Row(compared(self.plain, merged["inputs_embeds"]), line, groups, self.config, self.weights)
        scores = one.scores()
        given = report.scores[row, torch.tensor(line.visual) + shift]
        if self.config.method.ranking is None:
            difference = float((given - scores).abs().max())
            if difference > SCORES * float(scores.abs().max()):
                raise Wrong(f"row {row} scores {given.tolist()}, by hand {scores.tolist()}: {difference:.2g} apart")
        wanted = one.kept(scores)
        if found != wanted:
            if not one.may_keep(found, scores):
                raise Wrong(f"row {row} keeps the visual tokens {found}, by hand {wanted} of {line.visual}")
            self.held.ties += 1

    def close(self, what: str, found: Tensor, wanted: Tensor) -> None:
        difference = float((found.float().log_softmax(-1) - wanted.float().log_softmax(-1)).abs().max())
        if not difference < CLOSE:
            raise Wrong(f"log-probabilities of {what}: {difference:.2g} from those by hand")

    def steps(self, out: Any, length: int) -> None:
        returns = len(out.sequences) // len(self.by_hand)
        for row in range(len(out.sequences)):
            by_hand = self.by_hand[row // returns] if returns == 1 else twin(self.by_hand[row // returns])
            tokens = out.sequences[row, length:].tolist()
            logits = torch.stack(out.logits)[:, row]
            self.close(f"the prompt in row {row}", logits[0], by_hand.logits[-1])
            if len(tokens) > 1:
                self.close(f"the steps in row {row}", logits[1:], by_hand.feed(tokens[:-1]))
            if self.call["mode"] == "generate" and tokens != logits.argmax(-1).tolist():
                self.greedy(logits, tokens)

    def greedy(self, logits: Tensor, tokens: list[int]) -> None:
        """End-of-text ids are not chosen before the asked number of tokens."""
        ends = self.model.generation_config.eos_token_id
        allowed = logits.index_fill(1, torch.tensor(ends if isinstance(ends, list) else [ends]), -torch.inf)
        if tokens != allowed.argmax(-1).tolist():
            raise Wrong(f"greedy decoding chose {tokens} where the best are {allowed.argmax(-1).tolist()}")

    def beams(self, out: Any, batch: dict[str, Tensor]) -> None:
        length, count = batch["input_ids"].shape[1], self.call["beams"]
        for row, by_hand in enumerate(self.by_hand):
            found = []
            for beam in range(count):
                tokens = out.sequences[row * count + beam, length:].tolist()
                one = twin(by_hand)
                logits = one.logits[-1:]
                if len(tokens) > 1:
                    logits = torch.cat([logits, one.feed(tokens[:-1])])
                found.append(float(logits.log_softmax(-1)[range(len(tokens)), tokens].mean()))
            scores = out.sequences_scores[row * count : (row + 1) * count]
            if float((scores - torch.tensor(found)).abs().max()) > CLOSE or found != sorted(found, reverse=True):
                raise Wrong(f"beams of row {row} score {scores.tolist()}, by hand {found}")

    def forward(self, batch: dict[str, Tensor], asked: dict[str, Any], groups: list[list[Group]], side: str) -> None:
        with torch.no_grad():
            out = self.model(**batch, **asked)
        self.prefilled(out, self.lines, self.singles, groups, batch["input_ids"].shape[1], side)
        valid = out.hawk_record.valid
        for row, by_hand in enumerate(self.by_hand):
            real = batch["attention_mask"][row].bool() if valid is None else valid[row]
            self.close(f"row {row}", out.logits[row][real], by_hand.logits)

    def turn(self, batch: dict[str, Tensor], out: Any, cache: Any, turn: Case) -> tuple[dict[str, Tensor], Any]:
        """A later turn on the cache, of text or with images of its own: (the whole conversation, what it answered)."""
        rows = len(self.lines)
        drawn = [{"turns": [turn], "tail": turn.get("tail", 2), "seed": turn["seed"] + row} for row in range(rows)]
        lines, singles = self.rows(drawn)
        added = prompts.joined(singles, "left")
        ids = torch.cat([out.sequences, added["input_ids"]], 1)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, self.call["tokens"]), value=1)
        whole = {**added, "input_ids": ids, "attention_mask": torch.cat([mask, added["attention_mask"]], 1)}
        seen = bool({*added} & {*PIXELS})
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in added:
                earlier = torch.nn.functional.pad(batch[name], (0, self.call["tokens"]))
                whole[name] = torch.cat([earlier, added[name]], 1)
        if self.name == "paligemma":
            whole.pop("token_type_ids")  # its answers and questions are a suffix, which attends causally
        last = out.sequences[:, -1].tolist()
        out = self.generate(whole, past_key_values=cache)
        if seen:
            for by_hand, token in zip(self.by_hand, last, strict=True):
                by_hand.feed([token])
            groups = [self.groups(line, single) for line, single in zip(lines, singles, strict=True)]
            self.prefilled(out, lines, singles, groups, added["input_ids"].shape[1], "left", again=1)
        else:
            for by_hand, token, line in zip(self.by_hand, last, lines, strict=True):
                by_hand.feed([token, *line.ids])
                self.held.prompts += 1
        self.steps(out, ids.shape[1])
        return whole, out


def twin(by_hand: Conversation) -> Conversation:
    """The same conversation, to go on with apart."""
    other = Conversation(by_hand.model, by_hand.ratio, cache=copy.deepcopy(by_hand.cache))
    for name in ("next_position", "seen", "dimensions", "keep", "logits"):
        setattr(other, name, getattr(by_hand, name))
    return other

