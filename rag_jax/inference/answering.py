"""Answers from passages that were found: decoded, weighed, and what each passage says to them; in few programs.

Letters as in `decoding`.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rag_jax import losses, rag
from rag_jax.data import segments
from rag_jax.distributed import sharding
from rag_jax.inference import decoding, programs
from rag_jax.inference.decoding import Noise, Reading, Tokens
from rag_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How an answer is looked for."""

    likelihood: str  # "token" | "sequence": the p(y | q) whose likeliest answer is looked for
    num_tokens: int  # T, at most, end-of-sequence included
    eos_id: int
    num_beams: int = 1  # W; more than one are not sampled
    length_penalty: float = 0.0  # of beams
    temperature: float = 0.0  # 0: the likeliest
    top_p: float = 1.0

    @property
    def is_one_by_one(self) -> bool:
        """Whether every token is final once it is there."""
        return self.likelihood == "token" and self.num_beams == 1


@dataclasses.dataclass(frozen=True)
class Asked:
    """A batch of queries, what each is answered from, and how.

    Programs depend on shapes alone. With one `num_slots` batches of different lengths share those that decode.
    """

    prefix: Tokens
    query: Tokens
    candidates: Int[np.ndarray, "B K"]  # of each query, among the prefixes
    doc_log_probs: Float[np.ndarray, "B K"]
    strategy: Decoding
    keys: Key[Array, " B"] | None = None  # of what is sampled
    num_slots: int | None = None  # of the cache; Lp + Lq + T if None


class Answers(NamedTuple):
    """A row a query, in numpy."""

    ids: Int[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]  # true up to the end
    token_log_probs: Float[np.ndarray, "B K T"]  # log p(y_t | k, q, y_<t)
    log_probs: Float[np.ndarray, " B"]  # log p(y | q), nats
    evidence: Float[np.ndarray, "B K"]


def question_keys(seed: int, questions: Sequence[str]) -> Key[Array, " B"]:
    """A question's draws are a function of the seed and its text, not of what else is asked."""
    numbers = jnp.asarray([zlib.crc32(question.encode()) for question in questions], jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)


def answers(model: rag.Rag, params: dict, asked: Asked) -> Answers:
    """Answers to a batch of queries, each from its own candidates.

    RAG-Token takes the best of its beams, or of one. RAG-Sequence decodes thoroughly: beams of every passage alone, all
    of their answers scored under all passages, the highest marginal. Sampled (temperature above 0, a key for each row),
    RAG-Sequence draws a passage and then an answer from it: at temperature 1 that is a draw from p(y | q).
    """
    (reading, noise), strategy, doc_log_probs = _begin(model, params, asked), asked.strategy, asked.doc_log_probs
    if strategy.is_one_by_one:
        sizes = {"num_tokens": strategy.num_tokens, "eos_id": strategy.eos_id}
        ids, token_log_probs = map(sharding.to_host, _one_by_one(model, params, reading, doc_log_probs, noise, **sizes))
    else:
        hypotheses = sharding.to_host(_hypotheses(model, params, reading, doc_log_probs, noise, strategy))
        ids, token_log_probs = _best(model, params, reading, hypotheses, doc_log_probs, strategy)
    return _weighed(strategy, doc_log_probs, ids, token_log_probs)


def stream(model: rag.Rag, params: dict, asked: Asked, *, at_a_time: int) -> Iterator[Int[np.ndarray, "B t"] | Answers]:
    """`answers`, told while they are decoded: the tokens so far, after every `at_a_time` of them; at last the answers.

    Where answers are compared as wholes (beams, RAG-Sequence) there is nothing to tell before the end.
    """
    strategy, doc_log_probs = asked.strategy, asked.doc_log_probs
    if not strategy.is_one_by_one:
        yield answers(model, params, asked)
        return
    reading, noise = _begin(model, params, asked)
    sizes = {"num_tokens": strategy.num_tokens, "eos_id": strategy.eos_id}
    progress = _first(model, params, reading, doc_log_probs, noise, **sizes)
    del reading  # its cache is the progress'
    t = 1
    while t < strategy.num_tokens and not sharding.to_host(progress.ended).all():
        yield sharding.to_host(progress.decoded.ids)[:, :t]
        t = min(t + at_a_time, strategy.num_tokens)
        progress = _go_on(model, params, progress, doc_log_probs, noise, np.int32(t), eos_id=strategy.eos_id)
    yield _weighed(strategy, doc_log_probs, *map(sharding.to_host, progress.decoded))


def _begin(model: rag.Rag, params: dict, asked: Asked) -> tuple[Reading, Noise | None]:
    """Everything before the first token."""
    strategy = asked.strategy
    num_slots = asked.num_slots or asked.prefix[0].shape[1] + asked.query[0].shape[1] + strategy.num_tokens
    reading = _read(model, params, asked.prefix, asked.query, asked.candidates, num_slots=num_slots)
    if strategy.temperature == 0:
        return reading, None
    if asked.keys is None or strategy.num_beams > 1:
        raise ValueError("sampling takes a key for each row and one beam")
    return reading, Noise(asked.keys, np.float32(strategy.temperature), np.float32(strategy.top_p))


def _weighed(
    strategy: Decoding,
    doc_log_probs: Float[np.ndarray, "B K"],
    ids: Int[np.ndarray, "B T"],
    token_log_probs: Float[np.ndarray, "B K T"],
) -> Answers:
    mask = decoding.up_to_end(ids, strategy.eos_id)
    weighed = _weigh(strategy.likelihood, doc_log_probs, token_log_probs, mask)
    return Answers(ids, mask, token_log_probs, *map(np.asarray, weighed))


def _hypotheses(
    model: rag.Rag,
    params: dict,
    reading: Reading,
    doc_log_probs: Float[np.ndarray, "B K"],
    noise: Noise | None,
    strategy: Decoding,
) -> Int[Array, "B Y T"]:
    """The answers of which the one with the highest marginal is given."""
    sizes = {"num_tokens": strategy.num_tokens, "eos_id": strategy.eos_id}
    beams = {"num_beams": strategy.num_beams, "length_penalty": strategy.length_penalty} | sizes
    match strategy.likelihood:
        case "token":
            return _beam(model, params, reading, doc_log_probs, **beams)[0][:, :1]
        case "sequence" if noise is not None:
            return _drawn(model, params, reading, doc_log_probs, noise, **sizes)
        case "sequence":
            return _of_each_passage(model, params, reading, **beams)
    raise ValueError(f"likelihood={strategy.likelihood!r}: must be token or sequence")


def _best(
    model: rag.Rag,
    params: dict,
    reading: Reading,
    hypotheses: Int[np.ndarray, "B Y T"],
    doc_log_probs: Float[np.ndarray, "B K"],
    strategy: Decoding,
) -> tuple[Int[np.ndarray, "B T"], Float[np.ndarray, "B K T"]]:
    """The hypothesis of the highest marginal of each query, and what each passage says to its tokens.

    Several passages often give the same answer: each distinct one is scored once, up to the longest's end.
    """
    distinct = [np.unique(rows, axis=0) for rows in hypotheses]
    num_distinct = 1 << (max(map(len, distinct)) - 1).bit_length()  # a power of two: few shapes
    ids = np.stack([rows[np.arange(num_distinct) % len(rows)] for rows in distinct])
    mask = decoding.up_to_end(ids, strategy.eos_id)
    length = min(segments.round_up(int(mask.sum(axis=-1).max())), ids.shape[-1])
    ids, mask = ids[:, :, :length], mask[:, :, :length]
    scored = sharding.to_host(_score(model, params, reading, ids, mask))
    each = [_weigh(strategy.likelihood, doc_log_probs, scored[:, y], mask[:, y])[0] for y in range(num_distinct)]
    rows, best = np.arange(len(ids)), np.argmax(np.stack(each), axis=0)
    return ids[rows, best], scored[rows, best]


@functools.partial(jax.jit, static_argnums=0)
def _weigh(
    likelihood: str,
    doc_log_probs: Float[Array, "B K"],
    token_log_probs: Float[Array, "B K T"],
    mask: Bool[Array, "B T"],
) -> tuple[Float[Array, " B"], Float[Array, "B K"]]:
    """log p(y | q) and the passages' evidence."""
    log_probs = losses.log_marginal(likelihood, doc_log_probs, token_log_probs, mask)
    return log_probs, losses.evidence(likelihood, doc_log_probs, token_log_probs, mask)


def of_each_passage(
    generator: Decoder, reading: Reading, *, num_beams: int, length_penalty: float, **sizes: Any
) -> Int[Array, "B Y T"]:
    """The answers that each passage alone gives, Y = K W; one of them stands for those that beams did not find."""
    B, K, D = reading.hidden.shape
    alone, certain = reading._replace(hidden=reading.hidden.reshape(B * K, 1, D)), jnp.zeros((B * K, 1))
    if num_beams == 1:
        ids = decoding.one_by_one(generator, alone, certain, None, **sizes).ids
    else:
        beams = {"num_beams": num_beams, "length_penalty": length_penalty} | sizes
        ids, scores = decoding.beam(generator, alone, certain, **beams)
        ids = jnp.where(jnp.isneginf(scores)[:, :, None], ids[:, :1], ids)
    return ids.reshape(B, -1, ids.shape[-1])


def drawn(
    generator: Decoder, reading: Reading, doc_log_probs: Float[Array, "B K"], noise: Noise, **sizes: Any
) -> Int[Array, "B 1 T"]:
    """An answer from a passage drawn from p(k | q); the nucleus is of tokens alone."""
    B, K, _ = reading.hidden.shape
    passage = decoding.choose(doc_log_probs, noise._replace(top_p=jnp.ones(())), sizes["num_tokens"])
    row = jnp.arange(B)
    alone = Reading(reading.hidden[row, passage][:, None], decoding.streams(reading.cache, row * K + passage))
    return decoding.one_by_one(generator, alone, jnp.zeros((B, 1)), noise, **sizes).ids[:, None]


def _program(fn: Callable[..., Any], *, overwritten: bool = False) -> Callable[..., Any]:
    """`fn` of the generator in `params`, compiled once for each shape and each value of `sizes`."""

    def run(model: rag.Rag, params: dict, *arrays: Any, **sizes: Any) -> Any:
        where = programs.placement(params, "generator")
        program = programs.compiled(fn, model, where, overwritten=overwritten, **sizes)
        return program(params["generator"], *arrays)

    return run


_read, _score = _program(decoding.read), _program(decoding.score)
_one_by_one, _beam = _program(decoding.one_by_one), _program(decoding.beam)
_first, _go_on = _program(decoding.begin), _program(decoding.go_on, overwritten=True)
_of_each_passage, _drawn = _program(of_each_passage), _program(drawn)
