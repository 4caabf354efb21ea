"""What a run is asked to do between its steps, by signals and by the clock: to save, or to save and end."""

import contextlib
import enum
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rag_jax.distributed import sharding

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EACH_DEVICE = PartitionSpec(sharding.AXES)


class Request(enum.IntEnum):
    """What one process can ask of all of them; of several requests the highest holds."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the number of the first signal to end; a second one ends the process as if we were not here."""
    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        received.append(number)
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Requests:
    """What this process asks for, after a signal or every `save_every_s` seconds (0: never), and what all agreed on.

    A process that is not alone hands its request to its next step, and all of them take the highest one out of it: so
    they save, or end, after the same step.
    """

    def __init__(self, received: list[int], save_every_s: float):
        self.received, self.save_every_s, self.saved_at = received, save_every_s, time.monotonic()
        self.agreed = Request.NOTHING

    def own(self) -> Request:
        if self.received:
            return Request.STOP
        due = self.save_every_s and time.monotonic() - self.saved_at >= self.save_every_s
        return Request.SAVE if due else Request.NOTHING

    @property
    def stopped_by(self) -> int:
        """The number of the signal that ends the run, 0: none. Of another process's signal only that there was one."""
        if self.received:
            return self.received[0]
        return signal.SIGTERM if self.agreed == Request.STOP else 0

    def for_step(self, mesh: Mesh) -> jax.Array | None:
        """The own request as the step takes it, (devices,) int32; None for a process alone, which knows already."""
        if jax.process_count() == 1:
            return None
        own = np.array([self.own()], np.int32)
        return jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, EACH_DEVICE), lambda _: own)

    def hear(self, request: int) -> None:
        """From now on it holds for this process too."""
        self.agreed = max(self.agreed, Request(request))

    def saved(self) -> None:
        self.saved_at = time.monotonic()
        if self.agreed == Request.SAVE:
            self.agreed = Request.NOTHING
