"""Where the numbers of a run go: metrics.jsonl, TensorBoard."""

import json
import math
import pathlib
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import histogram, text

from rag_jax import files
from rag_jax.errors import UserError
from rag_jax.training import trackers
from rag_jax.training.pictures import Picture, pictures

# Of evaluated rows on TensorBoard's pages: how many are shown as text, and bins of a histogram of scores.
TEXTS, BINS = 8, 30


@runtime_checkable
class Sink(Protocol):
    """One place that the scalars of a run go to."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class RowSink(Sink, Protocol):
    """One that evaluated rows go to as well."""

    def write_rows(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...


class JsonLines:
    """`metrics.jsonl`, one object a line: what a run goes on from, so it stops where a line cannot be written."""

    def __init__(self, workdir: pathlib.Path, start_step: int):
        path = workdir / "metrics.jsonl"
        self.kept = _cut_back(path, start_step)
        # Unbuffered: what was written stays, however the process ends.
        self._file = open(path, "ab", buffering=0)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        # JSON knows no NaN: null stands for it, so that every reader can go on reading.
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        _write_whole(self._file, json.dumps({"step": step, **finite}).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """`tensorboard/`, a new file for each process."""

    def __init__(self, workdir: pathlib.Path, start_step: int):
        self._workdir = workdir
        self._file = open(_next_board(workdir / "tensorboard"), "xb", buffering=0)
        self._event(Event(file_version="brain.Event:2"))
        # Makes TensorBoard forget what earlier files hold about this step and later ones.
        restart = SessionLog(status=SessionLog.START)
        self._event(Event(session_log=restart, step=start_step + 1 if start_step else 0))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()])
        self._event(Event(summary=summary, step=step))

    def write_rows(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Some rows as text, histograms of the scores of right and of other passages, and the report's plots."""
        texts = [text(f"rows/{i + 1}", in_markdown(row)) for i, row in enumerate(rows[:TEXTS])]
        scores: dict[str, list[float]] = {"right": [], "others": []}
        for row in rows:
            for found in row.get("retrieved", ()):
                scores["right" if found["relevant"] else "others"].append(found["score"])
        histograms = [
            histogram(f"scores/{name}", np.asarray(values), BINS) for name, values in scores.items() if values
        ]
        images = [
            Summary(value=[Summary.Value(tag=f"report/{name}", image=in_summary(picture))])
            for name, picture in pictures(self._workdir, step).items()
        ]
        for summary in (*texts, *histograms, *images):
            self._event(Event(summary=summary, step=step))

    def close(self) -> None:
        self._file.close()

    def _event(self, event: Any) -> None:
        """Append it: its length, the length's checksum, the event, its checksum."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        size = struct.pack("<Q", len(content))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (size, content)]
        _write_whole(self._file, size + sums[0] + content + sums[1])


def in_summary(picture: Picture) -> Any:
    rgba = 4
    return Summary.Image(height=picture.height, width=picture.width, colorspace=rgba, encoded_image_string=picture.png)


def in_markdown(row: Mapping[str, Any]) -> str:
    """A row for TensorBoard's page of texts, as code: nothing of it is read as Markdown."""
    lines = {"question": row.get("query"), "right answer": row.get("answer"), "answer": row.get("generated")}
    lines |= {f"passage {i}": found["passage"] for i, found in enumerate(row.get("retrieved", ())[:3], start=1)}
    shown = (f"    {name}: {' '.join(str(value).split())}" for name, value in lines.items() if value is not None)
    return "\n".join(shown)


# The files that every run is recorded in.
SINKS = (JsonLines, TensorBoard)


class Writer:
    """Hands the scalars of a run to all sinks; none for the processes that write nothing."""

    def __init__(self, sinks: Sequence[Sink]):
        self.sinks = tuple(sinks)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Values by their names of the contract; those that are None are left out."""
        scalars = {name: float(value) for name, value in values.items() if value is not None}
        for sink in self.sinks:
            sink.write(int(step), scalars)

    def write_rows(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of an evaluation, to the sinks that show them."""
        for sink in self.sinks:
            if isinstance(sink, RowSink):
                sink.write_rows(int(step), rows)

    def written(self, name: str) -> list[float | None]:
        """A metric's values in the lines that earlier processes left in `metrics.jsonl`; None for a non-finite one."""
        lines = [line for sink in self.sinks if isinstance(sink, JsonLines) for line in sink.kept]
        return [line[name] for line in lines if name in line]

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def open_writer(
    workdir: pathlib.Path,
    start_step: int = 0,
    *,
    active: bool = True,
    services: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Writer:
    """The writer of a run that goes on after `start_step` (0: begins); not `active`: one that writes nothing.

    `services`: keys of `trackers.TRACKERS`, which get the config too.

    What an earlier process wrote about later steps, and a line it did not finish, is taken out, so that every step
    stands there once.
    """
    if not active:
        return Writer([])
    workdir.mkdir(parents=True, exist_ok=True)
    further = [trackers.Background(name, workdir, config or {}, start_step) for name in services]
    return Writer([*(sink(workdir, start_step) for sink in SINKS), *further])


def _write_whole(file: BinaryIO, content: bytes) -> None:
    """UserError where the disk does not take all of it; the next start cuts off what it took."""
    try:
        while content:
            content = content[file.write(content) :]
    except OSError as error:
        raise UserError(f"{file.name}: {error.strerror}; fix that, and the same command goes on") from error


def _next_board(folder: pathlib.Path) -> pathlib.Path:
    """TensorBoard reads its files in the order of their numbers: this one last, whatever the clock says."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.[0-9]*.*")]
    number = max([int(time.time()), *(number + 1 for number in numbers)])
    return folder / f"events.out.tfevents.{number:010d}.{socket.gethostname()}"


def _cut_back(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
    """Keep the whole lines of steps up to `step`; none of them for step 0, where a run begins anew. What they hold."""
    if not path.is_file():
        return []
    kept, records = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if step and isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
            kept.append(line + "\n")
            records.append(record)
    files.write_whole(path, "".join(kept))
    return records
