"""Examples to batches of numpy arrays with few shapes, in an order that is a function of (seed, step)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rag_jax.data.examples import Examples
from rag_jax.data.segments import Ragged, join_padded, pad, round_up

if TYPE_CHECKING:
    import grain

# For ever; grain's own endless `repeat()` overflows in batches of one row.
EPOCHS = 10**9
PREFETCH_THREADS = 2
PREFETCH_BATCHES = 8
# Of every text in a batch.
PARTS = ("ids", "mask")
# The lengths that are of passages.
OF_POOL = ("passage", "prefix")

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
    readable: Rows = None  # (B, p) the slots of its group that a row may read; None: all that are not empty


@dataclasses.dataclass(frozen=True, order=True)
class Lengths:
    """The padded lengths of a batch; 0 for what is not used."""

    query: int = 0  # Lq
    passage: int = 0  # Lr
    prefix: int = 0  # Lp
    suffix: int = 0  # Ls
    answer: int = 0  # T
    string: int = 0  # Ld


def row_lengths(examples: Examples, rows: np.ndarray, negatives: np.ndarray | None) -> dict[str, np.ndarray]:
    """How many tokens each of the rows needs of every length, (rows,) each, with the negatives (rows, J) it brings."""

    def of(ragged: Ragged | None, index: np.ndarray) -> np.ndarray:
        return np.zeros(index.shape, np.int64) if ragged is None else ragged.lengths[index]

    query, passage = examples.query_key[rows], examples.passage_key[rows][:, None]
    if negatives is not None:  # where there is none, the row's own passage
        passage = np.concatenate([passage, np.where(negatives < 0, passage, negatives)], axis=1)
    answer = of(examples.answers, rows)
    return {
        "query": of(examples.retriever_queries, query),
        "passage": of(examples.retriever_passages, passage).max(axis=1),
        "prefix": of(examples.prefixes, passage).max(axis=1),
        "suffix": of(examples.prompt_queries, query) + answer,
        "answer": answer,
        "string": of(examples.strings, rows),
    }


def longest(examples: Examples) -> Lengths:
    """The one shape that every batch fits, rounded up to a multiple of 8."""
    needed = row_lengths(examples, np.arange(len(examples)), examples.negative_key)
    return _padded({name: int(values.max(initial=0)) for name, values in needed.items()})


def buckets(examples: Examples, batch_size: int, candidates: int, negatives: int = 0) -> tuple[Lengths, ...]:
    """The shapes that batches take, at most three, smallest first: the last one is what all batches fit.

    A length that a share q of the rows keeps within holds a whole batch with probability q**batch_size; the smaller
    shapes make this 50 and 95 %. A shape is worth its compilation if both models read a tenth less than in the next.
    Which `negatives` will be mined is not known yet: a batch is taken to hold that many more passages like the rows'.
    """
    needed = row_lengths(examples, np.arange(len(examples)), examples.negative_key)
    mined = 0 if examples.negative_key is not None else negatives
    drawn = dict.fromkeys(needed, batch_size) | dict.fromkeys(("passage", "prefix"), batch_size * (1 + mined))
    shapes = [longest(examples)]
    for held in (0.95, 0.5):
        share = {name: held ** (1 / times) for name, times in drawn.items()}
        most = _padded({name: int(np.quantile(of, share[name], method="higher")) for name, of in needed.items()})
        if _tokens(most, candidates, negatives) <= 0.9 * _tokens(shapes[0], candidates, negatives):
            shapes.insert(0, most)
    return tuple(shapes)


def _tokens(shape: Lengths, candidates: int, negatives: int) -> int:
    """What both models read for one row and the negatives it brings; a suffix is read once a candidate."""
    passages = (1 + negatives) * (shape.passage + shape.prefix)
    return shape.query + passages + candidates * shape.suffix + shape.string


def _padded(needed: dict[str, int]) -> Lengths:
    return Lengths(**{name: round_up(length) for name, length in needed.items()})


def collate(
    examples: Examples,
    rows: Sequence[int] | np.ndarray,
    shapes: Sequence[Lengths],
    own: np.ndarray | None = None,
    mined: np.ndarray | None = None,
    group_size: int = 1,
) -> Batch:
    """The batch of these rows in the first of the shapes (see `buckets`) that all of them fit.

    `own`: which of the rows to make, by their places in the batch, whole groups, where other processes make the others;
    None: all. `mined` (rows, J): passages that the rows bring besides their own, -1: none; None: those that are given,
    if any are.
    """
    rows = np.asarray(rows, np.int32)
    if mined is None and examples.negative_key is not None:
        mined = examples.negative_key[rows]
    needed = row_lengths(examples, rows, mined)
    fits = (s for s in shapes if all(values.max() <= getattr(s, name) for name, values in needed.items()))
    lengths = next(fits, None)
    if lengths is None:
        raise ValueError(
            f"no shape of {shapes} holds rows of { ({k: int(v.max()) for k, v in needed.items()}) } tokens"
        )
    if own is not None:
        rows, mined = rows[own], None if mined is None else mined[own]
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
    string_answer_start = None if examples.string_answer_start is None else examples.string_answer_start[rows]
    slots = 1 if mined is None else 1 + mined.shape[1]
    groups = zip(
        examples.passage_key[rows].reshape(-1, group_size, 1),
        [None] * (len(rows) // group_size) if mined is None else mined.reshape(-1, group_size, slots - 1),
        strict=True,
    )
    return Batch(
        row=rows,
        query_key=query,
        right_key=examples.right_key[query],
        **{f"{name}_{part}": array for name, pair in texts.items() for part, array in zip(PARTS, pair, strict=True)},
        answer_start=answer_start,
        answer_mask=answer_mask,
        string_answer_start=string_answer_start,
        pool=_pool(examples, np.concatenate([fill_slots(*group, slots) for group in groups]), lengths),
    )


def fill_slots(right: np.ndarray, brought: np.ndarray | None, slots: int) -> np.ndarray:
    """The keys (g, S) of a group's slots: no passage twice, -1: empty.

    Each row has a slot for the first passage that is `right` for it (g, _), if no row before it has that one; its other
    slots hold what else is right and what it has `brought` (g, _), in this order, as far as no other slot holds it.
    """
    keys, held = np.full((len(right), slots), -1, np.int32), set()
    free = [0] * len(right)

    def put(row: int, passages: Sequence[int]) -> None:
        for passage in passages:
            if passage >= 0 and passage not in held and free[row] < slots:
                keys[row, free[row]] = passage
                held.add(passage)
                free[row] += 1

    for row, passages in enumerate(right.tolist()):
        put(row, passages[:1])
    for row, passages in enumerate(right.tolist()):
        put(row, passages[1:] if brought is None else passages[1:] + brought[row].tolist())
    return keys


def _pool(examples: Examples, key: np.ndarray, lengths: Lengths) -> Pool:
    """Of these passages (B, S). Where there is none, the first one lends its first token: no text is empty."""
    there, texts = key.reshape(-1, 1) >= 0, np.maximum(key, 0).ravel()

    def of(ragged: Ragged | None, length: int) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        if ragged is None:
            return None, None
        ids, mask = pad(ragged, np.where(there[:, 0], texts, texts[there[:, 0]][0]), length)
        mask &= there | (np.arange(length) == 0)
        return np.where(mask, ids, 0).reshape(*key.shape, length), mask.reshape(*key.shape, length)

    return Pool(key, *of(examples.retriever_passages, lengths.passage), *of(examples.prefixes, lengths.prefix))


def lengths(batch: Batch) -> Lengths:
    """The padded lengths of a batch."""
    return Lengths(**{name: mask.shape[-1] for name, mask in _masks(batch).items()})


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
        for name, width in vars(lengths).items()
        if name not in ("answer", *OF_POOL)
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
        **both,
    )


def padding_share(batch: Batch, candidates: int) -> float:
    """How many of the tokens that both models read are padding, 0 to 1; a suffix is read once a candidate."""
    masks, there = _masks(batch), batch.pool.key >= 0
    real = {name: int(np.count_nonzero(mask[there] if name in OF_POOL else mask)) for name, mask in masks.items()}
    slots = there.shape[1]
    read = len(batch.row) * _tokens(lengths(batch), candidates, slots - 1)
    return 1.0 - _tokens(Lengths(**real), candidates, 0) / read


def _masks(batch: Batch) -> dict[str, np.ndarray]:
    masks = {name: getattr(batch.pool if name in OF_POOL else batch, f"{name}_mask") for name in vars(Lengths())}
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
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    shapes: Sequence[Lengths],
    own: np.ndarray | None = None,
    planned: np.ndarray | None = None,
    mined: np.ndarray | None = None,
    group_size: int = 1,
) -> Iterator[Batch]:
    """The batches of steps start_step .. total_steps - 1 (from 0), made ahead of time by threads; `own` as above.

    `planned` (steps, batch_size): the rows of these very steps, where they are not those of `order`, and `mined`
    (steps, batch_size, J) their negatives, where they are not the given ones.
    """
    import grain

    if planned is None:
        rows = order(len(examples), batch_size, seed)[start_step:total_steps]
        made = rows.map(lambda batch: collate(examples, batch, shapes, own, None, group_size))
    else:
        negatives = [None] * len(planned) if mined is None else mined
        steps = grain.MapDataset.range(len(planned))
        made = steps.map(lambda step: collate(examples, planned[step], shapes, own, negatives[step], group_size))
    ahead = grain.ReadOptions(num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
    return iter(made.to_iter_dataset(ahead))
