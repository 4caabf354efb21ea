"""Questions from many at once, answered by one thread: those that wait are taken together, as one batch."""

import collections
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rag_jax.errors import UserError

# Questions that may wait; who comes after them is told to come again.
MOST_WAITING = 256

# (number of a question among those asked, what is known of its answer)
Answering = Callable[[Sequence[str]], Iterable[tuple[int, Any]]]
# Told of (name of a pair, what is known of its answer), and at last of (None, None) or (None, an error).
Told = Callable[[str | None, Any], None]


class Busy(Exception):
    """So many questions wait that no other is taken."""


class Asked:
    """A question that waits or is being answered. `left`: nobody wants its answer any more."""

    def __init__(self, question: str, tell: Told):
        self.question, self.tell, self.left = question, tell, False


class Engine:
    """Answers by one or several pairs of models, one after the other, in a thread of its own."""

    def __init__(self, pairs: Mapping[str, Answering], batch_size: int, most_waiting: int = MOST_WAITING):
        self._pairs, self._batch_size, self._most_waiting = pairs, batch_size, most_waiting
        self._waiting: collections.deque[Asked] = collections.deque()
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def ask(self, question: str, tell: Told) -> Asked:
        """Queue a question; `tell` is called in the engine's thread. Raises Busy."""
        asked = Asked(question, tell)
        with self._changed:
            if len(self._waiting) >= self._most_waiting:
                raise Busy
            self._waiting.append(asked)
            self._changed.notify()
        return asked

    def close(self) -> None:
        """What is being answered is finished; what waits is not begun."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._answer(batch)

    def _next(self) -> list[Asked] | None:
        """The longest waiting questions, as soon as there is one; None at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._ending)
                if self._ending:
                    return None
                batch = []
                while self._waiting and len(batch) < self._batch_size:
                    asked = self._waiting.popleft()
                    batch += [] if asked.left else [asked]
                if batch:
                    return batch

    def _answer(self, batch: list[Asked]) -> None:
        try:
            for name, answering in self._pairs.items():
                for number, known in answering([asked.question for asked in batch]):
                    batch[number].tell(name, known)
        except UserError as error:
            if len(batch) == 1:
                batch[0].tell(None, error)
            for asked in batch if len(batch) > 1 else ():  # one of them is to blame: the others get their answers
                self._answer([asked])
        except Exception as error:  # whatever it is, the next question is answered
            logging.getLogger(__name__).exception("questions were not answered")
            for asked in batch:
                asked.tell(None, error)
        else:
            for asked in batch:
                asked.tell(None, None)
