"""What a frozen generator is known to say of all that the coming steps read, before they are taken.

It is kept in the workdir beside the plan of the steps, so that a run that goes on reads the very same numbers.
"""

import dataclasses
import pathlib

import numpy as np

from rag_jax import data, files
from rag_jax.inference import evidence
from rag_jax.training import mining
from rag_jax.training.setup import Training


def planned(training: Training, params: dict, plan: mining.Plan) -> tuple[mining.Plan, dict[str, float]]:
    """The plan with what the generator says of all that its rows may read, and how much of it was not kept."""
    rows = plan.rows.ravel()
    may_read = [training.examples.own_key[rows]]
    if plan.brought is not None:
        may_read.append(plan.brought.reshape(len(rows), -1))
    known, computed = _read(training, params, rows, np.concatenate(may_read, axis=1))
    values = {"mining/evidence_pairs": float(len(known.code)), "mining/evidence_computed": float(computed)}
    return dataclasses.replace(plan, evidence_code=known.code, evidence=known.value), values


def of_plan(training: Training, plan: mining.Plan) -> data.Known | None:
    if plan.evidence_code is None or plan.evidence is None:
        return None
    return data.Known(plan.evidence_code, plan.evidence, _num_passages(training))


def named(training: Training, params: dict) -> data.Known:
    """What the generator says of every row behind what it names, where nothing is mined."""
    examples = training.examples
    keys = [part for part in (examples.own_key, examples.negative_key) if part is not None]
    return _read(training, params, np.arange(len(examples)), np.concatenate(keys, axis=1))[0]


def read(training: Training) -> data.Known | None:
    """`named` of a run as it wrote it down; None where it has not."""
    path = _path(training)
    return data.Known(**files.read(path), num_passages=_num_passages(training)) if path.is_file() else None


def write(training: Training, known: data.Known) -> None:
    files.write(_path(training), {"code": known.code, "value": known.value})


def _path(training: Training) -> pathlib.Path:
    return training.workdir / "mining" / "evidence.npz"


def batching(training: Training, known: data.Known | None) -> data.Batching:
    """How batches are made in steps of which this is known."""
    return training.batching if known is None else dataclasses.replace(training.batching, evidence=known)


def read_by_steps(training: Training, known: data.Known | None) -> data.Examples:
    """The examples as batches are made of them: where evidence is known no generator reads."""
    return training.examples.without_prompts() if known is not None else training.examples


def _num_passages(training: Training) -> int:
    """Passages of which something may be known, none included."""
    return len(training.examples.passages) + training.batching.reads_none


def _with_none(training: Training) -> data.Examples:
    """The examples, with no passage as their last one if the objective asks for that."""
    examples, prompt = training.examples, training.opened.prompt
    if not training.batching.reads_none:
        return examples
    assert prompt is not None and examples.prefixes is not None
    (nothing, _), _ = data.prompt_segments(prompt, [""], [])
    prefixes = data.joined(examples.prefixes, nothing)
    return dataclasses.replace(examples, passages=(*examples.passages, ""), prefixes=prefixes)


def _read(training: Training, params: dict, rows: np.ndarray, passages: np.ndarray) -> tuple[data.Known, int]:
    """What the generator says of rows (n,) behind passages (n, _), -1: none, and of how many pairs it was not kept."""
    examples, opened, config = _with_none(training), training.opened, training.config
    num = len(examples.passages)
    if training.batching.reads_none:
        passages = np.concatenate([passages, np.full((len(passages), 1), num - 1, passages.dtype)], axis=1)
    pair_rows, pair_passages = np.divmod(
        np.unique((rows[:, None].astype(np.int64) * num + passages)[passages >= 0]), num
    )
    at_a_time = config.eval.batch_size * config.objective.candidates
    folder = evidence.folder_of(opened, params)
    sums, computed = evidence.sums(opened.model, params, examples, pair_rows, pair_passages, folder, at_a_time)
    counts, objective = evidence.part_lengths(examples, pair_rows), opened.model.objective
    read = [i for i, part in enumerate(evidence.PARTS) if objective.evidence in (part, "both")]
    values = objective.evidence_of([sums[:, i] for i in read], [counts[:, i] for i in read])
    values = np.where(counts[:, read].any(axis=1), values, np.nan)
    return data.Known.of(pair_rows, pair_passages, values, num), computed
