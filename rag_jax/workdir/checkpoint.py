"""Checkpoints of a workdir: saved asynchronously, each process its own shards, kept by policy.

A checkpoint is a folder `checkpoints/STEP` of two items, "params" (those that are trained) and "opt_state". They can be
restored apart: evaluation and export read the parameters only. Trees are stored as `{path: array}`, so what they
are restored into says their structure, and may lie on another mesh than what was saved.

A checkpoint appears when it is complete, with the checksums of all its files, and is used only while they hold. A
damaged one is never deleted here, nor restored.
"""

import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.path import atomicity

from rag_jax.errors import UserError
from rag_jax.workdir import checksums

ITEMS = ("params", "opt_state")
# What steps are compared by where a run names nothing, and whether higher is better; callers know more metrics.
BEST_METRICS = {"eval/mrr@10": True, "eval/answer_nll": False, "eval/document_hit@10": True}
SET_ASIDE = "damaged-"
# Of what one process found wrong, as the others get to hear it.
MESSAGE_BYTES = 256


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager, or call `close()`: it waits for the last save.

    `keep`: how many of the newest stay; the best by evaluation and every `keep_every`-th step (0: none) stay too.
    None: open for reading only. `higher_is_better`: of the metrics that may say which is best.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        keep: int | None = None,
        keep_every: int = 0,
        higher_is_better: Mapping[str, bool] = BEST_METRICS,
    ):
        self.workdir = pathlib.Path(workdir).absolute()
        self.best_step = functools.partial(best_step, self.workdir, higher_is_better=higher_is_better)
        self.directory = self.workdir / "checkpoints"
        self._problems: dict[int, str | None] = {}
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            create=keep is not None,
            read_only=keep is None,
            cleanup_tmp_directories=keep is not None,  # what a killed process left half-written
            preservation_policy=_Kept(keep, keep_every, self.best_step),
            temporary_path_class=_Summed,
            async_options=None if keep is None else ocp.AsyncOptions(barrier_sync_fn=_barrier()),
            lightweight_initialize=True,  # reads no file of any step yet, damaged ones least of all
        )
        exists = keep is not None or self.directory.is_dir()
        handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        self._manager = (
            ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers) if exists else None
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the checkpoints, damaged or not, ascending; waits for a save under way."""
        self.wait()
        return sorted(self._manager.all_steps()) if self._manager else []

    def problem(self, step: int) -> str | None:
        """What is wrong with the files of a saved step, if anything. Of several processes each reads a share."""
        if step not in self._problems:
            own = checksums.problem(self.directory / str(step), jax.process_index(), jax.process_count())
            self._problems[step] = _first_of_all(own)
        return self._problems[step]

    def newest_good(self, before: int | None = None) -> tuple[int | None, dict[int, str]]:
        """The newest step (below `before`) that is intact, None without any step; what is wrong with each newer one.

        UserError when there are steps, but none is intact. All processes get the same answer.
        """
        steps = [step for step in self.steps() if before is None or step < before]
        damaged = {}
        while (newest := _of_main(max(steps, default=-1))) >= 0:
            if (problem := self.problem(newest)) is None:
                return newest, damaged
            damaged[newest] = problem
            steps = [step for step in steps if step < newest]
        if damaged:
            shown = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
            raise UserError(
                f"no checkpoint in {self.directory} is intact ({shown}); nothing was changed: restore one from a copy, "
                "or give another --workdir to start over"
            )
        return None, damaged

    def find(self, step: int | str | None = None) -> int:
        """The saved step that "latest" (or None: the newest intact one), "best" or a number stands for.

        UserError when there is none, and when the one asked for is damaged.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}; train with checkpoint.every_steps above 0 first")
        if step in (None, "latest"):
            newest, damaged = self.newest_good()
            for bad, problem in damaged.items():
                print(f"{_named(self.workdir, bad, problem)}; step {newest} is taken", file=sys.stderr, flush=True)
            assert newest is not None
            return newest
        if step == "best":
            best = self.best_step(steps)
            if best is None:
                raise UserError(f"--step=best: no saved step of {self.workdir} was evaluated; give --step=latest")
        elif not str(step).isdecimal() or int(step) not in steps:
            shown = ", ".join(str(s) for s in steps)
            raise UserError(f"--step={step}: not in {self.directory}, which holds {shown}; give one, latest or best")
        else:
            best = int(step)
        if problem := self.problem(best):
            raise UserError(f"--step={step}: {_named(self.workdir, best, problem)}; give another one, or latest")
        return best

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Start saving; returns as soon as the arrays' memory may be reused. A step that is there already stays.

        UserError when this save, or the one before it, fails.
        """
        if self._manager is None:
            raise ValueError("opened for reading only")
        self.wait()
        if step in self._manager.all_steps():
            return
        args = {name: ocp.args.StandardSave(flatten(tree)) for name, tree in items.items()}
        self._saving = step
        self._problems.pop(step, None)
        save = functools.partial(self._manager.save, step, args=ocp.args.Composite(**args), force=True)
        self._told(save)

    def paths(self, step: int, item: str) -> set[str]:
        """The paths of the arrays that a saved step holds of an item."""
        assert self._manager is not None
        return set(self._manager.item_metadata(step)[item] or ())

    def restore(self, items: Mapping[str, Any], step: int | str | None = None) -> dict[str, Any]:
        """The named items, each in the structure, dtypes and shardings of the abstract tree given for it.

        UserError when there is no such checkpoint, when it holds arrays other than the config's models have, and when
        its files are damaged.
        """
        step = self.find(step)
        assert self._manager is not None
        wanted = {name: flatten(tree) for name, tree in items.items()}
        args = {name: ocp.args.StandardRestore(flat) for name, flat in wanted.items()}
        try:
            self._check(step, wanted)
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except (ValueError, OSError, KeyError) as error:
            raise UserError(
                f"checkpoint {self.directory / str(step)} cannot be read ({str(error)[:200]}), though its checksums "
                "hold; was it written by another version?"
            ) from error
        return {
            name: jax.tree.unflatten(jax.tree.structure(tree), [restored[name][path] for path in wanted[name]])
            for name, tree in items.items()
        }

    def check_saving(self) -> None:
        """UserError if a save in the background has failed; waits for nothing."""
        if self._saving is not None and self._manager and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until the save under way is finished on disk; UserError when it fails."""
        if self._manager:
            self._told(self._manager.wait_until_finished)
            self._saving = None

    def close(self) -> None:
        """Wait, then let go of the workdir."""
        if self._manager:
            self.wait()
            self._manager.close()
            self._manager = None

    def _told(self, act: Callable[[], Any]) -> None:
        """What goes wrong in saving, in one line. Afterwards nothing more is saved, nor waited for."""
        try:
            act()
        except (ValueError, OSError, RuntimeError) as error:
            step, self._manager = self._saving, None
            full = "No space left" in str(error) or "ENOSPC" in str(error)
            reason = "no space left on the device" if full else " ".join(str(error).split())[:300]
            raise UserError(
                f"checkpoint {self.directory / str(step)} could not be saved ({reason}); the ones before it are good: "
                "fix that, and the same command continues from the newest of them"
            ) from error

    def _check(self, step: int, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        assert self._manager is not None
        saved_items = self._manager.item_metadata(step)
        problems = []
        for name, flat in wanted.items():
            if saved_items.get(name) is None:
                raise ValueError(f"no complete {name!r} in it")
            saved = {path: tuple(array.shape) for path, array in saved_items[name].items()}
            here = {path: tuple(array.shape) for path, array in flat.items()}
            problems += [f"{name}/{p} is missing" for p in here.keys() - saved.keys()]
            problems += [f"{name}/{p} is not part of these models" for p in saved.keys() - here.keys()]
            both = here.keys() & saved.keys()
            problems += [f"{name}/{p} is {saved[p]}, not {here[p]}" for p in both if here[p] != saved[p]]
        if problems:
            shown = ", ".join(sorted(problems)[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise UserError(
                f"checkpoint {self.directory / str(step)} does not fit the config: {shown}; "
                "use the config it was trained with, or another --workdir"
            )


def set_aside(workdir: pathlib.Path, damaged: Mapping[int, str]) -> list[str]:
    """Give damaged steps names that no step has; a line about each. Nothing of them is changed."""
    lines, folder = [], workdir / "checkpoints"
    for step, problem in damaged.items():
        names = itertools.chain([f"{SET_ASIDE}{step}"], (f"{SET_ASIDE}{step}-{n}" for n in itertools.count(2)))
        new = next(folder / name for name in names if not (folder / name).exists())
        (folder / str(step)).rename(new)
        lines.append(f"{_named(workdir, step, problem)}: it is kept as {new.name}, and an older one is used")
    return lines


def _named(workdir: pathlib.Path, step: int, problem: str) -> str:
    return f"checkpoint {workdir / 'checkpoints' / str(step)} is damaged ({problem})"


class _Kept:
    """Orbax's question, answered: the newest, every so many steps, and the best evaluated one for `--step=best`.

    Process 0 says which one that is: a file system may show the others an evaluation later, and each process that
    answers otherwise would remember other checkpoints than there are.
    """

    def __init__(self, keep: int | None, every: int, best_step: Callable[[Sequence[int]], int | None]):
        self.keep, self.every, self.best_step = keep, every, best_step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = self.best_step(steps)
        kept = {*(sorted(steps)[-self.keep :] if self.keep else steps), _of_main(-1 if best is None else best)}
        return [step in kept or bool(self.every and step % self.every == 0) for step in steps]


class _Summed(atomicity.AtomicRenameTemporaryPath):
    """Orbax's half-written folder. A step gets its checksums last, under a name that a killed process's rest has."""

    async def finalize(self) -> None:
        final = self._final_path
        if not final.name.isdecimal():  # an item inside a step
            return await super().finalize()
        self._final_path = final.with_name(f"{final.name}{atomicity.TMP_DIR_SUFFIX}complete")
        await super().finalize()
        checksums.write(pathlib.Path(self._final_path))
        self._final_path.rename(final)
        self._final_path = final


def _barrier() -> Callable[..., None]:
    """Orbax's barrier of all processes, at which one whose save is just failing does not wait for the others."""
    wait = ocp.multihost.get_barrier_sync_fn()

    def sync(*, key: str, timeout_ms: int) -> None:
        if sys.exception() is None:
            wait(key=key, timeout_ms=timeout_ms)

    return sync


def _of_main(number: int) -> int:
    """The first process's number, in all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if jax.process_count() > 1 else number


def _first_of_all(text: str | None) -> str | None:
    """What the first of the processes that has a text says, in all of them."""
    if jax.process_count() == 1:
        return text
    own = np.zeros(MESSAGE_BYTES, np.uint8)
    content = (text or "").encode("utf-8", "replace")[:MESSAGE_BYTES]
    own[: len(content)] = np.frombuffer(content, np.uint8)
    texts = [row.tobytes().rstrip(b"\0").decode("utf-8", "ignore") for row in multihost_utils.process_allgather(own)]
    return next(filter(None, texts), None)


def best_step(
    workdir: pathlib.Path, steps: Sequence[int], higher_is_better: Mapping[str, bool] = BEST_METRICS
) -> int | None:
    """Of the steps that were evaluated the one with the best metric, the newest of equals."""
    found = {step: value for step, value in scores(workdir, higher_is_better).items() if step in steps}
    return max(found, key=lambda step: (found[step], step)) if found else None


def scores(workdir: pathlib.Path, higher_is_better: Mapping[str, bool] = BEST_METRICS) -> dict[int, float]:
    """Every evaluated step's metric in `eval/step_N.json`, with the sign that makes the highest the best.

    The metric is the one that the newest of them names as `best_by` (`eval.metric`), else the first that it has of
    eval/mrr@10, without labels or a retriever the answer NLL, and without a generator either eval/document_hit@10.
    """
    contents = {}
    for path in (workdir / "eval").glob("step_*.json"):
        try:
            contents[int(path.stem.removeprefix("step_"))] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    contents = {step: content for step, content in contents.items() if isinstance(content, dict)}
    by = contents[max(contents)].get("best_by") if contents else None
    found = {step: score(content, by, higher_is_better) for step, content in sorted(contents.items())}
    return {step: value for step, value in found.items() if value is not None}


def score(metrics: Mapping[str, Any], by: str | None, higher_is_better: Mapping[str, bool]) -> float | None:
    """The metric that steps are compared by, so signed that the highest is the best; None where it is missing."""
    names = [name for name in (BEST_METRICS if by is None else (by,)) if name in higher_is_better]
    found = [(metrics[name], higher_is_better[name]) for name in names if isinstance(metrics.get(name), int | float)]
    return next((value if higher else -value for value, higher in found), None)


def exhausted(scores: Mapping[int, float], patience: int) -> bool:
    """Whether the `patience` newest evaluations brought nothing better than the best one before them; 0: never."""
    ordered = [scores[step] for step in sorted(scores)]
    return 0 < patience < len(ordered) and max(ordered[-patience:]) <= max(ordered[:-patience])


def flatten(tree: Any) -> dict[str, Any]:
    """`{"generator/norm/scale": array, ...}` in the tree's own order; None leaves are left out."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
