"""A benchmark of an engine as tables. Medians over the rounds, with interquartile ranges; ratios round by round."""

from collections.abc import Sequence

from hawk_compile.tools.benchmarking.table import Table, share
from hawk_compile.tools.benchmarking.timing import spread
from hawk_compile.tools.served.measured import Line, Served

RATIO_HEADINGS = (
    "V", "removed", "prompt tokens", "KV blocks", "TTFT / unpruned", "without encoder", "throughput / unpruned",
    "blocks of all", "TTFT ms", "encoder ms", "tokens/s",
)  # fmt: skip
PREFIX_HEADINGS = (
    "selector", "removed", "about the picture", "prompt tokens", "from the cache", "TTFT ms", "/ unpruned",
)  # fmt: skip
VIDEO_HEADINGS = ("by", "what", "removed", "prompt tokens", "KV blocks", "TTFT / a whole picture's", "TTFT ms")


def over(above: Sequence[float], below: Sequence[float]) -> str:
    """One over the other, round by round."""
    return share(spread([a / b for a, b in zip(above, below, strict=True)]))


def milliseconds(values: Sequence[float]) -> str:
    found = spread([1e3 * value for value in values])
    return f"{found.median:.1f} ({found.iqr:.1f})"


def each(values: Sequence[int]) -> str:
    """A count that is the same in every round, else its bounds."""
    return f"{min(values)}" if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def decoder(line: Line) -> list[float]:
    return [answer.seconds - answer.encoder for answer in line.answers]


def rate(line: Line) -> list[float]:
    return [one.tokens / one.seconds for one in line.together]


def ratio_rows(found: Served) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for line in found.of("ratios"):
        (whole,) = found.of("ratios", asked=line.asked, ratio=0.0)
        rows.append((
            f"{whole.answers[0].visual_tokens}", f"{line.ratio:g}", each([one.prompt_tokens for one in line.answers]),
            each([one.blocks for one in line.answers]), over(line.seconds, whole.seconds),
            over(decoder(line), decoder(whole)), over(rate(line), rate(whole)),
            each([one.blocks for one in line.together]), milliseconds(line.seconds),
            milliseconds([one.encoder for one in line.answers]),
            f"{spread(rate(line)).median:.1f} ({spread(rate(line)).iqr:.1f})",
        ))  # fmt: skip
    return rows


def prefix_rows(found: Served) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for line in found.of("prefixes"):
        (whole,) = found.of("prefixes", line.method, subject=line.subject, ratio=0.0)
        name = "a first question" if line.subject == "picture" else line.subject
        rows.append((
            line.method, f"{line.ratio:g}", name, each([one.prompt_tokens for one in line.answers]),
            each([one.cached for one in line.answers]), milliseconds(line.seconds), over(line.seconds, whole.seconds),
        ))  # fmt: skip
    return rows


def video_rows(found: Served) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for line in found.of("video"):
        (picture,) = found.of("video", line.method, subject="picture")
        rows.append((
            line.method, line.subject, f"{line.ratio:g}", each([one.prompt_tokens for one in line.answers]),
            each([one.blocks for one in line.answers]), over(line.seconds, picture.seconds), milliseconds(line.seconds),
        ))  # fmt: skip
    return rows


def tables(found: Served) -> list[Table]:
    """Those that have lines."""
    given = found.settings
    made: list[Table] = [
        (
            "One engine, each request with its own ratio, the ratios in turns about the same pictures, none of which "
            "comes twice. Median (interquartile range); what is over unpruned is so round by round. TTFT: from handing "
            "in one request, picture not yet prepared, to its first token; without encoder: less the encoder's time, "
            f"in which scoring and selection are. Throughput: {given['requests']} requests at once of "
            f"{given['answer']} tokens each. KV blocks, of {found.block_size} tokens: what the scheduler's pool lacked "
            "while one request was there, and the most that all at once held.",
            RATIO_HEADINGS, ratio_rows(found),
        ),
        (
            "Later questions about a picture that was asked about before, with prefix caching: another question about "
            "it alone, and the next turn of the same conversation. Each selector has an engine of its own; over "
            "unpruned in the same engine.",
            PREFIX_HEADINGS, prefix_rows(found),
        ),
        (
            "Videos: by this package, and by vLLM's own EVS (video_pruning_rate) in an engine of its own. Engines are "
            "not in turns, so both are over a whole picture in the same engine. Times alone: no answers are compared.",
            VIDEO_HEADINGS, video_rows(found),
        ),
    ]  # fmt: skip
    return [table for table in made if table[2]]


def head(found: Served) -> list[str]:
    """What was measured, where and how, and what is not as asked."""
    given = found.settings
    hawk = "".join(f", {name}={value}" for name, value in given["hawk"].items())
    options = "".join(f", {name}={value}" for name, value in given["vllm"].items())
    lines = [
        found.machine,
        f"`{found.command}`",
        f"{given['source']}: {found.model}, {given['dtype']}{hawk}; engine in this process{options}; "
        f"{given['rounds']} rounds, and one before that is not counted.",
    ]
    notes = list(found.notes)
    for line in found.of("ratios", ratio=0.0):
        visual = line.answers[0].visual_tokens
        if visual != line.asked:
            notes.append(f"{line.asked} visual tokens were asked for: the checkpoint's processor makes {visual}")
    return [*lines, *(f"Note: {note}." for note in notes)]
