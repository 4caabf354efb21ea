"""Examples to batches of numpy arrays with few shapes, in an order that is a function of (seed, step)."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rag_jax.data import shapes
from rag_jax.data.examples import Examples
from rag_jax.data.segments import Ragged, join_padded, pad
from rag_jax.data.shapes import OF_POOL, TEXTS, Blocks, Lengths, Packed

if TYPE_CHECKING:
    import grain

# For ever; grain's own endless `repeat()` overflows in batches of one row.
EPOCHS = 10**9
PREFETCH_THREADS = 2
PREFETCH_BATCHES = 8
# Of every text in a batch.
PARTS = ("ids", "mask")

# An array with a leading axis of rows: numpy's where batches are made, jax's in the step, shapes where it is planned;
# None where no model reads it.
Rows = Any


class Pool(NamedTuple):
    """The passages of a batch, S slots beside each row: all slots of a group's rows are its pool, p = g S of them.

    A group holds each passage once; an empty slot holds a text of one token.
    """

    key: Rows  # (B, S) equal where the passage's text is equal; -1: empty
    passage_ids: Rows  # (B, S, Lr) what the retriever reads
    passage_mask: Rows  # (B, S, Lr)
    prefix_ids: Rows  # (B, S, Lp) generator's passage segment, bos first
    prefix_mask: Rows  # (B, S, Lp)
    document: Rows = None  # (B, S) equal where passages are of one document, -1: of none, or of several; None: no rows'


class Batch(NamedTuple):
    """One batch: ids and indices int32, masks bool, padding on the right. Fields of an unused model are None."""

    row: Rows  # (B,) which row of the examples
    query_key: Rows  # (B,) equal where the query's text is equal
    right_key: Rows  # (B, R) keys of the passages that are known to answer the query, -1: no more
    query_ids: Rows  # (B, Lq) what the retriever reads
    query_mask: Rows  # (B, Lq)
    suffix_ids: Rows  # (B, Ls) generator's query segment, answer segment, end-of-sequence
    suffix_mask: Rows  # (B, Ls)
    answer_start: Rows  # (B,) where in the suffix the answer's first token stands
    answer_mask: Rows  # (B, T) the answer's tokens, end-of-sequence included
    string_ids: Rows  # (B, Ld) objective "dalm"
    string_mask: Rows  # (B, Ld)
    string_answer_start: Rows  # (B,) first position that predicts an answer token
    pool: Pool
    document: Rows = None  # (B,) the document of a row whose passage is not known, -1: none; None: of all rows
    readable: Rows = None  # (B, p) the slots of its group that a row may read; None: all that are not empty
    evidence: Rows = None  # (B, p) of these slots, as `Objective.evidence_of`; NaN: not known. None: the step reads it
    evidence_none: Rows = None  # (B,) without any passage
    packed: Packed = Packed()  # no array: of how many tokens the models are run


@dataclasses.dataclass(frozen=True)
class Known:
    """A number of each of some pairs of a row and a passage."""

    code: np.ndarray  # (n,) int64, ascending: row * num_passages + passage
    value: np.ndarray  # (n,) float32
    num_passages: int

    @classmethod
    def of(cls, rows: np.ndarray, passages: np.ndarray, values: np.ndarray, num_passages: int) -> "Known":
        """Of pairs (n,) in any order, each there once."""
        code = rows.astype(np.int64) * num_passages + passages
        order = np.argsort(code)
        return cls(code[order], values[order].astype(np.float32), num_passages)

    def values(self, rows: np.ndarray, passages: np.ndarray | np.integer) -> np.ndarray:
        """Of pairs (broadcast), NaN where it is not known; passage -1 is none."""
        code = np.where(passages < 0, -1, rows.astype(np.int64) * self.num_passages + passages)
        if not len(self.code):
            return np.full(code.shape, np.nan, np.float32)
        place = np.minimum(np.searchsorted(self.code, code), len(self.code) - 1)
        return np.where(self.code[place] == code, self.value[place], np.float32(np.nan))


def given_scores(examples: Examples, temperature: float) -> Known:
    """The scores that the rows bring of their passages and negatives, divided by a temperature."""
    named = [examples.own_key] + ([] if examples.negative_key is None else [examples.negative_key])
    found: list[tuple[int, int, float]] = []
    for row, scores in enumerate(examples.rows.scores or ()):
        of_row = {int(key): examples.passages[key] for keys in named for key in keys[row] if key >= 0}
        found += [(row, key, scores[text] / temperature) for key, text in of_row.items() if text in scores]
    rows, passages, values = np.array(found, np.float64).reshape(-1, 3).T
    return Known.of(rows.astype(np.int64), passages.astype(np.int64), values, len(examples.passages))


@dataclasses.dataclass(frozen=True)
class Batching:
    """How a run makes its batches."""

    shapes: Sequence[Lengths]  # see `shapes.buckets`
    group_size: int = 1
    negatives: int = 0  # J: a group has 1 + J slots a row
    by_row: bool = False  # a row reads no passages of its group but those that it brings
    evidence: Known | None = None  # known beforehand; for examples without what a generator reads
    reads_none: bool = False  # the last passage of what is known stands for none
    blocks: Blocks | None = None  # whose tokens are packed together; None: shapes are of nothing packed


def collate(
    examples: Examples,
    rows: Sequence[int] | np.ndarray,
    batching: Batching,
    own: np.ndarray | None = None,
    brought: np.ndarray | None = None,
) -> Batch:
    """The batch of these rows in the first of the shapes that all of them fit.

    `own`: which of the rows to make, by their places in the batch, whole groups, where other processes make the others;
    None: all. `brought` (rows, _): passages that the rows bring besides those known to answer their queries, -1: none;
    None: those that are given, if any are.
    """
    rows = np.asarray(rows, np.int32)
    if brought is None:
        brought = np.zeros((len(rows), 0), np.int32) if examples.negative_key is None else examples.negative_key[rows]
    keys = fill_groups(examples.own_key[rows], brought, batching)
    needed, tokens = shapes.row_lengths(examples, rows, keys, num_own=1), {}
    if batching.blocks is not None:
        of_rows = shapes.tokens_of_rows(examples, rows, keys)
        tokens = shapes.block_tokens(batching.blocks, {name: of[None] for name, of in of_rows.items()})
    lengths = next((shape for shape in batching.shapes if shapes.fits(shape, needed, tokens)), None)
    if lengths is None:
        raise ValueError(
            f"no shape of {batching.shapes} holds rows of { ({k: int(v.max()) for k, v in needed.items()}) } tokens"
        )
    if own is not None:
        rows, brought, keys = rows[own], brought[own], keys[own]
    query = examples.query_key[rows]
    texts = {
        "query": _pad(examples.retriever_queries, query, lengths.query),
        "suffix": (None, None),
        "string": _pad(examples.strings, rows, lengths.string),
    }
    answer_start = answer_mask = None
    if examples.prompt_queries is not None and examples.answers is not None:
        parts = (examples.prompt_queries, examples.answers)
        texts["suffix"] = join_padded(parts, (query, rows), lengths.suffix)
        answer_start = examples.prompt_queries.lengths[query].astype(np.int32)
        answer_mask = np.arange(lengths.answer)[None, :] < examples.answers.lengths[rows][:, None]
    return Batch(
        row=rows,
        query_key=query,
        right_key=examples.right_key[query],
        **{f"{name}_{part}": array for name, pair in texts.items() for part, array in zip(PARTS, pair, strict=True)},
        answer_start=answer_start,
        answer_mask=answer_mask,
        string_answer_start=None if examples.string_answer_start is None else examples.string_answer_start[rows],
        pool=_pool(examples, keys, lengths),
        document=in_document(examples, rows) if len(examples.documents) else None,
        readable=readable(examples, rows, brought, keys, batching),
        **_evidence(rows, keys, batching),
        packed=lengths.packed,
    )


def _evidence(rows: np.ndarray, keys: np.ndarray, batching: Batching) -> dict[str, np.ndarray]:
    if (known := batching.evidence) is None:
        return {}
    found = {"evidence": known.values(rows[:, None], pools(keys, batching))}
    if batching.reads_none:
        found["evidence_none"] = known.values(rows, np.int64(known.num_passages - 1))
    return found


def fill_groups(right: np.ndarray, brought: np.ndarray, batching: Batching) -> np.ndarray:
    """The keys (rows, S) of the slots of groups of rows: no passage twice in a group, -1: empty.

    Each row has a slot for the first passage that is `right` for it (rows, _), if no row before it has that one. The
    group's other slots hold what else is right for its rows and what they have `brought` (rows, _): of each row the
    first, then of each the second and so on, as far as there is room.
    """
    num_groups, slots = len(right) // batching.group_size, 1 + batching.negatives
    rights, others = (array.reshape(num_groups, batching.group_size, -1).tolist() for array in (right, brought))
    return np.concatenate([fill_slots(*group, slots) for group in zip(rights, others, strict=True)])


def fill_slots(right: list[list[int]], brought: list[list[int]], slots: int) -> np.ndarray:
    """`fill_groups` of one group, the keys (g, S) of its slots."""
    first: dict[int, int] = {}  # passage -> row
    for row, (passage, *_) in enumerate(right):
        if passage >= 0:
            first.setdefault(passage, row)
    in_turn = itertools.zip_longest(*([*more, *others] for (_, *more), others in zip(right, brought, strict=True)))
    rest = dict.fromkeys(p for passages in in_turn for p in passages if p is not None and p >= 0 and p not in first)
    keys, left = np.full((len(right), slots), -1, np.int32), iter(rest)
    for passage, row in first.items():
        keys[row, 0] = passage
    for row, slot in np.argwhere(keys < 0):
        keys[row, slot] = next(left, -1)
    return keys


def pools(keys: np.ndarray, batching: Batching) -> np.ndarray:
    """(rows, p) for each row the keys of its whole group."""
    return np.repeat(keys.reshape(len(keys) // batching.group_size, -1), batching.group_size, axis=0)


def readable(
    examples: Examples, rows: np.ndarray, brought: np.ndarray, keys: np.ndarray, batching: Batching
) -> np.ndarray | None:
    """Which slots (rows, p) of its group a row may read, given the keys (rows, S) in them; None: all of all rows.

    Besides what is right: what it brings where `batching.by_row`, and where its passage is not known but its document
    is, nothing else than that document's.
    """
    document = in_document(examples, rows)[:, None]
    if not batching.by_row and not (examples.passage_key < 0).any():
        return None
    of_group = pools(keys, batching)
    may = of_group >= 0
    if batching.by_row:
        may &= (brought[:, :, None] == of_group[:, None]).any(axis=1)
    return may & ((document < 0) | examples.is_within(document, of_group))


def in_document(examples: Examples, rows: np.ndarray) -> np.ndarray:
    """The document (rows,) of those whose passage is not known, -1: of the others, and where it is not known either."""
    return np.where(examples.passage_key[rows] < 0, examples.document_key[rows], -1).astype(np.int32)


def _pool(examples: Examples, key: np.ndarray, lengths: Lengths) -> Pool:
    """Of these passages (B, S). Where there is none, another lends its first token: no text is empty."""
    there, texts = key.reshape(-1, 1) >= 0, np.maximum(key, 0).ravel()
    lender = texts[np.argmax(there[:, 0])]

    def of(ragged: Ragged | None, length: int) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        if ragged is None:
            return None, None
        ids, mask = pad(ragged, np.where(there[:, 0], texts, lender), length)
        mask &= there | (np.arange(length) == 0)
        return np.where(mask, ids, 0).reshape(*key.shape, length), mask.reshape(*key.shape, length)

    document = np.where(key < 0, -1, examples.document_of[key]).astype(np.int32) if len(examples.documents) else None
    passage, prefix = of(examples.retriever_passages, lengths.passage), of(examples.prefixes, lengths.prefix)
    return Pool(key, *passage, *prefix, document)


def lengths(batch: Batch) -> Lengths:
    """The padded lengths of a batch."""
    return Lengths.of({name: mask.shape[-1] for name, mask in _masks(batch).items()}, batch.packed)


def shape_of(lengths: Lengths, batch_size: int, negatives: int = 0, right: int = 1) -> Batch:
    """The (shape, dtype) of every array of a batch of these lengths, None where there is none.

    `right`: of how many passages it may be known that they answer a query.
    """

    def of(width: int, dtype: str, *each: int) -> Any:
        return ((batch_size, *each, width), np.dtype(dtype)) if width else None

    def rows(needed: bool = True) -> Any:
        return ((batch_size,), np.dtype("int32")) if needed else None

    both = {
        f"{name}_{part}": of(width, dtype)
        for name in TEXTS
        if name not in ("answer", *OF_POOL)
        for width in [getattr(lengths, name)]
        for part, dtype in zip(PARTS, ("int32", "bool"), strict=True)
    }
    slots = 1 + negatives
    pool = [of(n, dtype, slots) for n in (lengths.passage, lengths.prefix) for dtype in ("int32", "bool")]
    return Batch(
        row=rows(),
        query_key=rows(),
        right_key=of(right, "int32"),
        answer_start=rows(bool(lengths.answer)),
        answer_mask=of(lengths.answer, "bool"),
        string_answer_start=rows(bool(lengths.string)),
        pool=Pool(of(slots, "int32"), *pool),
        packed=lengths.packed,
        **both,
    )


def padding_share(batch: Batch, candidates: int) -> float:
    """How many of the tokens that both models read are padding, 0 to 1; a suffix is read once a candidate."""
    masks, there = _masks(batch), batch.pool.key >= 0
    real = {name: int(np.count_nonzero(mask[there] if name in OF_POOL else mask)) for name, mask in masks.items()}
    slots = there.shape[1]
    read = len(batch.row) * shapes.tokens_of_row(lengths(batch), candidates, slots - 1)
    return 1.0 - shapes.tokens_of_row(Lengths.of(real), candidates, 0) / read


def _masks(batch: Batch) -> dict[str, np.ndarray]:
    masks = {name: getattr(batch.pool if name in OF_POOL else batch, f"{name}_mask") for name in TEXTS}
    return {name: mask for name, mask in masks.items() if mask is not None}


def _pad(ragged: Ragged | None, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    return (None, None) if ragged is None else pad(ragged, rows, length)


def order(num_rows: int, batch_size: int, seed: int) -> "grain.MapDataset":
    """`order(...)[step]`: the rows (batch_size,) of a step's batch, steps counted from 0, for ever.

    Each epoch is a shuffle of its own; a batch may hold the end of one and the start of the next, so all rows are met
    equally often.
    """
    import grain  # here: it loads jax, which commands that only read rows need not wait for

    if not 0 < batch_size <= num_rows:
        raise ValueError(f"batches of {batch_size} cannot be made of {num_rows} rows")
    return grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat(EPOCHS).batch(batch_size)


def iterate(
    examples: Examples,
    batching: Batching,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    own: np.ndarray | None = None,
    planned: np.ndarray | None = None,
    brought: np.ndarray | None = None,
) -> Iterator[Batch]:
    """The batches of steps start_step .. total_steps - 1 (from 0), made ahead of time by threads; `own` as above.

    `planned` (steps, batch_size): the rows of these very steps, where they are not those of `order`, and `brought`
    (steps, batch_size, _) the passages that they bring, where they are not the given ones.
    """
    import grain

    if planned is None:
        rows = order(len(examples), batch_size, seed)[start_step:total_steps]
        made = rows.map(lambda batch: collate(examples, batch, batching, own))
    else:
        passages = [None] * len(planned) if brought is None else brought
        steps = grain.MapDataset.range(len(planned))
        made = steps.map(lambda step: collate(examples, planned[step], batching, own, passages[step]))
    ahead = grain.ReadOptions(num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
    return iter(made.to_iter_dataset(ahead))
