"""What a benchmark of an engine measured, line by line, and where it was made."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hawk_compile.errors import InputError
from hawk_compile.files import write_whole
from hawk_compile.tools.writing import check_folder


@dataclass(frozen=True)
class Answer:
    """What one request took that was alone in the engine.

    Attributes:
        seconds: from handing it in, pictures not yet prepared, to its first token.
        encoder: seconds of these for the encoder, with scoring and selection where it is pruned.
        prompt_tokens: that the decoder had, those from the prefix cache among them.
        visual_tokens: of these.
        cached: prompt tokens that the prefix cache held.
        blocks: of the key-value cache, that it held when its first token came.
    """

    seconds: float
    encoder: float
    prompt_tokens: int
    visual_tokens: int
    cached: int
    blocks: int


@dataclass(frozen=True)
class Together:
    """What several requests took that came at once.

    Attributes:
        seconds: from handing in the first to the last token of all.
        tokens: that were generated.
        blocks: the most of the key-value cache that they held.
    """

    seconds: float
    tokens: int
    blocks: int


@dataclass
class Line:
    """One thing that was asked in each round.

    Attributes:
        stage: 'ratios', 'prefixes' or 'video'.
        method: the selector of the engine, or 'EVS' of an engine that prunes videos by itself.
        subject: 'picture', 'another question' or 'next turn' about the same one, or 'video'.
        ratio: fraction of visual tokens removed; 0: none.
        asked: visual tokens that were asked for.
        answers: of each round.
        together: of each round; none where it was not measured.
    """

    stage: str
    method: str
    subject: str
    ratio: float
    asked: int
    answers: list[Answer] = field(default_factory=list)
    together: list[Together] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [each.seconds for each in self.answers]


@dataclass
class Served:
    """Everything that a benchmark of an engine measured.

    Attributes:
        settings: as given, with defaults.
        machine: processor, threads, versions and date.
        block_size: tokens of a block of the key-value cache.
        notes: what is not as asked.
    """

    model: str
    settings: dict[str, Any]
    machine: str
    command: str
    block_size: int = 0
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, stage: str, method: str | None = None, **wanted: Any) -> list[Line]:
        """The lines of a stage, by what they have in their fields."""
        found = [line for line in self.lines if line.stage == stage and method in (None, line.method)]
        return [line for line in found if all(getattr(line, name) == value for name, value in wanted.items())]

    def write(self, folder: str | os.PathLike[str], text: str) -> Sequence[Path]:
        """bench.md with that text, and bench.json with every number of every round.

        Raises:
            InputError: the folder cannot be written to.
        """
        place = Path(folder)
        check_folder(place)
        written = [place / "bench.md", place / "bench.json"]
        try:
            write_whole(written[0], text)
            write_whole(written[1], json.dumps(dataclasses.asdict(self), allow_nan=False) + "\n")
        except OSError as error:
            raise InputError(f"{place} cannot be written to ({error}): give another folder") from None
        return written
