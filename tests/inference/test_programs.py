"""One program for one function, model, placement and static values; whoever asks, and how often."""

import functools

import jax
import numpy as np
import pytest
from test_likelihood import some_pairs, tiny
from test_search import tiny_retriever

from rag_jax.data import segments
from rag_jax.distributed import sharding
from rag_jax.inference import answering, decoding, likelihood, programs, search
from rag_jax.progress import Counter


@pytest.fixture(scope="module")
def compilations():
    """How many programs were compiled or read from the cache on disk, up to now."""
    seen = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: seen.append(event))
    return lambda: seen.count("/jax/core/compile/backend_compile_duration")


def embed(params):
    tokens = segments.Ragged.of([np.arange(1, 2 + n % 7) for n in range(9)])
    return search.embed(tiny_retriever()[1], params, tokens, batch_size=4, label="texts")


def likelihoods(params):
    pairs = some_pairs()
    counter = Counter("answers", len(pairs))
    return likelihood.answer_log_probs(tiny("gpt2")[0], params, pairs, at_a_time=6, counter=counter)


def answers(params, num_tokens=3):
    ones = np.ones((2, 4), bool)
    prompt = (np.arange(8).reshape(2, 4).astype(np.int32), ones), (np.full((2, 4), 5, np.int32), ones)
    candidates, weights = np.array([[0, 1], [1, 0]], np.int32), np.log(np.full((2, 2), 0.5, np.float32))
    model = tiny("gpt2")[0]
    decoding.answer_ids(model, params, *prompt, candidates, weights, num_tokens=num_tokens, eos_id=0)
    for num_beams in (1, 2):
        strategy = answering.Decoding("sequence", num_tokens, 0, num_beams=num_beams)
        answering.answers(model, params, answering.Asked(*prompt, candidates, weights, strategy))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("user", "params"),
    [(embed, tiny_retriever()[2]), (likelihoods, tiny("gpt2")[1]), (answers, tiny("gpt2")[1])],
    ids=["embed", "likelihoods", "answers"],
)
def test_what_was_compiled_is_used_again_by_equal_models_that_lie_alike(compilations, user, params):
    mesh = sharding.make_mesh(1, 1, 8)
    copies = [functools.partial(jax.tree.map, np.array), lambda p: jax.device_put(p, sharding.param_shardings(mesh, p))]
    for lay in copies:
        began = compilations()
        user(lay(params))
        first = compilations()
        user(lay(params))
        assert first > began and compilations() == first


@pytest.mark.slow
def test_other_static_values_are_other_programs(compilations):
    params = tiny("gpt2")[1]
    answers(params)
    known = compilations()
    answers(params, num_tokens=2)
    assert compilations() > known
    where = programs.placement(params, "generator")
    sizes = {"num_tokens": 2, "eos_id": 0}
    same = [
        programs.compiled(decoding.one_by_one, tiny("gpt2")[0], where, **dict(items))
        for items in (sizes.items(), reversed(sizes.items()))
    ]
    assert same[0] is same[1]
    assert programs.compiled(decoding.one_by_one, tiny("gpt2")[0], where, num_tokens=3, eos_id=0) is not same[0]
