"""Is a model pruned rightly? Each check holds an optimised model to the plain one."""

import contextlib
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.capture.modalities import placeholder_ids, required_arguments
from hawk_compile.errors import CaptureError, HawkError, UnsupportedCallError
from hawk_compile.exporting.formats import FORMATS
from hawk_compile.passes.errors import AttentionNotFoundError, MergeNotFoundError, ShapeError
from hawk_compile.runtime.api import optimize, report, restore
from hawk_compile.tools.survey import oracle, scores
from hawk_compile.tools.survey.outcome import (
    Misdescribed,
    Outcome,
    Survey,
    Unasked,
    Untried,
    Wrong,
    brief,
    equal,
    unlike,
    without_folders,
)
from hawk_compile.tools.survey.prompts import (
    LONGER,
    at_places_of,
    lengthened,
    others_kept,
    padded,
    question_of,
    rows_in,
    visual_of,
)
from hawk_compile.tools.survey.tiny import Tiny, build, plain, prompt
from hawk_compile.tools.survey.videos import video_of

STEPS = 5
ROUNDING = 1e-5
"""Rows of a batch are multiplied together, in another order than alone."""
MET_IN_THE_GRAPH = (CaptureError, MergeNotFoundError, AttentionNotFoundError, ShapeError)
"""These say what was met on the way, and not what of the model stands against pruning."""

Check = Callable[[Tiny, PreTrainedModel], str]


def settings(tiny: Tiny, ratio: float) -> dict[str, Any]:
    return {
        "ratio": ratio, "backend": "eager", "head_weights": "uniform",
        **({} if tiny.modalities is None else {"modalities": tiny.modalities}),
    }  # fmt: skip


def at_ratio_zero(tiny: Tiny, model: PreTrainedModel) -> str:
    """Nothing is removed: logits bit for bit as without us."""
    inputs = prompt(tiny, rows=2 if rows_in(tiny) > 1 else 1)
    inputs["use_cache"] = True  # what fills no cache may go another way, and round otherwise
    before = plain(model, inputs)
    optimize(model, **settings(tiny, 0.0))
    with torch.no_grad():
        pruned = model(**inputs)
    return f"{equal('logits', pruned.logits, before.logits):.2g}"


def prefill(tiny: Tiny, model: PreTrainedModel) -> str:
    """Half of the visual tokens removed: logits as of the gathered plain model, and not as of it with other tokens; the
    same call twice keeps the same."""
    inputs = prompt(tiny, rows=1)
    pruned, keep, layer = pruned_call(tiny, model, inputs)
    with torch.no_grad():
        again = model(**inputs)
    equal("the same call twice", again.logits, pruned.logits)
    restore(model)
    visual = visual_of(model, inputs)
    expected, _ = oracle.pruned_forward(model, inputs, keep, visual, layer)
    difference = equal("logits", pruned.logits, expected.logits)
    unlike_others(model, inputs, pruned, keep, layer)
    return f"{difference:.2g}"


def unlike_others(model: PreTrainedModel, inputs: dict[str, Any], pruned: Any, keep: Tensor, layer: int) -> None:
    """The control of what a pruned prefill must equal: with other kept tokens the plain model says something else."""
    visual = visual_of(model, inputs)
    other, _ = oracle.pruned_forward(model, inputs, others_kept(keep, visual), visual, layer)
    unlike("logits of other kept tokens", other.logits[:, -1], pruned.logits[:, -1], ROUNDING)


def selection(tiny: Tiny, model: PreTrainedModel) -> str:
    """The visual tokens that score best by hand are kept, and score so; not those that another question would keep."""
    inputs = prompt(tiny, rows=1)
    visual = visual_of(model, inputs)
    question = question_of(visual)
    _, keep, layer = pruned_call(tiny, model, inputs | {"question_mask": question[None].long()})
    record = pruned_record(model)
    restore(model)
    seen = scores.compared(model, inputs, layer)
    expected = scores.scored(seen, visual, question)
    difference = equal("scores", record.scores[0, visual].double(), expected, ROUNDING)
    best_kept(expected, torch.isin(visual.nonzero()[:, 0], keep))
    unlike("scores by another query", scores.scored(seen, visual, visual), expected, ROUNDING)
    return f"{difference:.2g}"


def best_kept(expected: Tensor, kept: Tensor) -> None:
    """Hold kept visual tokens, [V] bool, to the best by scores [V]; those that rounding alone tells apart may differ.

    Raises:
        Wrong: others score better.
    """
    worst, best = expected[kept].min(), expected[~kept].max()
    if worst < best - ROUNDING * expected.abs().max():
        raise Wrong(f"a visual token that scores {worst:.6g} is kept, and one that scores {best:.6g} is not")


def steps(tiny: Tiny, model: PreTrainedModel) -> str:
    """Five decode steps of generate behind it."""
    inputs = prompt(tiny, rows=1)
    optimize(model, **settings(tiny, 0.5))
    result = generated(model, inputs)
    record = pruned_record(model)
    restore(model)
    _, difference = steps_behind(model, inputs, result, record.keep_indices[0], record.scoring_layer)
    return f"{difference:.2g}"


def steps_behind(
    model: PreTrainedModel, inputs: dict[str, Any], result: Any, keep: Tensor, layer: int
) -> tuple[Any, float]:
    """(prefill of the gathered plain model, largest difference of its decode steps from those of a generation)."""
    tokens = result.sequences[0, -STEPS - 1 :].tolist()[:STEPS]
    output, cache = oracle.pruned_forward(model, inputs, keep, visual_of(model, inputs), layer)
    expected = [output.logits[0, -1], *oracle.decode(model, inputs, cache, tokens, len(keep))]
    return output, equal("logits of steps", torch.stack(result.logits)[:, 0], torch.stack(expected), ROUNDING)


def turns(tiny: Tiny, model: PreTrainedModel) -> str:
    """A turn of text behind the pruned prompt, on its cache."""
    if required := sorted(required_arguments(model) - {"input_ids"}):
        raise Unasked(f"no turn of text: the forward requires {' and '.join(required)}")
    inputs = prompt(tiny, rows=1)
    pruned, keep, layer = pruned_call(tiny, model, inputs)
    cache = pruned.past_key_values
    with torch.no_grad():
        words = [each for each in inputs["input_ids"][0].tolist() if each not in placeholder_ids(model)][-LONGER:]
        ids, length = torch.tensor([words]), inputs["input_ids"].shape[1]
        turn = model(
            input_ids=ids, past_key_values=cache, attention_mask=torch.ones(1, length + len(words)).long(),
            use_cache=True,
        )  # fmt: skip
    restore(model)
    _, cache = oracle.pruned_forward(model, inputs, keep, visual_of(model, inputs), layer)
    expected = oracle.turn(model, inputs, cache, words, len(keep))
    try:
        return f"{equal('logits of the turn', turn.logits[0, -1], expected, ROUNDING):.2g}"
    except Wrong:
        plain_turn(model, inputs, words)
        raise


def plain_turn(model: PreTrainedModel, inputs: dict[str, Any], words: list[int]) -> None:
    """Hold a turn of text on the plain model's cache to the same text behind its whole prompt.

    Raises:
        Unasked: it is not so without us.
    """
    length = inputs["input_ids"].shape[1] + len(words)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        turn = model(
            input_ids=torch.tensor([words]), past_key_values=cache, attention_mask=torch.ones(1, length).long(),
            use_cache=True,
        )  # fmt: skip
        whole = model(**lengthened(inputs, words), use_cache=True)
    try:
        equal("logits of the turn", turn.logits[0, -1], whole.logits[0, -1], ROUNDING)
    except Wrong as own:
        raise Unasked(f"the plain model's own turn is not as in its whole prompt: {own}") from None


def batches(tiny: Tiny, model: PreTrainedModel) -> str:
    """Rows of unequal lengths, padded on the left: each as it is alone, in models of which that is so without us."""
    if rows_in(tiny) < 2:
        raise Unasked("one row only")
    batch, rows = padded(tiny, model)
    rows = [at_places_of(model, batch, row, single) for row, single in enumerate(rows)]
    optimize(model, **settings(tiny, 0.5))
    try:
        found = rows_alone(model, batch, rows, lambda: pruned_record(model))
    except (Wrong, UnsupportedCallError):
        restore(model)
        try:
            rows_alone(model, batch, rows)
        except Wrong as own:
            raise Unasked(f"the plain model's own padded rows are not as they are alone: {own}") from None
        raise
    return f"{found:.2g}"


def rows_alone(
    model: PreTrainedModel, batch: dict[str, Any], rows: list[dict[str, Any]], check: Callable[[], Any] = lambda: None
) -> float:
    """How far rows of a padded batch are from what each is alone, over steps of generate.

    Args:
        check: of the batch, when it has run.
    """
    result = generated(model, batch)
    check()
    worst = 0.0
    for row, single in enumerate(rows):
        expected = generated(model, single, result.sequences[row, -STEPS - 1 :].tolist())
        logits = torch.stack(result.logits)[:, row]
        worst = max(worst, equal(f"row {row}", logits, torch.stack(expected.logits)[:, 0], ROUNDING))
    return worst


def restored(tiny: Tiny, model: PreTrainedModel) -> str:
    """After `restore` the model is as it was."""
    inputs = prompt(tiny, rows=1)
    with torch.no_grad():
        before = model(**inputs)
        optimize(model, **settings(tiny, 0.5))
        model(**inputs)
        pruned_record(model)
        restore(model)
        after = model(**inputs)
    return f"{equal('logits', after.logits, before.logits):.2g}"


def video(tiny: Tiny, model: PreTrainedModel) -> str:
    """Of a video: nothing removed, and the prefill and decode steps with half of its tokens removed."""
    asked = video_of(tiny, model)
    at_ratio_zero(asked, model)
    inputs = prompt(asked, rows=1)
    pruned, keep, layer = pruned_call(asked, restore(model), inputs)
    result = generated(model, inputs)
    if not pruned_record(model).keep_indices[0].equal(keep):
        raise Wrong("generate keeps other tokens than a call")
    expected, _ = steps_behind(restore(model), inputs, result, keep, layer)
    difference = equal("logits", pruned.logits, expected.logits)
    unlike_others(model, inputs, pruned, keep, layer)
    return f"{difference:.2g}"


CHECKS: dict[str, Check] = {
    "ratio 0": at_ratio_zero, "selection": selection, "prefill": prefill, "decode": steps, "turns": turns,
    "batch": batches, "video": video, "restore": restored,
}  # fmt: skip


def survey(tiny: Tiny, checks: dict[str, Check] = CHECKS) -> Survey:
    """Run the checks of one tiny model, each on the plain model that the one before has restored."""
    result = Survey(tiny.name, tiny.model_type, model_class=tiny.model_class, notes=tiny.notes)
    model = None
    for name, check in checks.items():
        began = time.perf_counter()
        try:
            model = build(tiny) if model is None else restore(model)
            restore(optimize(model, **settings(tiny, 0.5)))  # what is refused at once is not tried
            status, detail = "right", check(tiny, model)
            with contextlib.suppress(HawkError):  # restored
                result.layer = report(model).scoring_layer
        except Unasked as error:
            status, detail = "unasked", str(error)
        except Untried as error:
            status, detail = "untried", str(error)
        except Wrong as error:
            status, detail = "wrong", str(error)
        except Misdescribed as error:
            status, detail = "failed", str(error)
        except HawkError as error:
            status = "refused" if is_refusal(error, name) else "failed"
            detail = f"{type(error).__name__}: {brief(str(error))}"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            status = "untried" if name in FORMATS and isinstance(error, ImportError) else "failed"
            detail = f"{type(error).__name__}: {brief(str(error))} ({where.filename}:{where.lineno})"
        result.outcomes[name] = Outcome(status, without_folders(detail), round(time.perf_counter() - began, 1))
    return result


def is_refusal(error: HawkError, check: str) -> bool:
    """Whether an error of a check says what of the model stands against it. For an export the line that torch.export
    cannot follow does; `optimize` is to follow every line."""
    return not isinstance(error, MET_IN_THE_GRAPH) or (check in FORMATS and isinstance(error, CaptureError))


def pruned_call(tiny: Tiny, model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Any, Tensor, int]:
    """(output, kept positions [S'], layer that scores) of one row at ratio 0.5."""
    optimize(model, **settings(tiny, 0.5))
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
    record = pruned_record(model)
    keep, visual = record.keep_indices[0], int(visual_of(model, inputs).sum())
    if (removed := inputs["input_ids"].shape[1] - len(keep)) != visual // 2:
        raise Wrong(f"{removed} of {visual} visual tokens removed at ratio 0.5")
    return output, keep, record.scoring_layer


def pruned_record(model: PreTrainedModel) -> Any:
    """The report of a call that has to have been pruned."""
    try:
        record = report(model)
    except HawkError as error:
        raise Wrong(f"not pruned, without a word: {error}") from None
    if record.scores is None:
        raise Wrong(f"not pruned: {record.reason}")
    removed = record.visual_tokens - record.kept_visual_tokens
    if int(removed.min()) < 1:
        raise Wrong(f"nothing removed of {record.visual_tokens.tolist()} visual tokens: a check must remove some")
    return record


def generated(model: PreTrainedModel, inputs: dict[str, Any], tokens: list[int] | None = None) -> Any:
    """Greedy generation with logits; `tokens` are what is chosen instead."""
    with torch.no_grad():
        return model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=STEPS + 1, do_sample=False, output_logits=True, return_dict_in_generate=True,
            logits_processor=[oracle.forced(tokens or [])], use_cache=True,
        )  # fmt: skip
