"""What is changed for the whole process as long as something needs it."""

import threading
import weakref
from abc import ABC, abstractmethod
from typing import Any


class WhileUsed(ABC):
    """A change of code of others, which is undone once nothing is left that needs it. Subclasses say which."""

    def __init__(self) -> None:
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self.lock = threading.RLock()
        """Guards them, and what subclasses note; a user that is collected may come back to a thread that has it."""

    def begin(self, user: Any, *args: Any) -> None:
        """Until `end`, or for as long as the user lives."""
        with self.lock:
            weakref.finalize(user, self.put_back).atexit = False
            self.users.add(user)
            self.change(*args)

    def end(self, user: Any) -> None:
        with self.lock:
            self.users.discard(user)
            self.put_back()

    def put_back(self) -> None:
        with self.lock:
            if not [*self.users]:  # of the living; its length counts one that is dying
                self.undo()

    @abstractmethod
    def change(self, *args: Any) -> None:
        """Make the change; nothing where it is made."""

    @abstractmethod
    def undo(self) -> None:
        """Undo what `change` did, apart from what others have changed since; nothing where nothing is changed."""
