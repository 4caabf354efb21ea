"""The few shapes that batches take: how long each text may be, and of how many tokens the models are run."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from rag_jax.data.examples import Examples
from rag_jax.data.segments import Ragged, round_up

# The lengths that are of passages.
OF_POOL = ("passage", "prefix")
# The shares of batches that the smaller shapes are to hold, and how much less than the next one each must be read in to
# be worth its compilation: where rows are padded, and where they are packed.
PADDED, PACKED = ((0.95, 0.5), 0.9), ((0.99, 0.9, 0.5), 0.95)
# Where passages are found as the run goes, rows may share many of them: so much of what they would be otherwise.
SHARED = (0.8, 0.64, 0.5, 0.4)
# There a packed shape gives the other texts the room that the next larger one gives them, where that costs no more than
# so: else one long question would send a batch of few passages to a shape of many.
ROOMY = 1.03
# Batches that are drawn to see how many tokens they have.
DRAWN = 1000


@dataclasses.dataclass(frozen=True, order=True)
class Packed:
    """Of how many tokens of a block of rows a model's layers are run, some padding among them; 0: of all there is."""

    query: int = 0
    passage: int = 0  # of all slots of the rows
    encoded_rows: int = 0  # that the retriever reads at a time
    prefix: int = 0
    suffix: int = 0  # once for all candidates
    answer: int = 0  # whose likelihood is asked for
    read_rows: int = 0  # that the generator reads at a time


@dataclasses.dataclass(frozen=True, order=True)
class Lengths:
    """The padded lengths of a batch; 0 for what is not used."""

    query: int = 0  # Lq
    passage: int = 0  # Lr
    prefix: int = 0  # Lp
    suffix: int = 0  # Ls
    answer: int = 0  # T
    string: int = 0  # Ld
    packed: Packed = Packed()

    @classmethod
    def of(cls, lengths: Mapping[str, int], packed: Packed = Packed()) -> "Lengths":
        """Of these texts; the others are not used."""
        return cls(*(lengths.get(name, 0) for name in TEXTS), packed=packed)


# The texts that have lengths.
TEXTS = tuple(field.name for field in dataclasses.fields(Lengths) if field.name != "packed")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How many rows of a batch the models read at a time, and so are packed together."""

    group_size: int
    devices: int = 1  # that share the rows of a batch
    groups_at_a_time: int = 1  # that the generator reads on a device
    encodes_all: bool = True  # of a device's rows the retriever reads all at a time; else none are packed

    def encoded(self, of_rows: np.ndarray) -> np.ndarray:
        """Sums of (_, B) over the blocks of the retriever (_, n)."""
        return of_rows.reshape(len(of_rows), self.devices, -1).sum(axis=2)

    def read(self, of_rows: np.ndarray) -> np.ndarray:
        """Sums of (_, B) over the blocks of the generator (_, n)."""
        of_groups = of_rows.reshape(len(of_rows), self.devices, -1, self.group_size).sum(axis=3)
        of_blocks = of_groups[:, :, blocks_of(of_groups.shape[2], self.groups_at_a_time)].sum(axis=3)
        return of_blocks.reshape(len(of_rows), -1)

    def num_rows(self, batch_size: int) -> dict[str, int]:
        """Rows of a block of each model, as `Packed` names them."""
        of_device = batch_size // self.devices
        groups = blocks_of(of_device // self.group_size, self.groups_at_a_time).shape[1]
        return {"encoded_rows": of_device, "read_rows": groups * self.group_size}


def blocks_of(num: int, at_most: int) -> np.ndarray:
    """Places (blocks, size) of 0 .. num - 1 in even blocks of at most so many, the last filled up with the last one."""
    count = -(-num // max(at_most, 1))
    size = -(-num // count)
    return np.minimum(np.arange(count * size), num - 1).reshape(count, size)


def row_lengths(
    examples: Examples, rows: np.ndarray, brought: np.ndarray | None = None, num_own: int = 0
) -> dict[str, np.ndarray]:
    """How many tokens each of the rows needs of every length, (rows,) each.

    Of passages those of the first `num_own` (0: all) that are known to answer its query, and of those it has `brought`
    (rows, _).
    """
    query, passages = examples.query_key[rows], examples.own_key[rows, : num_own or None]
    if brought is not None:
        passages = np.concatenate([passages, brought], axis=1)
    answer = _lengths(examples.answers, rows)
    return {
        "query": _lengths(examples.retriever_queries, query),
        "passage": _lengths(examples.retriever_passages, passages).max(axis=1),
        "prefix": _lengths(examples.prefixes, passages).max(axis=1),
        "suffix": _lengths(examples.prompt_queries, query) + answer,
        "answer": answer,
        "string": _lengths(examples.strings, rows),
    }


def _lengths(ragged: Ragged | None, index: np.ndarray) -> np.ndarray:
    if ragged is None:
        return np.zeros(index.shape, np.int64)
    return np.where(index < 0, 0, ragged.lengths[index])


def slot_tokens(ragged: Ragged | None, keys: np.ndarray) -> np.ndarray:
    """Tokens (rows,) in all slots of rows that hold these passages (rows, S), -1: none, which is one token."""
    return np.where(keys < 0, 1, _lengths(ragged, keys)).sum(axis=1) * (ragged is not None)


def block_tokens(blocks: Blocks, of_rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The most tokens (_,) that a block of each of some batches has, from those of their rows (_, B)."""
    of_retriever = ("query", "passage") if blocks.encodes_all else ()
    sums = {name: blocks.encoded(of_rows[name]) for name in of_retriever}
    sums |= {name: blocks.read(of_rows[name]) for name in ("prefix", "suffix", "answer")}
    return {name: of_blocks.max(axis=1) for name, of_blocks in sums.items()}


def longest(examples: Examples) -> Lengths:
    """The one shape that every batch fits, rounded up to a multiple of 8: any row may bring any passage."""
    needed = row_lengths(examples, np.arange(len(examples))) | _passage_lengths(examples)
    return _padded({name: int(lengths.max(initial=0)) for name, lengths in needed.items()})


def buckets(
    examples: Examples, batch_size: int, candidates: int, negatives: int = 0, blocks: Blocks | None = None
) -> tuple[Lengths, ...]:
    """The shapes that batches take, smallest first: the last one is what all batches fit.

    A length that a share q of the rows keeps within holds a whole batch with probability q**batch_size; the smaller
    shapes make this certain shares of them. What will be mined is not known yet: a batch is taken to hold that many
    more passages like the rows', or, where rows name none, like all that there are. `blocks`: what is packed, in all
    shapes but the last; None: nothing.
    """
    needed = row_lengths(examples, np.arange(len(examples)), examples.negative_key, num_own=1)
    mined = 0 if examples.negative_key is not None else negatives
    drawn = dict.fromkeys(needed, batch_size) | dict.fromkeys(OF_POOL, batch_size * (1 + mined))
    unlabelled = bool((examples.passage_key < 0).any())
    found_later = bool(mined) or unlabelled
    if unlabelled:
        needed |= _passage_lengths(examples)
    sums = None if blocks is None else block_tokens(blocks, _drawn_tokens(examples, batch_size, negatives))
    shapes = [longest(examples)]
    shares, worth = PADDED if blocks is None else PACKED

    def add(shape: Lengths) -> None:
        if found_later and shapes[0].packed != Packed():
            shape = with_room(shape, shapes[0], candidates, negatives)
        if tokens_of_row(shape, candidates, negatives) <= worth * tokens_of_row(shapes[0], candidates, negatives):
            shapes.insert(0, shape)

    for held in shares:
        share = {name: held ** (1 / times) for name, times in drawn.items()}
        lengths = _padded({name: int(np.quantile(of, share[name], method="higher")) for name, of in needed.items()})
        if blocks is None or sums is None:
            add(lengths)
            continue
        packed = {name: _rounded(float(np.quantile(of, held**0.5))) for name, of in sums.items()}
        if candidates == 1:
            packed.pop("prefix")  # a row's own alone is read, wherever it lies
        of_rows = blocks.num_rows(batch_size)
        add(dataclasses.replace(lengths, packed=Packed(**packed, **of_rows)))
        if held == shares[-1] and found_later:
            for share_of in SHARED:
                fewer = {name: _rounded(share_of * packed[name]) for name in OF_POOL if packed.get(name)}
                add(dataclasses.replace(lengths, packed=Packed(**packed | fewer, **of_rows)))
    return tuple(shapes)


def with_room(shape: Lengths, larger: Lengths, candidates: int, negatives: int) -> Lengths:
    """The shape with the room of a larger one for texts that are not of passages, as far as it costs little (ROOMY)."""
    for name in (text for text in TEXTS if text not in OF_POOL):
        room = {name: getattr(larger.packed, name)} if hasattr(larger.packed, name) else {}
        packed = dataclasses.replace(shape.packed, **room)
        roomy = dataclasses.replace(shape, **{name: getattr(larger, name)}, packed=packed)
        tokens, before = (tokens_of_row(of, candidates, negatives) for of in (roomy, shape))
        shape = roomy if tokens <= ROOMY * before else shape
    return shape


def _drawn_tokens(examples: Examples, batch_size: int, negatives: int) -> dict[str, np.ndarray]:
    """Of the rows of some batches (DRAWN, batch_size) the tokens of each text, of passages in all slots."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(examples), size=(DRAWN * batch_size,))
    keys = examples.own_key[rows, :1]
    if examples.negative_key is not None:
        keys = np.concatenate([keys, examples.negative_key[rows, :negatives]], axis=1)
    missing = np.full((len(rows), 1 + negatives - keys.shape[1]), -1, keys.dtype)
    keys = np.concatenate([keys, missing], axis=1)
    if examples.negative_key is None:
        keys = np.where(keys < 0, rng.integers(len(examples.passages), size=keys.shape), keys)
    of_rows = tokens_of_rows(examples, rows, keys)
    return {name: tokens.reshape(DRAWN, batch_size) for name, tokens in of_rows.items()}


def tokens_of_rows(examples: Examples, rows: np.ndarray, keys: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens (rows,) of the texts of rows whose slots hold passages of these keys (rows, S)."""
    needed = row_lengths(examples, rows)
    of_slots = zip(OF_POOL, (examples.retriever_passages, examples.prefixes), strict=True)
    return needed | {name: slot_tokens(ragged, keys) for name, ragged in of_slots}


def fits(shape: Lengths, needed: dict[str, np.ndarray], tokens: dict[str, np.ndarray]) -> bool:
    """Whether rows that need these lengths (rows,) are of the shape, in blocks of so many tokens (_,)."""
    return all(int(lengths.max(initial=0)) <= getattr(shape, name) for name, lengths in needed.items()) and all(
        int(most.max(initial=0)) <= room for name, most in tokens.items() if (room := getattr(shape.packed, name))
    )


def tokens_of_row(shape: Lengths, candidates: int, negatives: int) -> float:
    """What both models read for one row and the negatives it brings; a suffix is read once a candidate."""
    packed, slots = shape.packed, 1 + negatives

    def of(name: str, rows: int) -> float:
        tokens, padded = getattr(packed, name), getattr(shape, name) * (slots if name in OF_POOL else 1)
        return min(tokens / rows, float(padded)) if tokens else float(padded)

    of_retriever = of("query", packed.encoded_rows) + of("passage", packed.encoded_rows)
    return of_retriever + of("prefix", packed.read_rows) + candidates * of("suffix", packed.read_rows) + shape.string


def _passage_lengths(examples: Examples) -> dict[str, np.ndarray]:
    """Of all passages, as many tokens as each model reads of them."""
    ragged = zip(OF_POOL, (examples.retriever_passages, examples.prefixes), strict=True)
    return {name: of.lengths for name, of in ragged if of is not None}


def _padded(needed: dict[str, int]) -> Lengths:
    return Lengths.of({name: round_up(length) for name, length in needed.items()})


def _rounded(tokens: float) -> int:
    """Tokens that are packed, as accelerators like to have them: a multiple of 64, of 8 where they are few."""
    step = 64 if tokens > 512 else 8
    return -(-int(np.ceil(tokens)) // step) * step
