"""What is changed for the whole process as long as something needs it."""

import weakref
from abc import ABC, abstractmethod
from typing import Any

from hawk_compile.capture.dynamo import capture_lock, is_capturing


class WhileUsed(ABC):
    """A change of code of others, which is undone once nothing is left that needs it. Subclasses say which.

    Nothing changes in the middle of a capture, which would be guarded by halves: what changes waits for its end.
    """

    def __init__(self) -> None:
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()

    def begin(self, user: Any, *args: Any) -> None:
        """Until `end`, or for as long as the user lives."""
        with capture_lock:
            weakref.finalize(user, self.put_back_soon).atexit = False
            self.users.add(user)
            self.change(*args)

    def end(self, user: Any) -> None:
        with capture_lock:
            self.users.discard(user)
            self.put_back()

    def put_back(self) -> None:
        if not [*self.users]:  # of the living; its length counts one that is dying
            self.undo()

    def put_back_soon(self) -> None:
        """Where a user was collected, which may be in the middle of a capture: then what ends next puts it back."""
        if capture_lock.acquire(blocking=False):
            try:
                if not is_capturing():
                    self.put_back()
            finally:
                capture_lock.release()

    @abstractmethod
    def change(self, *args: Any) -> None:
        """Make the change; nothing where it is made."""

    @abstractmethod
    def undo(self) -> None:
        """Undo what `change` did, apart from what others have changed since; nothing where nothing is changed."""
