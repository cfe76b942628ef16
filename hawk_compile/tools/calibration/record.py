"""What a calibration has measured so far, in a file from which a killed one goes on."""

import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hawk_compile.errors import InputError
from hawk_compile.files import parse_json, read_bytes, shown, write_whole
from hawk_compile.tools.calibration.processes import Processes

MOST_BYTES = 256 << 20


class Record:
    """The scores [1 + H][samples] of finished batches, by name, and the date of the first of them.

    The main process keeps them in a file of JSON lines, the first of which says what they are of; all know them.

    Raises:
        InputError: a file of something else, or a place that cannot be written.
    """

    def __init__(self, path: Path | None, about: dict[str, Any], processes: Processes):
        self.path, self.processes = path if processes.main else None, processes
        self.date, self.scores = processes.each(lambda: started(self.path, about) if processes.main else None)[0]

    def finished(self, batches: Sequence[str], measure: Callable[[str], list[list[float]]]) -> Iterator[str]:
        """Each batch's name once its scores are known: those of the file, then the others, one in each process."""
        known = {*self.scores}
        yield from (batch for batch in batches if batch in known)
        left = [batch for batch in batches if batch not in known]
        for start in range(0, len(left), self.processes.count):
            now = left[start : start + self.processes.count]
            own = now[self.processes.number : self.processes.number + 1]
            found = self.processes.each(lambda own=own: measure(own[0]) if own else None)  # type: ignore[misc]
            for batch, scores in zip(now, found, strict=False):  # the last time there may be fewer
                self.add(batch, scores)
            yield from now

    def add(self, batch: str, scores: list[list[float]]) -> None:
        self.scores[batch] = scores
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"batch": batch, "scores": scores}) + "\n")


def started(path: Path | None, about: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Date and scores of a file, which is made where there is none and rid of a line that was cut off."""
    date, found = datetime.date.today().isoformat(), dict[str, Any]()
    if path is None:
        return date, found
    if os.path.lexists(path):
        earlier, *done = whole_lines(path)
        if {**earlier, "date": None} != {**json.loads(json.dumps(about)), "date": None}:
            raise InputError(
                f"progress_file {path} belongs to a calibration with other settings, data or model: remove it, or "
                "give another file"
            )
        date = earlier["date"]
        found = {line["batch"]: line["scores"] for line in done}
    text = [{**about, "date": date}, *({"batch": k, "scores": v} for k, v in found.items())]
    try:
        write_whole(path, (json.dumps(line) + "\n" for line in text))
    except OSError as error:
        raise InputError(f"progress_file {path} cannot be written ({error}): give another place") from None
    return date, found


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a progress file, what it is of first, but for a last one that was cut off.

    Raises:
        InputError: a file of something else.
    """
    rule = "progress_file must hold the progress of a calibration"
    text = read_bytes(path, InputError, rule, MOST_BYTES)
    whole = text[: text.rfind(b"\n") + 1].split(b"\n")[:-1]
    found = [parse_json(line, InputError, f"{rule}; {shown(path)} line {n}") for n, line in enumerate(whole, 1)]
    first, *batches = found or [None]
    if not (is_about(first) and all(map(is_batch, batches))):
        raise InputError(f"{rule}; {shown(path)} holds none: give another file")
    return found


def is_about(line: Any) -> bool:
    return isinstance(line, dict) and "ablation" in line and isinstance(line.get("date"), str)


def is_batch(line: Any) -> bool:
    """Whether a line holds a batch's scores [1 + heads][samples]."""
    rows = line.get("scores") if isinstance(line, dict) else None
    return (
        isinstance(rows, list) and isinstance(line.get("batch"), str)
        and all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
        and all(type(score) in (int, float) for row in rows for score in row)
    )
