"""Mining inside training: rows in groups whose passages the retriever of the moment takes for near.

The plan of the coming steps is all that mining leaves behind. It is kept in the workdir, `mining/step_N.npz`: a run
that goes on from a later checkpoint has other parameters by then and could not make it again.

**n** rows, **R** distinct queries, **M** distinct passages, **E** embedding width.
"""

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from rag_jax import data, rag, retrieval
from rag_jax.data import cache, groups
from rag_jax.errors import UserError

# Of each row, for a start: groups grow from these, and from all rows where these are taken.
NEIGHBOURS = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained on from one mining to the next."""

    rows: np.ndarray  # (steps, batch_size) int32 of the steps that follow
    met: np.ndarray  # (n,) int32, how often each row was met before them

    def met_after(self) -> np.ndarray:
        return self.met + np.bincount(self.rows.ravel(), minlength=len(self.met)).astype(np.int32)


def mine(
    model: rag.Rag, params: dict, examples: data.Examples, met: Int[np.ndarray, " n"], config: Any, step: int
) -> tuple[Plan, dict[str, float]]:
    """The plan of the next `mining.every_steps` steps, a function of (seed, step, parameters), and how hard it is.

    Metrics of the plan's groups beside random groups of all rows; see `groups.hardness` and `groups.masked_shares`.
    """
    near = neighbourhood(model, params, examples, config)
    rng = np.random.default_rng([config.seed, step])
    shape = (config.mining.every_steps, config.batch_size)
    rows, size = np.zeros(shape, np.int32), config.group_size
    if jax.process_index() == 0:
        rows = groups.plan(near, met, group_size=size, batch_size=shape[1], num_steps=shape[0], rng=rng)
    # One says, lest processes whose products differ in the last bit train on different rows.
    plan = Plan(np.asarray(multihost_utils.broadcast_one_to_all(rows)), met)
    random = rng.permutation(len(examples))[: len(examples) // size * size].reshape(-1, size)
    mined, by_chance = (groups.hardness(near, each) for each in (plan.rows.reshape(-1, size), random))
    values = {f"mining/{name}": value for name, value in mined.items()}
    values |= {f"mining/random_{name}": value for name, value in by_chance.items()}
    return plan, values | {f"mining/masked_{name}": value for name, value in groups.masked_shares(near).items()}


def neighbourhood(model: rag.Rag, params: dict, examples: data.Examples, config: Any) -> groups.Near:
    """All rows as the retriever sees them now, with their nearest other rows."""
    queries, passages = examples.retriever_queries, examples.retriever_passages
    assert queries is not None and passages is not None
    size = config.eval.batch_size
    query_emb = retrieval.embed(model, params, queries, batch_size=size, label="mining: queries")[examples.query_key]
    passage_emb = retrieval.embed(model, params, passages, batch_size=size, label="mining: passages")
    passage_emb = passage_emb[examples.passage_key]
    neighbours = nearest_rows(query_emb, passage_emb, NEIGHBOURS)
    return groups.Near(
        query_emb, passage_emb, examples.query_key, examples.passage_key, neighbours, config.mining.margin
    )


def nearest_rows(
    query_emb: Float[np.ndarray, "n E"], passage_emb: Float[np.ndarray, "n E"], num: int
) -> Int[np.ndarray, "n m"]:
    """The `num` other rows of highest affinity to each row, exact, the highest first; at most all others."""
    left, right = groups.affinity_sides(query_emb, passage_emb)
    _, found = retrieval.top_k(left, right, num + 1)
    itself = found == np.arange(len(found))[:, None]
    # Itself to the end, if it is there at all; the others keep their order.
    return np.take_along_axis(found, np.argsort(itself, axis=1, kind="stable"), axis=1)[:, :-1]


def path_of(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir / "mining" / f"step_{step}.npz"


def save(workdir: pathlib.Path, step: int, plan: Plan) -> None:
    cache.write(path_of(workdir, step), {"rows": plan.rows, "met": plan.met})


def load(workdir: pathlib.Path, step: int) -> Plan | None:
    """The plan that was mined after this step; None where there is none. UserError for a damaged file."""
    path = path_of(workdir, step)
    try:
        return Plan(**cache.read(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{os.fspath(path)} cannot be read ({error}); it is damaged: put it back from a copy, or move the "
            f"checkpoints after step {step} and this file away to go on from there"
        ) from None


def kept(workdir: pathlib.Path, start_step: int, every: int) -> Iterator[tuple[int, np.ndarray]]:
    """(step, rows of the steps after it), plan by plan as a run left them behind, from `start_step` on."""
    step = start_step
    while plan := load(workdir, since := step - step % every):
        yield step, plan.rows[step - since :]
        step = since + every


def resume(workdir: pathlib.Path, step: int, every: int) -> tuple[int, Plan | None, np.ndarray | None]:
    """What was mined before a run stopped after `step`: (when, plan, None), or (step, None, met) if it is due now.

    UserError where the plan is missing and the parameters it came from are gone too.
    """
    since = step - step % every
    if plan := load(workdir, since):
        return since, plan, None
    before = load(workdir, since - every) if since == step else None
    if before is None:
        raise UserError(
            f"{path_of(workdir, since)} is missing, and the rows of the steps after {since} cannot be known without "
            f"it: put it back, or move the checkpoints after step {max(since, every) - every} away"
        )
    return step, None, before.met_after()
