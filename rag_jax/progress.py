"""How far a long piece of work is: a bar on a terminal, elsewhere a line now and then, so that no log is silent."""

import sys
import time
from typing import Any

from tqdm import tqdm

# Between lines where there is no terminal, seconds.
LINE_EVERY_S = 20.0


class Counter:
    """Things done, of `total`, of which `done` were done before; not `active`: says nothing, as all but one process."""

    def __init__(self, label: str, total: int, *, done: int = 0, active: bool = True):
        self.label, self.total, self.start, self.done, self.active = label, total, done, done, active
        self.began = self.last_line = time.monotonic()
        bar = active and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=label, leave=False, mininterval=1.0) if bar else None

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, num: int) -> None:
        """`num` more are done."""
        self.done += num
        if self._bar is not None:
            self._bar.update(num)
        elif self.active and self.start < self.done < self.total:
            now = time.monotonic()
            if now - self.last_line >= LINE_EVERY_S:
                self.last_line = now
                left = clock((now - self.began) / (self.done - self.start) * (self.total - self.done))
                print(f"{self.label}: {self.done:,} of {self.total:,}, {left} left", file=sys.stderr, flush=True)


class Progress:
    """Steps of a run that are done, loss and time left."""

    def __init__(self, total_steps: int, start_step: int = 0, *, active: bool = True):
        self.total, self.start, self.active = total_steps, start_step, active
        self.began = self.last_line = time.monotonic()
        bar = active and sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True) if bar else None

    def update(self, step: int, loss: float) -> None:
        """`step` steps are done; `loss` is the newest total."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif self.active:
            now = time.monotonic()
            if step in (self.start + 1, self.total) or now - self.last_line >= LINE_EVERY_S:
                self.last_line = now
                step_s = (now - self.began) / max(1, step - self.start)
                left = clock(step_s * (self.total - step))
                self.print(f"step {step}/{self.total}  loss {loss:.4f}  {step_s:.2f} s a step  {left} left")

    def pause(self, seconds: float) -> None:
        """Leave time that was no step's out of the time left."""
        self.began += seconds
        if self._bar is not None:
            self._bar.start_t += seconds

    def print(self, text: str) -> None:
        """A line of text that does not tear the bar."""
        if self.active:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
