"""Questions about pictures with their answers: from a JSON Lines file, from a list of records, or the demo's own.

A record holds

    image or images   a path (relative to the file) or PIL images; one or several
    question          text
    answer or answers one right answer, or several that all count as right
    kind              optional: what is asked for, by which tables can be split

What is wrong with a record is said with the line it stands on.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from hawk_compile.errors import InputError
from hawk_compile.files import parse_json, read_lines, shown
from hawk_compile.tools.evaluation.demo import DEMO, demo_samples
from hawk_compile.tools.evaluation.sample import Sample

FIELDS = ("image", "images", "question", "answer", "answers", "kind")

MOST_BYTES = 1 << 20
"""Of a line: it names pictures, and does not hold them."""
FORMAT = (
    'each line is an object such as {"image": "cat.png", "question": "What is this?", "answer": "a cat"}, its path '
    "relative to the file (docs/selectors.md)"
)


def read_samples(
    data: "str | PathLike[str] | Iterable[Any]",
    *,
    limit: int | None = None,
    skip_bad: bool = False,
    warn: Callable[[str], None] = lambda line: None,
) -> list[Sample]:
    """All questions of a file or a list, each with pictures that can be read.

    Args:
        data: a JSON Lines file; records or `Sample`s (a Hugging Face dataset is a list of records); or "demo".
        limit: no more than the first so many; of the demo's questions, so many.
        skip_bad: go on without what cannot be used, telling `warn`; else the first of it is an error.

    Raises:
        InputError: a record that cannot be used, with its line; no file; or no sample at all.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit must be a whole number of at least 1, got {limit!r}")
    if isinstance(data, str) and data.split(":")[0] == DEMO:
        return demo_samples(data, limit)
    found: list[Sample] = []
    for read in records(data):
        if limit is not None and len(found) >= limit:
            break
        try:
            sample = read()
            sample.pictures()
            found.append(sample)
        except InputError as error:
            if not skip_bad:
                raise InputError(f"{error}; or skip what cannot be used (skip_bad, --skip-bad)") from None
            warn(f"skipped: {error}")
    if not found:
        name = data if isinstance(data, (str, PathLike)) else type(data).__name__
        raise InputError(f"data must hold at least one sample, got none in {name}: give one record or line a question")
    return found


def records(data: "str | PathLike[str] | Iterable[Any]") -> Iterator[Callable[[], Sample]]:
    """Each record as a call that reads it, so that one that cannot be read can be left out."""
    if not isinstance(data, (str, PathLike)):
        if not isinstance(data, Iterable):
            raise InputError(
                f'data must be a JSON Lines file, "{DEMO}" or records, got {type(data).__name__}: {FORMAT}'
            )
        for number, record in enumerate(data):
            yield lambda record=record, number=number: of_record(record, Path(), f"record {number}")  # type: ignore[misc]
        return
    path = Path(data)
    if not os.path.isfile(path):
        raise InputError(f'data must be a JSON Lines file or "{DEMO}", got {shown(path)}, which is no file: {FORMAT}')
    rule = f'data must be a JSON Lines file or "{DEMO}"'
    for number, line in enumerate(read_lines(path, InputError, rule, MOST_BYTES), start=1):
        if line.strip():
            yield lambda line=line, number=number: of_line(line, path, number)  # type: ignore[misc]


def of_line(line: bytes, path: Path, number: int) -> Sample:
    origin = f"{path} line {number}"
    return of_record(parse_json(line, InputError, origin, "write one object per line"), path.parent, origin)


def of_record(record: Any, folder: Path, origin: str) -> Sample:
    """A record as a sample; relative paths start at the folder.

    Raises:
        InputError: fields that are missing or of a wrong type.
    """
    if isinstance(record, Sample):
        return record
    if not isinstance(record, Mapping):
        raise InputError(
            f"{origin} must be an object with {', '.join(FIELDS)}, got {type(record).__name__}: give a dict with these"
        )
    images = several(record, "image", "images")
    if not images:
        raise InputError(f"{origin}: a question needs an image, got none: give `image` or `images`")
    for each in images:
        if not isinstance(each, (str, PathLike, Image.Image)):
            raise InputError(f"{origin}: images must be paths or pictures, got {type(each).__name__}")
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{origin}: question must be text, got {shown(repr(question), 80)}: give one")
    answers = several(record, "answer", "answers")
    if not answers or not all(is_answer(each) for each in answers):
        raise InputError(
            f"{origin}: answers must be one text or several, got {shown(repr(answers), 80)}: give `answer` or `answers`"
        )
    return Sample(
        tuple(each if isinstance(each, Image.Image) else folder / each for each in images),
        question,
        tuple(str(each) for each in answers),
        str(record.get("kind") or ""),
        origin,
    )


def is_answer(given: Any) -> bool:
    if isinstance(given, str):
        return bool(given.strip())
    return isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)


def several(record: Mapping[str, Any], one: str, many: str) -> list[Any]:
    """The values under either name."""
    found = record.get(one) if record.get(many) is None else record[many]
    return [] if found is None else list(found) if isinstance(found, (list, tuple)) else [found]
