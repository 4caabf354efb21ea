"""Services that a run's numbers are sent to beside its own files: Weights & Biases, MLflow, Trackio.

Each is a class that begins a run there and sends numbers. All run in a thread of their own: one that fails, refuses or
hangs costs the training nothing but one line of warning.
"""

import importlib
import importlib.util
import os
import pathlib
import queue
import re
import sys
import threading
from collections.abc import Mapping
from typing import Any

from rag_jax import untrusted
from rag_jax.errors import UserError

PROJECT = "rag_jax"  # of a run, where the environment names no other
# Seconds that the end of a run waits for what was not sent yet.
PATIENCE_S = 30.0
# Lines that wait to be sent; of a service that has stopped taking them, the newest are let go.
MOST_WAITING = 10_000


class Wandb:
    """Weights & Biases. Neither code nor what git says of it is sent."""

    module = "wandb"

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start_step: int):
        wandb = importlib.import_module(self.module)
        settings = wandb.Settings(disable_code=True, disable_git=True, save_code=False, console="off")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=workdir.name, id=name_of(workdir),
            resume="allow" if start_step else None, dir=str(workdir), config=dict(config), settings=settings,
        )  # fmt: skip

    def send(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def finish(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI."""

    module = "mlflow"

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start_step: int):
        self._mlflow = importlib.import_module(self.module)
        self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        kept = workdir / ".mlflow_run"
        known = kept.read_text(encoding="utf-8") if start_step and kept.is_file() else None
        run = self._mlflow.start_run(run_id=known, run_name=None if known else workdir.name)
        if known is None:
            kept.write_text(run.info.run_id, encoding="utf-8")
            self._mlflow.log_params({key: str(value)[:500] for key, value in config.items()})

    def send(self, step: int, scalars: Mapping[str, float]) -> None:
        named = {re.sub(r"[^\w./ -]", "_at_", name): value for name, value in scalars.items()}
        self._mlflow.log_metrics(named, step=step)

    def finish(self) -> None:
        self._mlflow.end_run()


class Trackio:
    """Trackio, on this machine or, with TRACKIO_SPACE_ID, in a space of the hub."""

    module = "trackio"

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start_step: int):
        self._trackio = importlib.import_module(self.module)
        resume = "allow" if start_step else "never"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._trackio.init(project=project, name=name_of(workdir), config=dict(config), resume=resume)

    def send(self, step: int, scalars: Mapping[str, float]) -> None:
        self._trackio.log(dict(scalars), step=step)

    def finish(self) -> None:
        self._trackio.finish()


TRACKERS = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def check(names: tuple[str, ...]) -> None:
    """UserError for a service whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(TRACKERS[name].module) is None:
            raise UserError(f"log.trackers={names}: {name} is not installed; pip install {name}, or take it out")


def name_of(workdir: pathlib.Path) -> str:
    """Of a run, of characters that every service takes."""
    return re.sub(r"[^\w.-]", "_", workdir.resolve().name)[:100] or "run"


class Background:
    """A sink that hands numbers to a service in a thread of its own."""

    def __init__(self, name: str, workdir: pathlib.Path, config: Mapping[str, Any], start_step: int):
        self.name, self._begin = name, (workdir, config, start_step)
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._failed = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._put((step, scalars))

    def close(self) -> None:
        self._put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._warn(f"has not taken all within {PATIENCE_S:.0f} s")

    def _put(self, item: tuple[int, Mapping[str, float]] | None) -> None:
        if not self._failed:
            try:
                self._waiting.put_nowait(item)
            except queue.Full:
                self._warn("takes nothing any more")

    def _run(self) -> None:
        try:
            tracker = TRACKERS[self.name](*self._begin)
            while (item := self._waiting.get()) is not None:
                tracker.send(*item)
            tracker.finish()
        except BaseException as error:  # any kind, of a package that is not ours; some raise SystemExit
            self._warn(f"failed ({type(error).__name__}: {untrusted.one_line(error, 200)})")

    def _warn(self, what: str) -> None:
        if not self._failed:
            self._failed = True
            print(
                f"log.trackers: {self.name} {what}; the run goes on, and all numbers are in metrics.jsonl",
                file=sys.stderr, flush=True,
            )  # fmt: skip
