"""Where the users' texts of a prompt stand, from its ids alone: where no chat template says it.

End-of-turn ids cut a row into segments. What stands behind the last of them is one of two things:

    the id closes both roles    <u> q1 E <a> a1 E <u> q2 E [<a>]     an answer's header, or nothing: q2 is before it
    the id closes answers only  <u> q1 <g> a1 E <u> q2 [<g>]         the newest user's turn

A header comes again where answers begin, and it is the user's header with another role in it. A user's turn holds
images, begins as the first one does, or is more than a header.

What cannot be told from ids without a template: the user's header before the first answer where none of an answer is
there to compare it with; " ASSISTANT:" behind the only turn of a prompt; turns of formats without any end-of-turn id;
tools whose messages have the user's role (Qwen) or stand behind a closed answer (Mistral); a system prompt inside the
user's turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hawk_compile.plan.chat import Row, Span, is_in, places

HEADER = 16
"""Ids of the longest header for an answer that is looked for, what a template puts there of thoughts included."""
LEAD = 2
"""Ids that may stand before the first header of a row."""
ROLE = 3
"""Ids of the longest role."""
SUFFIX = 8
"""Ids of the longest header inside a user's turn."""


@dataclass(frozen=True)
class Header:
    """How the header of an answer, T, lies over the start of a user's segment.

    Attributes:
        length: ids of the user's header.
        core: ids of T that are header for sure; behind them may stand what opens an answer's thoughts.
        shared: ids that both have before the role.
        role: the user's role.
    """

    length: int
    core: int
    shared: int
    role: tuple[int, ...]


def users_turns(ids: Row, visual: NDArray[np.bool_], ends: Row, named: bool = False) -> tuple[list[Span], bool]:
    """The users' turns of a row, oldest first, the last the newest, and whether they begin behind a known header.

    Args:
        ids: [N] int64, without padding; negative where an id is not known.
        visual: [N] bool.
        ends: ids that end a turn.
        named: whether the row holds an id that its model names as closing an image; where nothing else tells, that
            speaks for formats where one id closes both roles.
    """
    # What is not known, and what visual tokens hold, equals nothing.
    ids = np.where(visual | (ids < 0), -2 - np.arange(len(ids)), ids)
    edges = np.flatnonzero(is_in(ids, ends))
    starts, stops = [0, *(edges + 1).tolist()], [*edges.tolist(), len(ids)]
    closed = [(start, stop) for start, stop in zip(starts[:-1], stops[:-1], strict=True) if stop > start]
    tail = (starts[-1], stops[-1])
    if not closed:
        return [tail], False
    row = Segments(ids, visual, closed, tail, named)
    return row.both_roles() if row.ends_with_header() else row.answers_closed()


class Segments:
    """A row cut at its end-of-turn ids."""

    def __init__(self, ids: Row, visual: NDArray[np.bool_], closed: list[Span], tail: Span, named: bool):
        self.named = named
        self.ids, self.visual, self.closed, self.tail = ids, visual, closed, tail
        self.heads = [head(ids, span) for span in closed]
        self.end = head(ids, tail)
        self.lies = self.lay(self.end, len(closed) - 1)

    def lay(self, header: list[int], place: int, role_last: bool = False) -> Header | None:
        """Lay an answer's header over the start of a closed segment."""
        start, stop = self.closed[place]
        return lay_over(header, self.heads[place], self.ids[start:stop], first=place == 0, role_last=role_last)

    def ends_with_header(self) -> bool:
        """Whether what stands behind the last end of a turn is no user's turn."""
        end, last = self.end, self.heads[-1]
        if not end:
            return True
        if self.visual[slice(*self.tail)].any() or len(end) > HEADER:
            return False
        behind = self.heads[1:]
        if behind and last[: len(end)] == end:
            return len(end) <= 2  # what separates all turns; more is a question that was asked before
        if any(each[: len(end)] == end for each in behind):
            return alike(end, last) == 0 or self.lies is not None or len(end) <= 4
        if self.image_before_last() and not self.answered_by_core():
            return len(end) <= 2 and not self.opens_and_closes()
        if self.lies is not None and self.lies.shared:
            return True
        if self.first_match()[1] >= 2:
            return False
        if self.lies is not None or (self.named and len(self.closed) == 1 and not self.first_match()[1]):
            return True
        return len(end) <= 2 and not self.opens_and_closes()

    def image_before_last(self) -> bool:
        return bool(self.visual[: self.closed[-1][0]].any())

    def answered_by_core(self) -> bool:
        """Whether some earlier segment begins like the header, but for the thoughts that it opens."""
        return self.lies is not None and any(
            alike(self.end, each) >= self.lies.core > alike(self.end, self.heads[-1]) for each in self.heads[1:-1]
        )

    def opens_and_closes(self) -> bool:
        """Whether two ids stand around the text of the last segment: a user's turn without text."""
        if len(self.end) != 2 or self.end[0] == self.end[1]:
            return False
        segment = self.ids[slice(*self.closed[-1])]
        opens = places(segment, self.end[:1])
        return len(opens) > 0 and self.end[1] in segment[opens[0] + 1 : -1]

    def first_match(self) -> tuple[int, int]:
        """(where, how many): the longest start of the tail that stands in the first segment before its image."""
        start, stop = self.closed[0]
        seen = np.flatnonzero(self.visual[start:stop])
        if len(seen):
            stop = start + int(seen[0])
        best = (start, 0)
        for place in places(self.ids[start:stop], self.end[:1]).tolist():
            count = alike(self.end, self.ids[start + place : min(stop, start + place + len(self.end))].tolist())
            if count > best[1]:
                best = (start + place, count)
        return best

    # One id closes both roles.

    def both_roles(self) -> tuple[list[Span], bool]:
        """Segments that an answer follows, and the last; of these, those with the first one's role."""
        count = len(self.closed)
        header = self.end if self.end and self.heads[-1][: len(self.end)] != self.end else []
        lies = self.lies if header else None
        core = header[: lies.core] if lies is not None else header
        if header:
            answers = {place for place in range(1, count) if self.heads[place][: len(core)] == core}
            users = [place for place in range(count) if place not in answers and place + 1 in {*answers, count}]
        else:
            users = list(range(count - 1, 0 if count % 2 == 0 else -1, -2))[::-1]
            header = common_header(*self.heads[-2:]) or self.header_by_role(users) if count > 1 else []
        over = {
            place: lies if lies is not None and place == count - 1 else self.lay(header, place, role_last=lies is None)
            for place in users
        }
        roles = {place: header.role for place, header in over.items() if header is not None}
        first = roles.get(users[0]) if users else None
        kept = [place for place in users if first is None or roles.get(place, first) == first]
        known = bool(kept) and over[kept[-1]] is not None
        return [self.after(self.closed[place], over[place]) for place in kept], known

    def header_by_role(self, users: list[int]) -> list[int]:
        """The header of an answer whose last id is the role: where the newest turn and the first have another one in
        common, behind an id that all turns begin with; empty if they have not."""
        answer, user = self.heads[-2:]
        shared = alike(answer, user)
        same_role = shared and len(users) > 1 and len(places(self.ids[slice(*self.closed[users[0]])][: HEADER + LEAD],
                                                             user[shared - 1 : shared + 1]))  # fmt: skip
        return answer[: shared + 1] if same_role else []

    def after(self, span: Span, header: Header | None) -> Span:
        start, stop = span
        return (start if header is None else min(stop, start + header.length), stop)

    # An id closes answers only.

    def answers_closed(self) -> tuple[list[Span], bool]:
        """The user's part of each segment, and what stands behind the last."""
        place, shared = self.first_match()
        count = min([alike(self.end, each) for each in self.heads[1:]] + ([shared] if shared else []), default=0)
        count = count if count < len(self.end) else 0  # the same question again, not a header
        starts = [place + count if shared else self.closed[0][0], *(start + count for start, _ in self.closed[1:])]
        tail = (self.tail[0] + count, self.tail[1])
        bodies = [(start, stop) for start, (_, stop) in zip(starts, self.closed, strict=True)]
        suffix = self.answer_header(bodies, tail)
        if not suffix:
            return [*bodies, tail], count > 0
        bodies = [(start, start + int(places(self.ids[start:stop], suffix)[0])) for start, stop in bodies]
        return [*bodies, (tail[0], tail[1] - len(suffix))], count > 0

    def answer_header(self, bodies: list[Span], tail: Span) -> list[int]:
        """The longest end of the tail that stands in every earlier segment before its answer; empty if none does."""
        length = tail[1] - tail[0]
        for count in range(min(SUFFIX, length), 0, -1):
            suffix = self.ids[tail[1] - count : tail[1]].tolist()
            matches = [places(self.ids[start : stop - 1], suffix) for start, stop in bodies]
            if not all(map(len, matches)):
                continue
            behind = [int(self.ids[start + at[0] + count]) for (start, _), at in zip(bodies, matches, strict=True)]
            if len(behind) > 1 and len({*behind}) == 1:
                continue  # the same id behind it in all turns: more of a header, not answers
            if count < length:
                return suffix
            text = max(int((~self.visual[start : start + at[0]]).sum())
                       for (start, _), at in zip(bodies, matches, strict=True))  # fmt: skip
            # Nothing but this: a turn without text, or, where none had another text, the same question again.
            return suffix if text > 2 or (text and count <= 2) else []
        return []


def head(ids: Row, span: Span) -> list[int]:
    """The first ids of a segment, enough to see whether it is, or begins with, a header."""
    start, stop = span
    return ids[start : min(stop, start + HEADER + LEAD + ROLE)].tolist()


def alike(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two rows have in common at their start."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def common_header(answer: list[int], user: list[int]) -> list[int]:
    """The header at the start of an answer's segment: as the user's but for one id; empty if there is no such."""
    shared = alike(answer, user)
    behind = alike(answer[shared + 1 :], user[shared + 1 :])
    return answer[: shared + 1 + behind] if shared and behind else []


def lay_over(
    header: list[int], segment: list[int], whole_segment: Row, first: bool, role_last: bool = False
) -> Header | None:
    """Lay an answer's header over the start of a user's segment: the same but for the role, or None.

    Args:
        segment: its first ids; `whole_segment` has all of them.
        first: whether it is the first segment of the row, before which stands no end of a turn: what separates turns
            is missing in it, and ids that begin the row may stand before.
        role_last: whether the role may be the header's last id, one for each role. It is no evidence of a header then,
            since any text differs somewhere, but where the header is known it says how long the user's is.
    """
    candidates: list[tuple[tuple[int, ...], Header]] = []
    for skip in range(2 if first else 1):
        for lead in range(LEAD + 1 if first else 1):
            ours, theirs = header[skip:], segment[lead:]
            shared = alike(ours, theirs)
            for ours_role in range(1, ROLE + 1):
                for their_role in range(1, ROLE + 1):
                    behind, wanted = theirs[shared + their_role :], ours[shared + ours_role :]
                    ends = role_last and not wanted and shared and ours_role == their_role == 1
                    if not ends and (
                        behind[:1] != wanted[:1] or not wanted or (not shared and ours_role + their_role > 4)
                    ):
                        continue
                    count = alike(wanted, behind)
                    whole = count == len(wanted)
                    length = lead + shared + their_role + count
                    # What closes the question in this segment too is no header of an answer's thoughts.
                    if not whole and (not shared or wanted[-1] in whole_segment[length:]):
                        continue
                    role = tuple(theirs[shared : shared + their_role])
                    core = skip + shared + ours_role + count
                    cost = (-shared, ours_role + their_role, not whole, skip + lead)
                    candidates.append((cost, Header(length, core, shared, role)))
    return min(candidates, key=lambda candidate: candidate[0])[1] if candidates else None
