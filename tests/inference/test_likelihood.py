"""Log-probabilities of answers behind shared passages, against every string alone through the plain forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_jax import models, rag
from rag_jax.data import segments
from rag_jax.distributed import sharding
from rag_jax.inference import likelihood
from rag_jax.progress import Counter

V = 61
GPT2 = models.Gpt2Config(V, 2, 2, 16, 32, 96, 1e-5, "gelu_tanh", 0.0, 0.0, 0.0)
LLAMA = models.LlamaConfig(
    V, 2, 4, 2, 8, 32, 64, 96, 1e-5, 1e4, None, "silu", False, False, False, True, False, 9, 0.0
)  # with a window that does not reach from the answer to all of the passage
FAMILIES = {"gpt2": (models.Gpt2, GPT2), "llama": (models.Llama, LLAMA)}


def tiny(family):
    make, config = FAMILIES[family]
    module = make(config, rngs=nnx.Rngs(3))
    graphdef, state = nnx.split(module)
    params = jax.tree.map(lambda a: a * 2 if a.ndim > 1 else a, nnx.to_pure_dict(state))  # livelier than at random
    objective = rag.Objective("token", 2, 1.0, 1.0, 1.0, 1.0)
    return rag.Rag(objective, None, graphdef, "mean", 1), {"generator": params}


def some_pairs(seed=0, n=23, popular=9):
    """Texts of all lengths; passage 0 is empty but for one token and read by many."""
    rng = np.random.default_rng(seed)
    prefixes, queries, answers = (
        segments.Ragged.of(rng.integers(1, V, length) for length in lengths)
        for lengths in ((1, 30, 12, 12, 29, 3), (2, 9, 5, 14), (1, 7, 3, 2, 11))
    )
    prefix = np.where(np.arange(n) < popular, 0, rng.integers(1, len(prefixes), n))
    rest = (rng.integers(0, len(part), n) for part in (queries, answers))
    return likelihood.Pairs(prefixes, queries, answers, rng.permutation(prefix), *rest)


def alone(model, params, pairs):
    generator = model.model("generator", params)
    forward = jax.jit(
        lambda ids: jax.nn.log_softmax(generator.logits(generator(ids[None], jnp.ones((1, 64), bool))[0]))
    )
    found = np.zeros((len(pairs), int(pairs.answers.lengths[pairs.answer].max())))
    for row in range(len(pairs)):
        answer = pairs.answers[pairs.answer[row]]
        head = [*pairs.prefixes[pairs.prefix[row]], *pairs.queries[pairs.query[row]]]
        string = [*head, *answer]
        log_probs = forward(jnp.asarray(string + [0] * (64 - len(string))))
        found[row, : len(answer)] = np.asarray(log_probs)[len(head) - 1 + np.arange(len(answer)), answer]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_whole_strings(family):
    model, params = tiny(family)
    pairs = some_pairs()
    expected = alone(model, params, pairs)
    assert expected.min() < -6 and (expected != 0).sum() == pairs.answers.lengths[pairs.answer].sum()
    for at_a_time in (4, 23, 100):
        counter = Counter("test", len(pairs))
        found = likelihood.answer_log_probs(model, params, pairs, at_a_time=at_a_time, counter=counter)
        assert counter.done == len(pairs)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 1, 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_devices_share_them(family, shape):
    model, params = tiny(family)
    pairs = some_pairs(n=50, popular=20)
    expected = likelihood.answer_log_probs(model, params, pairs, at_a_time=16, counter=Counter("test", len(pairs)))
    mesh = sharding.make_mesh(*shape)
    placed = jax.device_put(params, sharding.param_shardings(mesh, params))
    found = likelihood.answer_log_probs(model, placed, pairs, at_a_time=16, counter=Counter("test", len(pairs)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 60), st.integers(1, 4), st.integers(1, 40), st.integers(0, 30))
def test_every_pair_is_read_once_behind_its_own_passage(seed, n, num_devices, at_a_time, popular):
    pairs = some_pairs(seed, n, popular)
    size = -(-min(at_a_time, n) // num_devices)
    seen, times, shapes = [], np.zeros(len(pairs.prefixes), int), set()
    for prefixes, batches in likelihood.blocks(pairs, num_devices, at_a_time):
        shapes.add(prefixes.shape)
        assert prefixes.shape[0] == num_devices and prefixes.shape[1] <= size
        read = set()
        for batch in batches:
            assert batch.pairs.shape == (num_devices, size)
            device, s = np.nonzero(batch.pairs >= 0)
            pair = batch.pairs[device, s]
            place = batch.place[device, s]
            np.testing.assert_array_equal(prefixes[device, place], pairs.prefix[pair])
            seen.extend(pair)
            read |= set(zip(device, place, strict=True))
        for device, place in read:
            times[prefixes[device, place]] += 1
    assert sorted(seen) == list(range(n)) and len(shapes) == 1
    np.testing.assert_array_equal(times, -(-np.bincount(pairs.prefix, minlength=len(times)) // size))
