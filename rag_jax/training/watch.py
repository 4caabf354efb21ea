"""Watches a run's numbers: for non-finite losses and gradients, and for loss spikes."""

import collections
import math
import pathlib
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from rag_jax import files
from rag_jax.errors import UserError

FOLDER = "failed"
WATCHED = ("loss/total", "optim/grad_norm")
# A spike is measured against the median of the last lines of metrics.jsonl: of at most so many, and at least so many.
WINDOW, FEWEST = 32, 8


class NonFinite:
    """Ends the run at a non-finite loss or gradient norm, or counts the update as skipped.

    The step itself leaves out such updates where `allowed` is above 0 (see `step`); here they are counted:
    `skipped` of them came before this process. `rows_of(step)` are the rows of its batch. `write`: whether this
    process writes the file.
    """

    def __init__(
        self, workdir: pathlib.Path, allowed: int, skipped: int, rows_of: Callable[[int], np.ndarray], write: bool
    ):
        self.workdir, self.allowed, self.skipped, self.rows_of, self.write = workdir, allowed, skipped, rows_of, write

    def check(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """A line about an update that was skipped; None for a good one. UserError when no more may be skipped."""
        wrong = {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}
        if not any(name in wrong for name in WATCHED):
            return None
        skips = self.skipped < self.allowed
        replay = f"python -m rag_jax.replay --workdir={shlex.quote(str(self.workdir))} --step={step}"
        path = self.workdir / FOLDER / f"step_{step}.json"
        if self.write:
            finite = {name: value for name, value in numbers.items() if name not in wrong}
            rows = [int(row) for row in self.rows_of(step)]
            content = {"step": step, "skipped": skips, "not_finite": wrong, "finite": finite, "rows": rows}
            files.write_json(path, content | {"replay": replay})
        shown = ", ".join(f"{name} is {value}" for name, value in wrong.items())
        if skips:
            self.skipped += 1
            return f"step {step}: {shown}; its update is skipped ({self.skipped} of {self.allowed}), see {path}"
        already = f" and {self.skipped} updates were skipped already" if self.allowed else ""
        raise UserError(
            f"{shown} at step {step}{already}; that step was not saved. {path} has its rows, and {replay} shows which "
            "of them it is; lower optimizer.learning_rate, raise objective.temperature, or let updates be skipped with "
            "guard.skip_nonfinite"
        )


class Spikes:
    """Losses above `factor` times the median of those written lately; 0: none are looked for.

    `written` are the losses of the lines so far, so that a run that goes on judges like one that was never stopped.
    """

    def __init__(self, factor: float, written: Iterable[float | None]):
        self.factor, self.written = factor, collections.deque[float](maxlen=WINDOW)
        for loss in written:
            self.add(loss)

    def add(self, loss: float | None) -> None:
        """A loss that stands in metrics.jsonl; None for a non-finite one."""
        if loss is not None and math.isfinite(loss):
            self.written.append(loss)

    def ratio(self, loss: float) -> float | None:
        """How many times the median a loss is, if that is too many."""
        if not self.factor or len(self.written) < FEWEST or not math.isfinite(loss):
            return None
        median = statistics.median(self.written)
        return loss / median if median > 0 and loss > self.factor * median else None
