"""Mining inside training: what the current retriever considers near, as groups of rows and as passages they bring.

The plan of the coming steps is all that mining leaves behind. It is kept in the workdir, `mining/step_N.npz`: a run
that goes on from a later checkpoint has other parameters by then and could not make it again.

**n** rows, **Q** distinct queries, **M** distinct passages, **J** negatives of a row, **E** embedding width.
"""

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int

from rag_jax import data, files, rag
from rag_jax.config import Config
from rag_jax.errors import UserError
from rag_jax.inference import search
from rag_jax.training import hard_groups

# Of each row, for a start: groups grow from these, and from all rows where these are taken.
NEIGHBOURS = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained on from one mining to the next."""

    rows: np.ndarray  # (steps, batch_size) int32 of the steps that follow
    met: np.ndarray  # (n,) int32, how often each row was met before them
    # (steps, batch_size, _) int32 passages that the rows bring besides those known to be right, -1: none
    brought: np.ndarray | None = None
    # Of what these rows may read, where a generator's evidence is kept: see `data.Known`, both (pairs,).
    evidence_code: np.ndarray | None = None
    evidence: np.ndarray | None = None

    def after(self, steps: int) -> "Plan":
        """Without the first steps."""
        later = None if self.brought is None else self.brought[steps:]
        return dataclasses.replace(self, rows=self.rows[steps:], brought=later)

    def met_after(self) -> np.ndarray:
        return self.met + np.bincount(self.rows.ravel(), minlength=len(self.met)).astype(np.int32)


def mine(
    model: rag.Rag, params: dict, examples: data.Examples, met: Int[np.ndarray, " n"], config: Config, step: int
) -> tuple[Plan, dict[str, float]]:
    """The plan of the next `mining.every_steps` steps, a function of (seed, step, parameters), and how hard it is.

    Metrics of the plan's groups beside random groups of all rows; see `hardness` and `masked_shares` of `hard_groups`.
    """
    query_emb, passage_emb = embeddings(model, params, examples, config.eval.batch_size)
    found = candidates(query_emb, passage_emb, examples, config, step)
    near = neighbourhood(query_emb, passage_emb, examples, config.mining.margin, found)
    rng = np.random.default_rng([config.seed, step])
    shape = (config.mining.every_steps, config.batch_size)
    rows, size = np.zeros(shape, np.int32), config.group_size
    if jax.process_index() == 0:
        rows = hard_groups.plan(near, met, group_size=size, batch_size=shape[1], num_steps=shape[0], rng=rng)
    rows = agreed(rows)
    groups = rows.reshape(-1, size)
    random = rng.permutation(len(examples))[: len(examples) // size * size].reshape(-1, size)
    mined, by_chance = (hard_groups.hardness(near, each) for each in (groups, random))
    values = {f"mining/{name}": value for name, value in mined.items()}
    values |= {f"mining/random_{name}": value for name, value in by_chance.items()}
    brought = None
    if config.objective.negatives and config.data.columns.negative is None:
        brought, scores = negatives(near, passage_emb, examples.right_key, groups, config.objective.negatives)
        brought, there = agreed(brought), scores > -np.inf
        values["mining/negatives_similarity"] = float(scores[there].mean()) if there.any() else 0.0
        values["mining/negatives_missing"] = float(1 - there.mean())
    if found is not None:
        others = examples.negative_key[groups] if examples.negative_key is not None else brought
        asked = instead_of(found, others, groups, examples.passage_key < 0)
        brought = with_slot(asked, examples.own_key[groups], 1 + config.objective.negatives)
        candidate = (asked >= 0) & (examples.passage_key < 0)[groups][:, :, None]
        values["mining/candidates_without_slot"] = float((candidate & (brought < 0)).sum() / max(candidate.sum(), 1))
        for name, each in (("", groups), ("random_", random)):
            wanted = [np.unique(found[group][found[group] >= 0]) for group in each]
            values[f"mining/{name}passages_wanted"] = float(np.mean([len(passages) for passages in wanted]))
    values |= {f"mining/masked_{name}": value for name, value in hard_groups.masked_shares(near).items()}
    return Plan(rows, met, None if brought is None else brought.reshape(*shape, -1)), values


def agreed(keys: np.ndarray) -> np.ndarray:
    """What process 0 found: products may differ in the last bit between processes, and all must train on the same."""
    return np.asarray(multihost_utils.broadcast_one_to_all(keys))


def candidates(
    query_emb: Float[np.ndarray, "Q E"],
    passage_emb: Float[np.ndarray, "M E"],
    examples: data.Examples,
    config: Config,
    step: int,
) -> Int[np.ndarray, "n _"] | None:
    """Of the rows whose passage is not known, the nearest ones of their document, else of the corpus; -1: no more.

    The last `mining.explore` of them are drawn at random from the others. None where every row's passage is known.
    """
    unknown = np.flatnonzero(examples.passage_key < 0)
    if not len(unknown):
        return None
    num, explore = max(config.objective.candidates, 1 + config.objective.negatives), config.mining.explore
    found = np.full((len(examples), num), -1, np.int32)
    anywhere = unknown[examples.document_key[unknown] < 0]
    if len(anywhere):
        _, nearest = search.top_k(query_emb[examples.query_key[anywhere]], passage_emb, num)
        found[anywhere, : nearest.shape[1]] = nearest
    rng = np.random.default_rng([config.seed, step, len(examples)])
    for row in unknown:
        of_document = examples.document_passages[key] if (key := examples.document_key[row]) >= 0 else None
        if of_document is not None:
            scores = passage_emb[of_document] @ query_emb[examples.query_key[row]]
            order = np.argsort(-scores, kind="stable")[:num]
            found[row, : len(order)] = of_document[order]
        if explore:
            num_others = len(passage_emb) if of_document is None else len(of_document)
            drawn = rng.choice(num_others, size=min(num, num_others), replace=False)
            drawn = drawn if of_document is None else of_document[drawn]
            drawn = drawn[~np.isin(drawn, found[row, : num - explore])][:explore]
            found[row, num - explore :] = np.pad(drawn, (0, explore - len(drawn)), constant_values=-1)
    return agreed(found)


def instead_of(
    found: Int[np.ndarray, "n _"],
    others: Int[np.ndarray, "groups g _"] | None,
    groups: Int[np.ndarray, "groups g"],
    unknown: Bool[np.ndarray, " n"],
) -> Int[np.ndarray, "groups g _"]:
    """What the rows of groups bring: where their passage is not known what was `found` for them, else the `others`."""
    others = np.zeros((*groups.shape, 0), np.int32) if others is None else others
    width = max(found.shape[1], others.shape[2])
    found, others = (
        np.pad(keys, [(0, 0)] * (keys.ndim - 1) + [(0, width - keys.shape[-1])], constant_values=-1)
        for keys in (found, others)
    )
    return np.where(unknown[groups][:, :, None], found[groups], others)


def with_slot(
    brought: Int[np.ndarray, "groups g _"], right: Int[np.ndarray, "groups g _"], slots: int
) -> Int[np.ndarray, "groups g _"]:
    """What rows bring, -1 where their group, of so many slots a row, has no room for it beside what is `right`.

    Batches hold nothing else, so nobody need read more.
    """
    held = [data.fill_slots(*group, slots) for group in zip(right.tolist(), brought.tolist(), strict=True)]
    return np.stack([np.where(np.isin(own, keys), own, -1) for own, keys in zip(brought, held, strict=True)])


def embeddings(
    model: rag.Rag, params: dict, examples: data.Examples, batch_size: int
) -> tuple[Float[np.ndarray, "Q E"], Float[np.ndarray, "M E"]]:
    """All distinct queries and passages as the retriever sees them now."""
    queries, passages = examples.retriever_queries, examples.retriever_passages
    assert queries is not None and passages is not None
    query_emb = search.embed(model, params, queries, batch_size=batch_size, label="mining, queries")
    return query_emb, search.embed(model, params, passages, batch_size=batch_size, label="mining, passages")


def neighbourhood(
    query_emb: Float[np.ndarray, "Q E"],
    passage_emb: Float[np.ndarray, "M E"],
    examples: data.Examples,
    margin: float | None,
    found: Int[np.ndarray, "n _"] | None = None,
) -> hard_groups.Near:
    """All rows with their nearest other rows.

    Where a row's passage is not known, the nearest one that was `found` stands for it. It may be right for other rows
    as well: that two rows share it is no reason to keep them apart.
    """
    query_key, passage_key, nearest = examples.query_key, examples.passage_key, examples.passage_key
    if found is not None:
        nearest = np.where(passage_key < 0, found[:, 0], passage_key)
        passage_key = np.where(passage_key < 0, len(passage_emb) + np.arange(len(passage_key)), passage_key)
    query_emb, passage_emb = query_emb[query_key], passage_emb[nearest]
    neighbours = nearest_rows(query_emb, passage_emb, NEIGHBOURS)
    return hard_groups.Near(query_emb, passage_emb, query_key, passage_key, neighbours, margin)


def nearest_rows(
    query_emb: Float[np.ndarray, "n E"], passage_emb: Float[np.ndarray, "n E"], num: int
) -> Int[np.ndarray, "n m"]:
    """The `num` other rows of highest affinity to each row, exact, the highest first; at most all others."""
    left, right = hard_groups.affinity_sides(query_emb, passage_emb)
    _, found = search.top_k(left, right, num + 1)
    itself = found == np.arange(len(found))[:, None]
    # Itself to the end, if it is there at all; the others keep their order.
    return np.take_along_axis(found, np.argsort(itself, axis=1, kind="stable"), axis=1)[:, :-1]


def negatives(
    near: hard_groups.Near,
    passage_emb: Float[np.ndarray, "M E"],
    right_key: Int[np.ndarray, "Q R"],
    groups: Int[np.ndarray, "groups g"],
    num: int,
) -> tuple[Int[np.ndarray, "groups g J"], Float[np.ndarray, "groups g J"]]:
    """`hard_groups.negatives` of each row's nearest passages: as many as its group can hold, and `NEIGHBOURS` more."""
    at_most = None if near.margin is None else near.positive + near.margin
    many = groups.shape[1] * (1 + num) + NEIGHBOURS
    scores, passages = search.top_k(near.query_emb, passage_emb, many, at_most=at_most)
    return hard_groups.negatives(right_key[near.query_key], groups, passages, scores, num)


def path_of(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir / "mining" / f"step_{step}.npz"


def save(workdir: pathlib.Path, step: int, plan: Plan) -> None:
    arrays = {name: array for name, array in vars(plan).items() if array is not None}
    files.write(path_of(workdir, step), arrays)


def load(workdir: pathlib.Path, step: int) -> Plan | None:
    """The plan that was mined after this step; None where there is none. UserError for a damaged file."""
    path = path_of(workdir, step)
    try:
        return Plan(**files.read(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{os.fspath(path)} cannot be read ({error}); it is damaged: put it back from a copy, or move the "
            f"checkpoints after step {step} and this file away to go on from there"
        ) from None


def kept(workdir: pathlib.Path, start_step: int, every: int) -> Iterator[tuple[int, Plan]]:
    """(step, plan of the steps after it), plan by plan as a run left them behind, from `start_step` on."""
    step = start_step
    while plan := load(workdir, since := step - step % every):
        yield step, plan.after(step - since)
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
