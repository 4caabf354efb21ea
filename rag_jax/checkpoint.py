"""Checkpoints of a workdir: saved asynchronously, each process its own shards, kept by policy.

A checkpoint is a folder `checkpoints/STEP` of two items, "params" (all of them, frozen ones too) and "opt_state". They
can be restored apart: evaluation and export read the parameters only. Trees are stored as `{path: array}`, so what they
are restored into says their structure, and may lie on another mesh than what was saved.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from rag_jax.errors import UserError

ITEMS = ("params", "opt_state")
BEST_METRICS = (("eval/mrr@10", 1), ("eval/answer_nll", -1))


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager, or call `close()`: it waits for the last save.

    `keep`: how many of the newest stay; the best by evaluation stays besides. None: open for reading only.
    """

    def __init__(self, workdir: str | pathlib.Path, keep: int | None = None):
        self.workdir = pathlib.Path(workdir).absolute()
        self.directory = self.workdir / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            create=keep is not None,
            read_only=keep is None,
            cleanup_tmp_directories=keep is not None,  # what a killed process left half-written
            preservation_policy=_NewestAndBest(keep, self.workdir),
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
        """Steps of the checkpoints, ascending; waits for a save under way."""
        self.wait()
        return sorted(self._manager.all_steps()) if self._manager else []

    def latest(self) -> int | None:
        """The newest checkpoint's step; None when there is none."""
        return max(self.steps(), default=None)

    def find(self, step: int | str | None = None) -> int:
        """The saved step that "latest" (or None), "best" or a number stands for; UserError when there is none."""
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}; train with checkpoint.every_steps above 0 first")
        if step in (None, "latest"):
            return steps[-1]
        if step == "best":
            best = best_step(self.workdir, steps)
            if best is None:
                raise UserError(f"--step=best: no saved step of {self.workdir} was evaluated; give --step=latest")
            return best
        if not str(step).isdecimal() or int(step) not in steps:
            shown = ", ".join(str(s) for s in steps)
            raise UserError(f"--step={step}: not in {self.directory}, which holds {shown}; give one, latest or best")
        return int(step)

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Start saving; returns as soon as the arrays' memory may be reused. A step that is there already stays."""
        if self._manager is None:
            raise ValueError("opened for reading only")
        if step in self._manager.all_steps():
            return
        args = {name: ocp.args.StandardSave(flatten(tree)) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def restore(self, items: Mapping[str, Any], step: int | str | None = None) -> dict[str, Any]:
        """The named items, each in the structure, dtypes and shardings of the abstract tree given for it.

        UserError when there is no such checkpoint, when it holds other arrays than the config's models have, and when
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
                f"checkpoint {self.directory / str(step)} cannot be read ({str(error)[:200]}); it is damaged: move "
                "that folder away to go on from the one before it"
            ) from error
        return {
            name: jax.tree.unflatten(jax.tree.structure(tree), [restored[name][path] for path in wanted[name]])
            for name, tree in items.items()
        }

    def wait(self) -> None:
        """Until the save under way is finished on disk; raises what went wrong in it."""
        if self._manager:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go of the workdir."""
        if self._manager:
            self._manager.wait_until_finished()
            self._manager.close()
            self._manager = None

    def _check(self, step: int, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        assert self._manager is not None
        saved_items = self._manager.item_metadata(step)
        problems = []
        for name, flat in wanted.items():
            if saved_items.get(name) is None:
                raise ValueError(f"no whole {name!r} in it")
            saved = {path: tuple(array.shape) for path, array in saved_items[name].items()}
            here = {path: tuple(array.shape) for path, array in flat.items()}
            problems += [f"{name}/{p} is missing" for p in here.keys() - saved.keys()]
            problems += [f"{name}/{p} is of no use" for p in saved.keys() - here.keys()]
            both = here.keys() & saved.keys()
            problems += [f"{name}/{p} is {saved[p]}, not {here[p]}" for p in both if here[p] != saved[p]]
        if problems:
            shown = ", ".join(sorted(problems)[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise UserError(
                f"checkpoint {self.directory / str(step)} does not fit the config: {shown}; "
                "use the config it was trained with, or another --workdir"
            )


class _NewestAndBest:
    """Orbax's question, answered: the newest `keep`, and the best evaluated one for `--step=best`."""

    def __init__(self, keep: int | None, workdir: pathlib.Path):
        self.keep, self.workdir = keep, workdir

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = set(sorted(steps)[-self.keep :] if self.keep else steps)
        return [step in newest or step == best_step(self.workdir, steps) for step in steps]


def best_step(workdir: pathlib.Path, steps: Sequence[int]) -> int | None:
    """Of the steps that were evaluated the one with the best metric, the newest of equals."""
    found = {step: value for step, value in scores(workdir).items() if step in steps}
    return max(found, key=lambda step: (found[step], step)) if found else None


def scores(workdir: pathlib.Path) -> dict[int, float]:
    """Every evaluated step's metric in `eval/step_N.json`, higher is better.

    The metric is the one that the newest of them names as `best_by` (`eval.metric`), else the first that it has of
    eval/mrr@10 and, without a retriever, the answer NLL.
    """
    contents = {}
    for path in (workdir / "eval").glob("step_*.json"):
        try:
            contents[int(path.stem.removeprefix("step_"))] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    contents = {step: content for step, content in contents.items() if isinstance(content, dict)}
    by = contents[max(contents)].get("best_by") if contents else None
    found = {step: score(content, by) for step, content in sorted(contents.items())}
    return {step: value for step, value in found.items() if value is not None}


def score(metrics: Mapping[str, Any], by: str | None) -> float | None:
    """The metric that steps are compared by, higher is better; None where it is missing."""
    names = BEST_METRICS if by is None else ((by, -1 if "nll" in by or "utility" in by else 1),)
    return next((sign * metrics[name] for name, sign in names if isinstance(metrics.get(name), int | float)), None)


def exhausted(scores: Mapping[int, float], patience: int) -> bool:
    """Whether the `patience` newest evaluations brought nothing better than the best one before them; 0: never."""
    ordered = [scores[step] for step in sorted(scores)]
    return 0 < patience < len(ordered) and max(ordered[-patience:]) <= max(ordered[:-patience])


def flatten(tree: Any) -> dict[str, Any]:
    """`{"generator/norm/scale": array, ...}` in the tree's own order; None leaves are left out."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
