"""The soak: a run that is interrupted again and again must end with the bits of one that never was.

    python -m benchmarks.soak [--interruptions=50] [--seed=0] [--out=DIR]

Trains the tiny config with dropout, shuffling, groups, buckets and bfloat16, alone and in two processes, and stops it
at random moments: SIGKILL, SIGTERM, SIGKILL while a checkpoint is written, a full disk (a small tmpfs, where mounting
is permitted), and SIGKILL of an export beside it. At the end parameters, optimizer state, metrics.jsonl (times aside),
TensorBoard and eval files are compared with those of a run without a stop. Two runs that are gone on with wrongly must
be told apart. Exit 1 if not all holds.
"""

import argparse
import atexit
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rag_jax import cli, data
from rag_jax.training import setup
from rag_jax.workdir import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
EVERY = 3  # steps between checkpoints
DISK_MB = 64
TIMEOUT_S = 1200.0
# Of 50: 20 SIGKILL, 11 during a checkpoint write, 11 SIGTERM, 6 full disk, 2 export.
KINDS = {"kill": 20, "write": 11, "term": 11, "disk": 6, "export": 2}
VALUES = {
    "dtype": "bfloat16",
    "dropout": 0.1,
    "batch_size": 8,
    "group_size": 4,
    "objective.candidates": 2,
    "retriever.remat": "none",  # less to compile
    "generator.remat": "none",
    "eval.every_steps": 10**6,  # at the start and at the end
    "eval.rows": 8,
    "eval.answers": 2,
    "log.every_steps": 1,
    "checkpoint.every_steps": EVERY,
    "checkpoint.keep": 3,
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "constant",  # so that programs do not depend on the number of steps
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is kept, and what it takes."""

    folder: pathlib.Path  # of its workdir
    processes: int
    total_steps: int

    @property
    def workdir(self) -> pathlib.Path:
        return self.folder / "run"

    def training(self, rows: pathlib.Path) -> list[str]:
        """The words of the command."""
        values = VALUES | {"total_steps": self.total_steps, "data.train": rows, "data.eval": rows}
        overrides = [f"--config.{name}={value}" for name, value in values.items()]
        return ["main", f"--config={ROOT / 'configs' / 'tiny.py'}", f"--workdir={self.workdir}", *overrides]


class Process:
    """A command in a process forked from this one, which has imported all of it already: a start costs less so."""

    def __init__(self, words: list[str], log: pathlib.Path, environment: dict[str, str], mistake: str = ""):
        self.code: int | None = None
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                with open(log, "wb") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                os.environ.update(environment)
                sys.argv = words
                make_mistake(mistake)
                cli.run(importlib.import_module(f"rag_jax.{words[0]}").main)
            except SystemExit as ended:
                code = int(ended.code or 0)
                with contextlib.suppress(Exception):
                    atexit._run_exitfuncs()  # as at the end of a process of its own
            except BaseException:
                traceback.print_exc()
            os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Job:
    """The processes of one start of a run."""

    def __init__(self, place: Place, words: list[str], mistake: str = ""):
        # Beside its folder, which may be a disk that is filled up.
        self.logs = [place.folder.with_name(f"{place.folder.name}-log-{n}") for n in range(place.processes)]
        there = {}
        if place.processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{probe.getsockname()[1]}"
            there = {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
            there |= {"JAX_NUM_PROCESSES": str(place.processes), "RAG_JAX_START_TIMEOUT_S": "120"}
        sys.stdout.flush()
        self.running = [
            Process(words, log, there | ({"JAX_PROCESS_ID": str(n)} if there else {}), mistake)
            for n, log in enumerate(self.logs)
        ]

    def goes_on(self) -> bool:
        return all(process.poll() is None for process in self.running)

    def send(self, number: int, to: int) -> None:
        self.running[to].send(number)

    def end(self, patience_s: float = TIMEOUT_S) -> list[int]:
        """The exit codes of all; who still runs when another has ended and patience is over is killed."""
        deadline = time.monotonic() + TIMEOUT_S
        while any(process.poll() is None for process in self.running) and time.monotonic() < deadline:
            if not self.goes_on():
                deadline = min(deadline, time.monotonic() + patience_s)
                patience_s = TIMEOUT_S
            time.sleep(0.01)
        for process in self.running:
            process.send(signal.SIGKILL)
        while any(process.poll() is None for process in self.running):
            time.sleep(0.01)
        return [process.code or 0 for process in self.running]

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


def make_rows(path: pathlib.Path, seed: int) -> None:
    """64 rows, one of them much longer than the others: batches of two shapes."""
    rng = random.Random(seed)
    words = ["lamp", "keeper", "harbour", "oil", "tide", "bell", "storm", "rope", "gull", "stone"]
    lines = ["Question,Abstract,Answer"]
    for row in range(64):
        text = " ".join(rng.choices(words, k=10 if row == 21 else 3))
        lines.append(f"what of {row}?,{row} {text},{rng.choice(words)} {row}")
    path.write_text("\n".join(lines) + "\n")


def steps_written(workdir: pathlib.Path) -> int:
    """The newest step in metrics.jsonl."""
    try:
        with open(workdir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
            lines = file.read().split(b"\n")[1:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


def written_at(workdir: pathlib.Path) -> int:
    """When metrics.jsonl was written last."""
    try:
        return (workdir / "metrics.jsonl").stat().st_mtime_ns
    except OSError:
        return 0


def steps_saved(workdir: pathlib.Path) -> int:
    """The newest committed checkpoint's step, 0 without one."""
    return max((int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()), default=0)


def unfinished(workdir: pathlib.Path) -> list[pathlib.Path]:
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


@dataclasses.dataclass
class Interruption:
    kind: str
    codes: list[int]
    at_step: int
    saved: int
    said: str
    problem: str = ""


def interrupt(place: Place, kind: str, words: list[str], until: int, rng: random.Random) -> Interruption:
    """Start the job, let it come to step `until`, stop it, and see that it left what it must."""
    workdir, problem, before = place.workdir, "", written_at(place.workdir)
    job = Job(place, words)
    # Not before it writes itself: what the one before it wrote may lie beyond `until`.
    wait_for(job, lambda: written_at(workdir) != before and steps_written(workdir) >= until)
    if kind == "export":
        wait_for(job, lambda: steps_saved(workdir) > 0)
    time.sleep(rng.uniform(0, 0.1))
    filler = place.folder / "filler"
    if kind == "disk":
        stat = os.statvfs(place.folder)
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            file.write(bytes(max(0, stat.f_bavail * stat.f_frsize - rng.randrange(1 << 20))))
    elif kind == "write":
        # What an earlier process left is taken away by this one before it writes its own.
        wait_for(job, lambda: bool(unfinished(workdir)))
        time.sleep(rng.uniform(0, 0.05))
    elif kind == "export":
        problem = killed_export(place, rng)
    if kind == "term":
        job.send(signal.SIGTERM, rng.randrange(place.processes))
    elif kind != "disk":
        job.send(signal.SIGKILL, rng.randrange(place.processes))
    codes = job.end(patience_s=1.0 if kind in ("kill", "write", "export") else 60.0)
    at_step, saved = steps_written(workdir), steps_saved(workdir)
    if kind == "write" and not unfinished(workdir):
        kind = "kill"  # it was done a moment too early
    said = job.said()
    if kind == "disk":
        filler.unlink(missing_ok=True)
        if 2 not in codes or "rag_jax: error: " not in said:
            problem = "a full disk did not end it with exit code 2"
    if kind == "term" and (set(codes) != {128 + signal.SIGTERM} or saved != at_step):
        problem = "SIGTERM did not save and end all with 143"
    if "Traceback" in said:
        problem = "a traceback"
    return Interruption(kind, codes, at_step, saved, said, problem)


def wait_for(job: Job, ready: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while job.goes_on() and not ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"no progress in {TIMEOUT_S:.0f} s; it said:\n{job.said()}")
        time.sleep(0.001)


def killed_export(place: Place, rng: random.Random) -> str:
    """Kill an export while it writes: nothing may stand where the whole one would."""
    out = place.folder / "export"
    alone = dataclasses.replace(place, processes=1, folder=place.folder / "exporting")
    alone.folder.mkdir(exist_ok=True)
    job = Job(alone, ["export", f"--workdir={place.workdir}", f"--out={out}"])
    wait_for(job, lambda: any(place.folder.glob(".export-*")))
    time.sleep(rng.uniform(0, 0.05))
    job.send(signal.SIGKILL, 0)
    code = job.end()[0]
    for rest in place.folder.glob(".export-*"):
        shutil.rmtree(rest)
    return "" if code == -signal.SIGKILL and not out.exists() else f"a killed export (exit {code}) left {out}"


def result(place: Place) -> dict[str, Any]:
    """All that two runs must have in common, by name; found in a process of its own, so that this one can be forked."""
    file, child = place.folder.with_name(f"{place.folder.name}-result.json"), os.fork()
    if not child:
        try:
            file.write_text(json.dumps(_result(place)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"{place.workdir} cannot be read")
    return json.loads(file.read_text())


def _result(place: Place) -> dict[str, Any]:
    cli.quiet()
    found: dict[str, Any] = {}
    step = steps_saved(place.workdir)
    with checkpoint.Checkpoints(place.workdir) as checkpoints:
        found["saved steps"] = checkpoints.steps()
        problem = checkpoints.problem(step)
        assert problem is None, f"checkpoint {step}: {problem}"
    for item in checkpoint.ITEMS:
        with ocp.StandardCheckpointer() as reader:
            folder = place.workdir / "checkpoints" / str(step) / item
            shapes = reader.metadata(folder).item_metadata.tree
            wanted = {path: np.zeros(a.shape, a.dtype) for path, a in shapes.items()}
            for path, array in reader.restore(folder, wanted).items():
                content = f"{array.dtype} {array.shape}".encode() + np.asarray(array).tobytes()
                found[f"{item}/{path}"] = hashlib.blake2b(content).hexdigest()
    lines = [json.loads(line) for line in (place.workdir / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "throughput/")
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]
    steps = [line["step"] for line in lines if "loss/total" in line]
    found["each step once"] = steps == list(range(1, place.total_steps + 1)) or steps
    board = EventAccumulator(str(place.workdir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for tag in board.Tags()["scalars"]:
        if not tag.startswith(timed):
            found[f"TensorBoard {tag}"] = [[event.step, repr(event.value)] for event in board.Scalars(tag)]
    for path in sorted((place.workdir / "eval").iterdir()):
        found[f"eval/{path.name}"] = path.read_text()
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


@contextlib.contextmanager
def small_disk(folder: pathlib.Path) -> Iterator[bool]:
    """A tmpfs of DISK_MB on the folder; False where mounting is not permitted."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def uninterrupted(place: Place, rows: pathlib.Path) -> dict[str, Any]:
    job = Job(place, place.training(rows))
    if codes := [code for code in job.end() if code]:
        raise SystemExit(f"the run without a stop ended with {codes}; it said:\n{job.said()}")
    return result(place)


def soak(processes: int, kinds: list[str], folder: pathlib.Path, rng: random.Random) -> bool:
    """One run through all the interruptions; whether it ended as the run without one."""
    rows = folder / "rows.csv"
    make_rows(rows, rng.randrange(1 << 30))
    total_steps = EVERY * (6 + 4 * len(kinds) // 3)
    whole = Place(folder / "whole", processes, total_steps)
    whole.folder.mkdir()
    began = time.monotonic()
    expected = uninterrupted(whole, rows)
    print(
        f"\n{processes} process(es), {total_steps} steps; without a stop {time.monotonic() - began:.0f} s", flush=True
    )
    with small_disk(folder / "disk") as mounted:
        if not mounted and "disk" in kinds:
            print(f"mounting a tmpfs is not permitted here: {kinds.count('disk')} full disks are left out")
            kinds = [kind for kind in kinds if kind != "disk"]
        place = Place(folder / "disk", processes, total_steps)
        print(f"{'':>3}  {'kind':<7} {'from':>5} {'at':>5} {'saved':>5} {'lost':>4}  exit codes", flush=True)
        done, holds, lost_most = [], True, 0
        while kinds:
            kind, started = kinds.pop(), steps_saved(place.workdir)
            room = (total_steps - started - 2 * EVERY) / (len(kinds) + 1)
            until = started + rng.randint(1, max(1, min(2 * EVERY, int(room))))
            seen = interrupt(place, kind, place.training(rows), until, rng)
            done.append(seen.kind)
            if seen.kind != kind:
                kinds.insert(rng.randrange(len(kinds) + 1), kind)  # again, till it is hit
            lost = seen.at_step - seen.saved
            lost_most = max(lost_most, lost)
            holds &= not seen.problem
            line = f"{seen.kind:<7} {started:>5} {seen.at_step:>5} {seen.saved:>5} {lost:>4}  {seen.codes}"
            print(f"{len(done):>3}  {line} {seen.problem}", flush=True)
            if seen.problem:
                print(seen.said[-3000:], flush=True)
            if 0 in seen.codes:
                print("it came to its end; the rest of the interruptions is left out", flush=True)
                break
        job = Job(place, place.training(rows))
        codes = job.end()
        different = differences(result(place), expected) if not any(codes) else [f"exit codes {codes}: {job.said()}"]
    counts = ", ".join(f"{done.count(kind)} {kind}" for kind in KINDS)
    print(f"{len(done)} interruptions ({counts}); at most {lost_most} steps lost, a checkpoint every {EVERY}")
    print(f"{len(expected)} things compared; different: {', '.join(different) or 'none'}", flush=True)
    return holds and not different and lost_most < 2 * EVERY


def control(name: str, folder: pathlib.Path, rng: random.Random) -> bool:
    """Whether a run that goes on wrongly after one stop is told from one without."""
    rows = folder / "rows.csv"
    make_rows(rows, rng.randrange(1 << 30))
    expected = uninterrupted(Place(folder, 1, 3 * EVERY), rows)
    place = Place(folder / "wrong", 1, 3 * EVERY)
    place.folder.mkdir()
    interrupt(place, "term", place.training(rows), EVERY, rng)
    job = Job(place, place.training(rows), mistake=name)
    codes = job.end()
    different = differences(result(place), expected) if not any(codes) else []
    print(f"\ngone on with {name}: {len(different)} of {len(expected)} things are different, as they must", flush=True)
    return bool(different)


WRONG = ("moments of zero", "another order of rows")


def make_mistake(name: str) -> None:
    """In this process: what going on is told to do wrongly."""
    right, order = setup.restore, data.iterate

    def restore(*args: Any) -> Any:
        state = right(*args)
        zeros = jax.tree.map(lambda a: a * 0 if a.ndim else a, state.opt_state)
        return dataclasses.replace(state, opt_state=zeros)

    if name == WRONG[0]:
        setup.restore = restore
    elif name == WRONG[1]:
        data.iterate = lambda *args, seed, **more: order(*args, seed=seed + 1, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interruptions", type=int, default=50, help="of both runs together")
    parser.add_argument("--processes", default="1,2", help="of each run")
    parser.add_argument("--controls", type=int, default=len(WRONG), help="how many wrong continuations are tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="a folder that is not there yet, kept; none: nothing is kept")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    planned = [kind for kind, number in KINDS.items() for _ in range(number)]
    kinds = [planned[n * len(planned) // args.interruptions] for n in range(args.interruptions)]
    rng.shuffle(kinds)
    counts = [int(number) for number in args.processes.split(",")]
    # A start of several processes takes longest: they get a third of what one gets.
    shares = [3 if number == 1 else 1 for number in counts]
    holds = True
    with contextlib.ExitStack() as stack:
        if args.out is None:
            # Not a TemporaryDirectory: those that are forked from here would remove it at their end.
            folder = pathlib.Path(tempfile.mkdtemp())
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        else:
            folder = args.out
            folder.mkdir(parents=True)
        # What is compiled is found again by all runs, and by the next soak where the environment names a cache.
        os.environ.setdefault("RAG_JAX_CACHE", str(folder / "cache"))
        for place, processes in enumerate(counts):
            first, end = (len(kinds) * sum(shares[:n]) // sum(shares) for n in (place, place + 1))
            (folder / f"{place}").mkdir()
            holds &= soak(processes, kinds[first:end], folder / f"{place}", rng)
        for number, name in enumerate(WRONG[: args.controls]):
            (folder / f"control-{number}").mkdir()
            holds &= control(name, folder / f"control-{number}", rng)
    print(f"\n{'all holds' if holds else 'NOT ALL HOLDS'}")
    sys.exit(not holds)


if __name__ == "__main__":
    main()
