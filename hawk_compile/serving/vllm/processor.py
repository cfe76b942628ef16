"""The processor of a served checkpoint: its own, with the question in each item's identity and fewer placeholders.

prompt ids, images  ->  each item's question and ratio             found here, before any cache is asked
                    ->  hash of each item                          covers both: other question, other item
                    ->  pixels, placeholders                       by the checkpoint's own processor
                    ->  fewer placeholders, and what the model needs to know (items.py)
"""

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.multimodal.processing.processor import iter_token_matches

from hawk_compile.errors import HawkError, InputError, UnsupportedModelError
from hawk_compile.serving.questions import Span
from hawk_compile.serving.settings import KEY, RATIO, check_request, digest, reads_question, with_ratio
from hawk_compile.serving.vllm.checkpoint import checkpoint_of
from hawk_compile.serving.vllm.compat.model import at_the_start
from hawk_compile.serving.vllm.compat.processor import Ask, ProcessorHooks, without_video_pruning
from hawk_compile.serving.vllm.items import Place, check_alone, check_extent, check_inner, place_of
from hawk_compile.serving.vllm.positions import check_reach
from hawk_compile.serving.vllm.refusals import check_apart, check_text, runs_of

Asked = Mapping[str, list[tuple[int, ...]]]
"""Modality -> the ids that vote on each of its items."""

MEASURE = object()
"""The ratio of what memory is measured with: all is scored and chosen, and nothing is counted."""


@dataclass
class Shortened(PromptUpdateDetails):
    """An item with fewer placeholders: how many visual tokens came, and were kept, and how many positions it takes
    more than placeholders; 0 of what is not counted."""

    came: int = 0
    kept: int = 0
    gap: int = 0


class PrunedProcessor(ProcessorHooks):
    """Goes in front of a processor of vLLM's (`pruned`), whose methods it extends: `ask` is vLLM's own."""

    info: Any

    def prepare(self, served: type) -> None:
        """Find what is known of the checkpoint.

        Args:
            served: the class of the model.
        """
        self.checkpoint = checkpoint_of(self.info, served)
        self.info.ctx = without_video_pruning(self.info.ctx)

    # What a request asks for goes with its keyword arguments, through the methods of vLLM's processor, and is taken out
    # again in front of the checkpoint's: a processor serves many requests, some at once.

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        check_request(kwargs)
        settings = self.checkpoint.config
        ratio = kwargs.pop(RATIO, settings.ratio)
        config = with_ratio(settings, 0 if ratio is MEASURE else ratio)
        if ratio is MEASURE:
            kwargs[KEY] = (config, self.stand_ins(inputs, kwargs, config))
        elif config.ratio:
            kwargs[KEY] = (config, self.asked(inputs, kwargs, config))
        asked = replace(inputs, hf_processor_mm_kwargs=kwargs)
        try:
            made = super().apply(asked, timing_ctx)  # type: ignore[misc]
            if config.ratio:
                self.check(made)
        except HawkError:
            self.forget(asked)
            raise
        if ratio is not MEASURE:
            self.count_whole(made["mm_placeholders"], config)
        return made

    def check(self, made: Mapping[str, Any]) -> None:
        """Refuse a prompt as it would be read, with the places of its items."""
        ids, runs = made["prompt_token_ids"], runs_of(made["mm_placeholders"])
        check_apart(runs)
        self.checkpoint.places.update(ids[first] for first, _ in runs)
        check_text(ids, runs, self.checkpoint.places, lambda wrong: self.info.get_tokenizer().decode(wrong))

    def forget(self, inputs: Any) -> None:
        """Take the items of a refused request out of the cache: the engine, which never gets to see them, is not sent
        again what its own cache is believed to hold."""
        if inputs.cache is not None:
            for item in itertools.chain.from_iterable(self.hashes_of(inputs).values()):
                inputs.cache.invalidate(item)

    def count_whole(self, placeholders: Mapping[str, Sequence[Any]], config: Any) -> None:
        for modality, ranges in placeholders.items():
            for each in ranges if not config.ratio or modality not in config.modalities else ():
                self.checkpoint.tally.count(each.get_num_embeds(), each.get_num_embeds())

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, RATIO: MEASURE})

    def stand_ins(self, inputs: Any, kwargs: dict[str, Any], config: Any) -> Asked:
        """A question for every item that memory is measured with: what a request would run into is run into then.

        Raises:
            UnsupportedModelError: nobody could tell where an item stands in a prompt.
        """
        counts = {name: len(items) for name, items in inputs.mm_data_items.items() if name in config.modalities}
        targets = self.targets(inputs, kwargs, counts)
        for name in counts:
            if not all(targets.get(name, [[]])):
                raise UnsupportedModelError(
                    f"this checkpoint's processor in vLLM does not say which ids stand for items of modality {name} in "
                    f"a prompt: it cannot be pruned; leave {KEY} out of hf_overrides"
                )
        return {name: [(0,)] * count for name, count in counts.items()}

    def asked(self, inputs: Any, kwargs: dict[str, Any], config: Any) -> Asked:
        """The question of every item that may be pruned.

        Raises:
            InputError: an item without a placeholder of its own, or without any text.
        """
        counts = {name: len(items) for name, items in inputs.mm_data_items.items() if name in config.modalities}
        spans = self.spans(inputs, kwargs, counts)
        if not reads_question(config):
            return {name: [()] * count for name, count in counts.items()}
        order = sorted((span, name, index) for name, found in spans.items() for index, span in enumerate(found))
        questions = self.checkpoint.reader.questions(inputs.prompt, [span for span, _, _ in order])
        asked: dict[str, list[tuple[int, ...]]] = {name: [()] * count for name, count in counts.items()}
        for (_, name, index), question in zip(order, questions, strict=True):
            if not question:
                raise InputError(
                    f"the prompt has no text that could score its {name}: add a question, or ask for "
                    f'mm_processor_kwargs={{"{RATIO}": 0}}'
                )
            asked[name][index] = question
        return asked

    def spans(self, inputs: Any, kwargs: dict[str, Any], counts: Mapping[str, int]) -> dict[str, list[Span]]:
        """Where the items of each modality stand in the prompt as the client sent it, in the order of the items."""
        targets = self.targets(inputs, kwargs, counts)
        spans: dict[str, list[Span]] = {}
        for name, count in counts.items():
            found = [
                (match.start_idx, match.end_idx)
                for target in dict.fromkeys(map(tuple, targets.get(name, [])))
                for match in (iter_token_matches(inputs.prompt, list(target)) if target else ())
            ]
            if len(found) != count:
                raise InputError(
                    f"the prompt has {len(found)} placeholders for {count} items of modality {name}: give one for each "
                    "item, as the chat template writes it"
                )
            spans[name] = found
        return spans

    def targets(self, inputs: Any, kwargs: dict[str, Any], counts: Mapping[str, int]) -> dict[str, list[list[int]]]:
        """Modality -> the ids that stand for each item in a prompt, which may be numbered; none where it is not by ids
        that vLLM finds its place."""
        from vllm.multimodal.inputs import MultiModalKwargsItems

        updates = self.updates_of(inputs.mm_data_items, kwargs, MultiModalKwargsItems({}))
        targets = {}
        for each in updates:
            count = counts.get(each.modality, 0)
            ids = [each.target(index) if callable(each.target) else each.target for index in range(count)]
            targets[each.modality] = [one if isinstance(one, list) else [] for one in ids]
        return targets

    def hashes(self, ask: Ask, inputs: Any) -> Any:
        kwargs, asked = without(inputs.hf_processor_mm_kwargs)
        hashes = ask(replace(inputs, hf_processor_mm_kwargs=kwargs))
        if asked is None:
            return hashes
        config, questions = asked
        settings = digest(config)
        return {
            name: [mixed(each, settings, question) for each, question in zip(found, questions[name], strict=True)]
            if name in questions else found
            for name, found in hashes.items()
        }  # fmt: skip

    def kwargs_of_missing(self, ask: Ask, inputs: Any, mm_is_cached: Mapping[str, Sequence[bool]]) -> Any:
        kwargs, asked = without(inputs.hf_processor_mm_kwargs)
        found = ask(replace(inputs, hf_processor_mm_kwargs=kwargs), mm_is_cached)
        if asked is None:
            return found
        config, questions = asked
        missing = {
            name: [each for each, hit in zip(all_of_it, mm_is_cached[name], strict=True) if not hit]
            for name, all_of_it in questions.items()
        }
        return {**found, KEY: (config, missing)}

    def checkpoints_own(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return without(kwargs)[0]

    def applied(self, prompt_updates: Mapping[str, Any]) -> None:
        contents = [updates[0].content for items in prompt_updates.values() for updates in items if updates]
        pruned = [each for each in contents if isinstance(each, Shortened) and each.came]  # cached ones too
        check_reach(sum(each.gap for each in pruned), self.checkpoint.room)
        for each in pruned:
            self.checkpoint.tally.count(each.came, each.kept)

    def recomputed(self, cached: Any, update: Any) -> Any:
        """A cached update at another place among the items of a prompt, some of which are numbered in their texts."""
        before, after = cached.content, update.content
        if not isinstance(before, Shortened):
            return update
        content = Shortened(after.full, after.is_embed, came=before.came, kept=before.kept, gap=before.gap)
        return update.with_content(content)

    def prompt_updates(self, ask: Ask, mm_items: Any, kwargs_of_request: Mapping[str, Any], out_mm_kwargs: Any) -> Any:
        kwargs, asked = without(kwargs_of_request)
        updates = ask(mm_items, kwargs, out_mm_kwargs)
        if asked is None:
            return updates
        config, questions = asked
        return {
            name: [
                self.shortened(each, question, config, name, out_mm_kwargs[name][index])
                for index, (each, question) in enumerate(zip(items, questions[name], strict=True))
            ]
            if name in questions else items
            for name, items in updates.items()
        }  # fmt: skip

    def shortened(
        self, updates: Sequence[Any], question: tuple[int, ...], config: Any, modality: str, kwargs_of_item: Any
    ) -> list[Any]:
        """The updates of an item, of which one will be applied, with the number of placeholders that is kept."""
        made, items = [], []
        for update in updates:
            full = list(update.content.full)
            place = place_of(full, update.content.is_embed(full) if update.content.is_embed else None)
            if place is None:
                made.append(update)
                continue
            check_inner(place, self.checkpoint.why_no_text_inside)
            check_alone(place, self.checkpoint.sounds)
            keep = config.floor(place.count)
            extent = self.extent(place, modality, kwargs_of_item)
            gap = extent - (len(place.inner) - place.count + keep)
            counted = {"came": place.count, "kept": keep, "gap": gap} if config.ratio else {}
            made.append(update.with_content(Shortened(*place.shortened(keep), **counted)))
            items.append(place.item(question, keep))
        if any(not same(item, items[0]) for item in items[1:]):
            raise UnsupportedModelError(
                "this checkpoint's processor may write an item in more than one way, with other visual tokens in each; "
                "it cannot be pruned: leave hawk out of hf_overrides"
            )
        for item in items[:1]:
            for name, value in item.fields().items():
                field = MultiModalBatchedField(keep_on_cpu=True)
                kwargs_of_item[name] = MultiModalFieldElem(data=value, field=field)
        return made

    def extent(self, place: Place, modality: str, kwargs_of_item: Any) -> int:
        """How many positions an item takes.

        Raises:
            InputError: more than travel exactly.
        """
        _, extent = self.checkpoint.rule.item_positions(at_the_start(kwargs_of_item, modality, place.all_visual), place)
        check_extent(extent)
        return extent


def without(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Any, Asked] | None]:
    """(the keyword arguments of the checkpoint's own processor, what a request asks for)."""
    return {name: value for name, value in kwargs.items() if name not in (KEY, RATIO)}, kwargs.get(KEY)


def mixed(item_hash: str, settings: str, question: tuple[int, ...]) -> str:
    """The identity of an item that is pruned by these settings for this question."""
    said = f"{item_hash}/{settings}/{','.join(map(str, question))}"
    return hashlib.sha256(said.encode()).hexdigest()


def same(one: Any, other: Any) -> bool:
    return all(a.tolist() == b.tolist() for a, b in zip(one.fields().values(), other.fields().values(), strict=True))


def pruned(served: type, processor: Any) -> Any:
    """A processor of vLLM's as one that prunes for a class of ours (`model.pruned_class`)."""
    kind: Any = type(processor)
    made: Any = object.__new__(pruned_kind(kind))
    made.__dict__.update(processor.__dict__)
    made.prepare(served)
    return made


@functools.cache
def pruned_kind(kind: type) -> type:
    """A class of processors as one whose processors prune: one for all of them."""
    return type(f"Pruned{kind.__name__}", (PrunedProcessor, kind), {"__module__": __name__})
