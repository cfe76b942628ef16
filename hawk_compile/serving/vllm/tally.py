"""How many visual tokens came in and how many were kept: in a line of the log each minute, and in vLLM's metrics."""

import atexit
import functools
import logging
import threading
from typing import Any

INTERVAL = 60.0
"""Seconds from the first item that no line has told of to the line."""

logger = logging.getLogger("vllm.hawk")


@functools.cache
def of_process() -> "Tally":
    """The tally that all processors of this process share."""
    tally = Tally(*counters())
    atexit.register(tally.tell)
    return tally


def counters() -> tuple[Any, Any]:
    """(visual tokens that came, those kept), among those that the server shows under /metrics; made once."""
    from prometheus_client import Counter

    return (
        Counter("hawk:visual_tokens", "Visual tokens that came in."),
        Counter("hawk:kept_visual_tokens", "Visual tokens that were kept."),
    )


class Tally:
    """Counts over requests; safe to be shared by threads.

    Every item is told of within a minute, whether another one comes or not.

    Args:
        all_came, all_kept: which also count, for ever.
    """

    def __init__(self, all_came: Any, all_kept: Any) -> None:
        self.lock = threading.Lock()
        self.items = self.came = self.kept = 0
        self.all_came, self.all_kept = all_came, all_kept
        self.timer: threading.Timer | None = None

    def count(self, came: int, kept: int) -> None:
        """One item with `came` visual tokens, of which `kept` stay."""
        self.all_came.inc(came)
        self.all_kept.inc(kept)
        with self.lock:
            self.items, self.came, self.kept = self.items + 1, self.came + came, self.kept + kept
            if self.timer is None:
                self.timer = threading.Timer(INTERVAL, self.tell)
                self.timer.daemon = True
                self.timer.start()

    def tell(self) -> None:
        """Write the line, if there is anything to tell."""
        with self.lock:
            items, came, kept = self.items, self.came, self.kept
            self.items = self.came = self.kept = 0
            self.timer = None
        if came:
            logger.info(
                "hawk: %d images and videos, %d visual tokens came in, %d were kept (%.2f)",
                items, came, kept, kept / came,
            )  # fmt: skip
