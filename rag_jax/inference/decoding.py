"""Answers by decoding with a KV cache: greedy, sampled or by beams, from a mixture of K passages.

RAG-Token mixes the passages' distributions at every token, RAG-Sequence weighs whole answers (Lewis et al., 2020):

    token       p(y_t | q, y_<t) = sum_k p(k | q) p(y_t | k, q, y_<t)
    sequence    p(y | q)         = sum_k p(k | q) prod_t p(y_t | k, q, y_<t)

**P** distinct passages of a batch, **B** queries, **K** candidates, **S** = B K streams, **W** beams, **Y** hypotheses
of a query, **T** tokens of an answer, **Lp** prefix (passage segment), **Lq** query segment, **V** vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from rag_jax import rag
from rag_jax.distributed import sharding
from rag_jax.inference import programs
from rag_jax.models.decoder import Cache, Decoder

# The bits of the float32 that follows 1.
ABOVE_ONE = np.float32(1).view(np.uint32) + np.uint32(1)
Tokens = tuple[Any, Any]  # ids (n, L) int32 and mask (n, L) bool, right-padded


class Noise(NamedTuple):
    """What sampling adds. A row has a key of its own: what is drawn for it does not depend on the rows beside it."""

    keys: Key[Array, " B"]
    temperature: Any  # scalar; divides the mixture's log-probabilities
    top_p: Any  # scalar; see `nucleus`


class Sampling(NamedTuple):
    """As `Noise`, of a program that is told the numbers when it is compiled; temperature 0: the likeliest."""

    keys: Key[Array, " B"]
    temperature: float
    top_p: float


class Reading(NamedTuple):
    """Passages and queries, read: where the K streams of each query stand before its answer."""

    hidden: Float[Array, "B K D"]
    cache: Cache  # of the S streams, with room for the answer


class Decoded(NamedTuple):
    """Answers up to end-of-sequence, and log p(y_t | k, q, y_<t) of their tokens; past the end, noise."""

    ids: Int[Array, "B T"]
    token_log_probs: Float[Array, "B K T"]


def read(
    generator: Decoder,
    prefix: tuple[Int[Array, "P Lp"], Bool[Array, "P Lp"]],
    query: tuple[Int[Array, "B Lq"], Bool[Array, "B Lq"]],
    candidates: Int[Array, "B K"],
    *,
    num_slots: int,
) -> Reading:
    """Each passage runs once, whatever the number of queries that read it; `num_slots` >= Lp + Lq + T of a stream."""
    (prefix_ids, prefix_mask), (query_ids, query_mask), (B, K) = prefix, query, candidates.shape
    _, passages = generator.fill_cache(prefix_ids, prefix_mask, num_slots)
    repeated_ids, repeated_mask = (jnp.repeat(a, K, axis=0) for a in (query_ids, query_mask))
    hidden, cache = generator.extend_cache(repeated_ids, repeated_mask, streams(passages, candidates.reshape(B * K)))
    last = repeated_mask.sum(axis=-1, dtype=jnp.int32)[:, None, None] - 1
    return Reading(jnp.take_along_axis(hidden, last, axis=1).reshape(B, K, -1), cache)


def streams(cache: Cache, rows: Int[Array, " S"]) -> Cache:
    """Some rows of a cache, in another order or several times."""
    return Cache(cache.key[:, rows], cache.value[:, rows], cache.length[rows])


def next_logits(generator: Decoder, hidden: Float[Array, "B K D"]) -> tuple[Float[Array, "B K V"], Float[Array, "B K"]]:
    """Of the next token, float32, and their logsumexp_V: log p(v | k, query, y_<t) is the difference.

    They stay apart, since a difference for every v would be as much work as a softmax.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = generator.logits(flat).reshape(*hidden.shape[:2], -1)
    return logits, jax.nn.logsumexp(logits, axis=-1)


def mixture(
    doc_log_probs: Float[Array, "B K"], logits: Float[Array, "B K V"], log_norms: Float[Array, "B K"]
) -> Float[Array, "B V"]:
    """log sum_k p(k | query) p(v | k, query, y_<t)."""
    weighed = logits + (doc_log_probs - log_norms)[:, :, None]
    return weighed[:, 0] if weighed.shape[1] == 1 else jax.nn.logsumexp(weighed, axis=1)


def nucleus(scores: Float[Array, "B V"], top_p: Any) -> Bool[Array, "B V"]:
    """Of softmax(scores) the fewest likeliest whose sum reaches `top_p` (Holtzman et al., 2020); at 1 all.

    Those as likely as the last of them are kept too. The least likely is sought by halving: a CPU sorts a vocabulary
    twenty times as slowly.
    """
    probs = jax.nn.softmax(scores, axis=-1)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        is_enough = jnp.sum(jnp.where(probs >= as_float(middle), probs, 0.0), axis=-1, keepdims=True) >= top_p
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    # Floats from 0 on are in the order of their bits.
    as_float = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    zero = jnp.zeros((len(probs), 1), jnp.uint32)
    least, _ = jax.lax.fori_loop(0, 31, halve, (zero, zero + ABOVE_ONE))
    return (probs >= as_float(least)) | (top_p >= 1)


def choose(scores: Float[Array, "B V"], noise: Noise | None, number: Any) -> Int[Array, " B"]:
    """The likeliest (of equals the lowest); with noise one drawn from the nucleus of softmax(scores / temperature).

    By Gumbel's trick; `number` tells the draws of one row apart.
    """
    if noise is not None:
        scores = scores / noise.temperature
        keys = jax.vmap(jax.random.fold_in, (0, None))(noise.keys, number)
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
        scores = jnp.where(nucleus(scores, noise.top_p), scores + gumbel, -jnp.inf)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


class Progress(NamedTuple):
    """Answers of which t tokens are there; those that have ended wait for the others."""

    t: Int[Array, ""]
    ended: Bool[Array, " B"]
    decoded: Decoded
    cache: Cache


def begin(
    generator: Decoder,
    reading: Reading,
    doc_log_probs: Float[Array, "B K"],
    noise: Noise | None,
    *,
    num_tokens: int,
    eos_id: int,
) -> Progress:
    """The first token of each answer."""
    B, K = doc_log_probs.shape
    empty = Decoded(jnp.full((B, num_tokens), eos_id, jnp.int32), jnp.zeros((B, K, num_tokens)))
    start = _write(generator, 0, reading.hidden, jnp.zeros(B, bool), empty, doc_log_probs, noise, eos_id)
    return Progress(jnp.ones((), jnp.int32), *start, reading.cache)


def go_on(
    generator: Decoder,
    progress: Progress,
    doc_log_probs: Float[Array, "B K"],
    noise: Noise | None,
    until: Any,
    *,
    eos_id: int,
    axes: tuple[str, ...] = (),
) -> Progress:
    """Further tokens, up to `until` of them, or until every answer has ended.

    Also those on the other devices along `axes`: they compute together.
    """
    B, K = doc_log_probs.shape

    def unfinished(progress: Progress) -> Array:
        going_on = jnp.any(~progress.ended)
        return (progress.t < until) & (jax.lax.psum(going_on, axes) > 0 if axes else going_on)

    def step(progress: Progress) -> Progress:
        t, ended, decoded, cache = progress
        hidden, cache = generator.decode_step(jnp.repeat(decoded.ids[:, t - 1], K), cache)
        hidden = hidden.reshape(B, K, -1)
        return Progress(t + 1, *_write(generator, t, hidden, ended, decoded, doc_log_probs, noise, eos_id), cache)

    return jax.lax.while_loop(unfinished, step, progress)


def _write(
    generator: Decoder,
    t: Any,
    hidden: Float[Array, "B K D"],
    ended: Bool[Array, " B"],
    decoded: Decoded,
    doc_log_probs: Float[Array, "B K"],
    noise: Noise | None,
    eos_id: int,
) -> tuple[Bool[Array, " B"], Decoded]:
    """Token t of each answer, and which have ended with it."""
    logits, log_norms = next_logits(generator, hidden)
    token = jnp.where(ended, eos_id, choose(mixture(doc_log_probs, logits, log_norms), noise, t))
    each = jnp.take_along_axis(logits, token[:, None, None], axis=-1)[..., 0] - log_norms
    decoded = Decoded(decoded.ids.at[:, t].set(token), decoded.token_log_probs.at[:, :, t].set(each))
    return ended | (token == eos_id), decoded


def one_by_one(
    generator: Decoder,
    reading: Reading,
    doc_log_probs: Float[Array, "B K"],
    noise: Noise | None,
    *,
    num_tokens: int,
    eos_id: int,
    axes: tuple[str, ...] = (),
) -> Decoded:
    """RAG-Token: every token the likeliest of the mixture, or drawn from it, up to end-of-sequence; then `eos_id`.

    One token goes on in all K streams of a query; with K = 1 this is plain decoding.
    """
    start = begin(generator, reading, doc_log_probs, noise, num_tokens=num_tokens, eos_id=eos_id)
    return go_on(generator, start, doc_log_probs, noise, num_tokens, eos_id=eos_id, axes=axes).decoded


class _Beams(NamedTuple):
    """W hypotheses of each query that go on, and the W best that have ended; best first, -inf: there is none."""

    ids: Int[Array, "B W T"]
    log_probs: Float[Array, "B W"]
    ended_ids: Int[Array, "B W T"]
    ended_scores: Float[Array, "B W"]


def beam(
    generator: Decoder,
    reading: Reading,
    doc_log_probs: Float[Array, "B K"],
    *,
    num_beams: int,
    length_penalty: float,
    num_tokens: int,
    eos_id: int,
) -> tuple[Int[Array, "B W T"], Float[Array, "B W"]]:
    """The W best answers that RAG-Token beam search finds, best first; behind their end, `eos_id`. -inf: there is none.

        score(y) = log p(y | query) / |y| ** length_penalty        |y| counts end-of-sequence

    Of the 2 W best continuations at a token, those that end are answers if they are among the first W; the W best of
    the others go on. An answer also ends at T tokens. Stops when no answer that goes on can still be among the W best.
    """
    (B, K), W, T = doc_log_probs.shape, num_beams, num_tokens
    doc_log_probs = jnp.repeat(doc_log_probs, W, axis=0)
    best = functools.partial(jnp.take_along_axis, axis=1)

    def advance(t: Any, hidden: Float[Array, "BW K D"], beams: _Beams) -> tuple[_Beams, Int[Array, "B W"]]:
        """Every hypothesis one token longer; and which of the beams each one continues."""
        mixed = mixture(doc_log_probs, *next_logits(generator, hidden)).reshape(B, W, -1)
        V = mixed.shape[-1]
        log_probs, index = jax.lax.top_k((beams.log_probs[:, :, None] + mixed).reshape(B, W * V), 2 * W)
        parent, token = index // V, index % V
        ids = best(beams.ids, parent[:, :, None]).at[:, :, t].set(token)
        ends = (token == eos_id) | (t == T - 1)
        scores = jnp.where(ends & (jnp.arange(2 * W) < W), log_probs / (t + 1.0) ** length_penalty, -jnp.inf)
        ended_scores, place = jax.lax.top_k(jnp.concatenate([beams.ended_scores, scores], axis=1), W)
        ended_ids = best(jnp.concatenate([beams.ended_ids, ids], axis=1), place[:, :, None])
        going_on, place = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_probs), W)
        return _Beams(best(ids, place[:, :, None]), going_on, ended_ids, ended_scores), best(parent, place)

    def unfinished(carry: Any) -> Array:
        t, beams, _, _ = carry
        # What is still to come makes an answer less likely; only its length can raise the score.
        return (t < T) & jnp.any(beams.log_probs[:, 0] / T**length_penalty > beams.ended_scores[:, -1])

    def step(carry: Any) -> Any:
        t, beams, parent, cache = carry
        beam_of = (jnp.arange(B)[:, None] * W + parent).reshape(B * W, 1)
        cache = streams(cache, (beam_of * K + jnp.arange(K)).reshape(-1))
        hidden, cache = generator.decode_step(jnp.repeat(beams.ids[:, :, t - 1].reshape(B * W), K), cache)
        return t + 1, *advance(t, hidden.reshape(B * W, K, -1), beams), cache

    none = jnp.full((B, W), -jnp.inf)
    empty = jnp.full((B, W, T), eos_id, jnp.int32)
    start = _Beams(empty, none.at[:, 0].set(0.0), empty, none)  # one beam: equal ones would stay equal
    each = jnp.repeat(jnp.arange(B), W)
    cache = streams(reading.cache, (each[:, None] * K + jnp.arange(K)).reshape(-1))
    first = advance(0, reading.hidden[each], start)
    found = jax.lax.while_loop(unfinished, step, (jnp.ones((), jnp.int32), *first, cache))[1]
    return found.ended_ids, found.ended_scores


def score(
    generator: Decoder, reading: Reading, ids: Int[Array, "B Y T"], mask: Bool[Array, "B Y T"]
) -> Float[Array, "B Y K T"]:
    """log p(y_t | k, query, y_<t) of given answers under every passage of their query; `mask`: up to their end."""
    B, K, D = reading.hidden.shape

    def one(hypothesis: Any) -> Array:
        ids, mask = (jnp.repeat(a, K, axis=0) for a in hypothesis)
        after, _ = generator.extend_cache(ids, mask, reading.cache)
        before = jnp.concatenate([reading.hidden.reshape(B * K, 1, D), after[:, :-1]], axis=1)
        log_probs = generator.gold_log_probs(before.reshape(-1, D), ids.reshape(-1))
        return log_probs.reshape(B, K, -1)

    return jnp.swapaxes(jax.lax.map(one, (jnp.swapaxes(ids, 0, 1), jnp.swapaxes(mask, 0, 1))), 0, 1)


def up_to_end(ids: Int[Any, "... T"], eos_id: int) -> Bool[Any, "... T"]:
    """Which tokens are of the answer: those up to the first end-of-sequence, itself included."""
    is_end = ids == eos_id
    return is_end.cumsum(axis=-1) - is_end == 0


def answer_ids(
    model: rag.Rag,
    params: dict,
    prefix: Tokens,
    query: Tokens,
    candidates: Int[np.ndarray, "B K"],
    doc_log_probs: Float[np.ndarray, "B K"],
    *,
    num_tokens: int,
    eos_id: int,
    sampling: Sampling | None = None,
) -> Int[Array, "B T"]:
    """RAG-Token answers by the generator of `params`, greedy or sampled, compiled once for each shape.

    Of d devices each answers B / d of the queries from its own P of the d P prefixes, into which its candidates count.
    """
    arrays: tuple[Any, ...] = (*prefix, *query, candidates, doc_log_probs)
    sizes: dict[str, Any] = {"num_tokens": num_tokens, "eos_id": eos_id}
    if sampling is not None and sampling.temperature > 0:
        arrays += (np.asarray(jax.random.key_data(sampling.keys)),)
        sizes |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    where, split = programs.placement(params, "generator"), ((sharding.BATCH,) * len(arrays), (sharding.BATCH,))
    answer = programs.compiled(_answer, model, where, split, axes=where.axes, **sizes)
    (ids,) = answer(params["generator"], *where.split_rows(*arrays))
    return ids


def _answer(
    generator: Decoder,
    prefix_ids: Int[Array, "P Lp"],
    prefix_mask: Bool[Array, "P Lp"],
    query_ids: Int[Array, "B Lq"],
    query_mask: Bool[Array, "B Lq"],
    candidates: Int[Array, "B K"],
    doc_log_probs: Float[Array, "B K"],
    key_data: UInt32[Array, "B 2"] | None = None,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    **sizes: Any,
) -> tuple[Int[Array, "B T"]]:
    num_slots = prefix_ids.shape[1] + query_ids.shape[1] + sizes["num_tokens"]
    prefix, query = (prefix_ids, prefix_mask), (query_ids, query_mask)
    reading = read(generator, prefix, query, candidates, num_slots=num_slots)
    noise = None if key_data is None else Noise(jax.random.wrap_key_data(key_data), temperature, top_p)
    return (one_by_one(generator, reading, doc_log_probs, noise, **sizes).ids,)


def text(tokenizer: Any, ids: Int[np.ndarray, " T"]) -> str:
    """The answer before its end-of-sequence token, without special tokens and the space around it."""
    ended = np.flatnonzero(ids == tokenizer.eos_token_id)
    return tokenizer.decode(ids[: ended[0]] if len(ended) else ids, skip_special_tokens=True).strip()
