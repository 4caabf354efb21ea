"""Log-probabilities of given answers behind passages: each passage is read once, however many queries found it.

**n** pairs of a row, which has a query and an answer, and a passage; **S** pairs and **P** passages of a device at a
time; **A** answer tokens of these pairs; **Lp** prefix, **Ls** suffix, **d** devices, **T** tokens of the longest
answer.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as PS
from jaxtyping import Array, Bool, Float, Int

from rag_jax import rag
from rag_jax.data import segments
from rag_jax.distributed import sharding
from rag_jax.inference import programs, search
from rag_jax.models.decoder import Cache, Decoder
from rag_jax.progress import Counter

ROWS = sharding.BATCH
# Of keys, values and lengths: in the former layers lead.
CACHE = (PS(None, *ROWS), PS(None, *ROWS), ROWS)
# Answer tokens a pair, of which a batch is padded to whole numbers: few shapes.
ANSWER_STEP = 4


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Rows of tokens, and which of them each pair joins: `prefixes[prefix] queries[query] answers[answer]`."""

    prefixes: segments.Ragged
    queries: segments.Ragged
    answers: segments.Ragged
    prefix: np.ndarray  # (n,)
    query: np.ndarray  # (n,)
    answer: np.ndarray  # (n,)

    def __len__(self) -> int:
        return len(self.prefix)

    @functools.cached_property
    def suffix_lengths(self) -> np.ndarray:  # (n,)
        return self.queries.lengths[self.query] + self.answers.lengths[self.answer]


class Batch(NamedTuple):
    """S pairs of each of d devices, with the place of their passage among the device's P; -1: filling."""

    pairs: np.ndarray  # (d, S)
    place: np.ndarray  # (d, S)


class Block(NamedTuple):
    """Passages that are in the cache at one time, and all that is read behind them."""

    prefixes: np.ndarray  # (d, P)
    batches: list[Batch]


def answer_log_probs(
    model: rag.Rag, params: dict, pairs: Pairs, *, at_a_time: int, counter: Counter
) -> Float[np.ndarray, "n T"]:
    """log p(y_t | passage, query, y_<t) of each pair's answer, 0 past its end; on every process, every one must call.

    `at_a_time`: pairs, and passages whose keys and values are kept, of all devices. Passages of like length are read
    together, and behind them suffixes of like length. `counter` counts the pairs.
    """
    where = programs.placement(params, "generator")
    num_slots = segments.padded_length(pairs.prefixes.lengths[pairs.prefix], int(pairs.prefixes.lengths.max()))
    suffix_slots = segments.round_up(int(pairs.suffix_lengths.max()))
    rows = (ROWS,)
    read = programs.compiled(_read, model, where, (rows * 2, CACHE), num_slots=num_slots)
    read_behind = programs.compiled(_read_behind, model, where, ((*CACHE, *rows * 3), rows), num_slots=suffix_slots)
    score = programs.compiled(_score, model, where, (rows * 3, rows))
    found = np.zeros((len(pairs), int(pairs.answers.lengths[pairs.answer].max())), np.float32)
    generator = params["generator"]
    for prefixes, batches in blocks(pairs, where.shards, at_a_time):
        length = search.size_for(int(pairs.prefixes.lengths[prefixes].max()), num_slots)
        cache = read(generator, *where.split_rows(*segments.pad(pairs.prefixes, prefixes.ravel(), length)))
        computed = []
        for batch in batches:
            ids, mask, place = suffixes(pairs, batch)
            hidden = read_behind(generator, *cache, *where.split_rows(ids, mask, place))
            state, ids, owner = answer_tokens(pairs, batch, suffix_slots)
            computed.append((*score(generator, *hidden, *where.split_rows(state.ravel(), ids.ravel())), owner))
        for log_probs, (row, column, token) in computed:
            found[row, column] = sharding.to_host(log_probs)[token]
        counter.update(sum(int((batch.pairs >= 0).sum()) for batch in batches))
    return found


def blocks(pairs: Pairs, num_devices: int, at_a_time: int) -> Iterator[Block]:
    """All pairs, those of a passage on one device; a passage of more than a batch of pairs is there several times."""
    size = -(-min(at_a_time, len(pairs)) // num_devices)
    suffix_lengths, place = pairs.suffix_lengths, np.zeros(len(pairs), np.int32)
    chunks = by_passage(pairs, size)
    # Blocks are even, so that one shape serves all and the last is not mostly filling.
    num_blocks = -(-len(chunks) // (num_devices * size))
    room = -(-len(chunks) // (num_blocks * num_devices))
    for start in range(0, len(chunks), num_devices * room):
        members = chunks[start : start + num_devices * room]
        prefixes = np.full((num_devices, room), pairs.prefix[members[0][0]])
        own: list[list[int]] = [[] for _ in range(num_devices)]  # pairs of each device
        taken = [0] * num_devices  # places of each device
        for chunk in sorted(members, key=len, reverse=True):  # each to the device with the least to do
            device = min((d for d in range(num_devices) if taken[d] < room), key=lambda d: len(own[d]))
            prefixes[device, taken[device]], place[chunk] = pairs.prefix[chunk[0]], taken[device]
            taken[device] += 1
            own[device].extend(chunk)
        rows = np.full((num_devices, -(-max(map(len, own)) // size) * size), -1)
        for device, mine in enumerate(own):
            rows[device, : len(mine)] = sorted(mine, key=lambda pair: -suffix_lengths[pair])
        parts = np.split(rows, rows.shape[1] // size, axis=1)
        yield Block(prefixes, [Batch(part, np.where(part < 0, 0, place[part])) for part in parts])


def by_passage(pairs: Pairs, size: int) -> list[Int[np.ndarray, " _"]]:
    """Chunks of at most `size` pairs that share a passage, those of the longest passage first."""
    order = np.lexsort((pairs.prefix, -pairs.prefixes.lengths[pairs.prefix]))
    shared = np.split(order, np.flatnonzero(np.diff(pairs.prefix[order])) + 1)
    return [some[start : start + size] for some in shared for start in range(0, len(some), size)]


def suffixes(pairs: Pairs, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids and mask (d S, Ls) of query and answer, and the place of the passage (d S,); filling repeats a pair."""
    flat = batch.pairs.ravel()
    rows = np.where(flat < 0, flat.max(), flat)
    length = segments.round_up(int(pairs.suffix_lengths[rows].max()))
    ids, mask = segments.join_padded((pairs.queries, pairs.answers), (pairs.query[rows], pairs.answer[rows]), length)
    return ids, mask, batch.place.ravel().astype(np.int32)


def answer_tokens(pairs: Pairs, batch: Batch, slots: int) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Where the states that predict answer tokens stand among a device's (S slots), and these tokens: (d, A) each.

    And, of every real one, its pair, its number t in the answer and its place in the flat (d A).
    """
    num_devices, size = batch.pairs.shape
    lengths = np.where(batch.pairs < 0, 0, pairs.answers.lengths[pairs.answer[batch.pairs]])
    step = ANSWER_STEP * size
    room = -(-int(lengths.sum(axis=1).max()) // step) * step
    where, ids = np.zeros((2, num_devices, room), np.int32)
    owner = []
    for device, (own, counts) in enumerate(zip(batch.pairs, lengths, strict=True)):
        s = np.repeat(np.arange(size), counts)
        pair, t = own[s], np.concatenate([np.arange(count) for count in counts])
        where[device, : len(s)] = s * slots + pairs.queries.lengths[pairs.query[pair]] - 1 + t
        ids[device, : len(s)] = pairs.answers.tokens[pairs.answers.starts[pairs.answer[pair]] + t]
        owner.append((pair, t, device * room + np.arange(len(s))))
    return where, ids, tuple(np.concatenate(part) for part in zip(*owner, strict=True))


def _read(
    generator: Decoder, ids: Int[Array, "P Lp"], mask: Bool[Array, "P Lp"], *, num_slots: int
) -> tuple[Array, ...]:
    """Keys, values and lengths of passages."""
    return tuple(generator.fill_cache(ids, mask, num_slots)[1])


def _read_behind(
    generator: Decoder,
    key: Array,
    value: Array,
    length: Array,
    ids: Int[Array, "S Ls"],
    mask: Bool[Array, "S Ls"],
    place: Int[Array, " S"],
    *,
    num_slots: int,
) -> tuple[Float[Array, "S slots D"]]:
    """States of suffixes behind the passages at `place`."""
    hidden = generator.read_cache(ids, mask, Cache(key, value, length), place)
    return (jnp.pad(hidden, ((0, 0), (0, num_slots - ids.shape[1]), (0, 0))),)


def _score(
    generator: Decoder, hidden: Float[Array, "S slots D"], where: Int[Array, " A"], ids: Int[Array, " A"]
) -> tuple[Float[Array, " A"]]:
    """Log-probabilities of tokens after the states that stand `where`."""
    states = hidden.reshape(-1, hidden.shape[-1])[where]
    return (generator.gold_log_probs(states, ids),)
