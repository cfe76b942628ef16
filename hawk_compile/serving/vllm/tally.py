"""How many visual tokens came in and how many were kept, in a line of the log each minute."""

import logging
import threading
import time

INTERVAL = 60.0
"""Seconds between two lines."""

logger = logging.getLogger("vllm.hawk")


class Tally:
    """Counts over all requests of one process; safe to be shared by threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.items = self.came = self.kept = 0
        self.told = time.monotonic()

    def count(self, came: int, kept: int) -> None:
        """One item with `came` visual tokens, of which `kept` stay."""
        with self.lock:
            self.items, self.came, self.kept = self.items + 1, self.came + came, self.kept + kept
            now = time.monotonic()
            if now - self.told < INTERVAL:
                return
            line = (self.items, self.came, self.kept, self.kept / self.came)
            self.items = self.came = self.kept = 0
            self.told = now
        logger.info("hawk: %d images and videos, %d visual tokens came in, %d were kept (%.2f)", *line)
