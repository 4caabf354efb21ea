"""Packed rows against the same rows as they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_jax import models
from rag_jax.models import BertConfig, Gpt2Config, LayerKind, LlamaConfig, ModernBertConfig, layers
from rag_jax.models.packing import packed, packing_of, repeated, unpacked

MASK = np.array([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]], bool)
ENCODERS = {
    "bert": BertConfig(61, 2, 2, 16, 32, 64, 2, 1e-12, "gelu", 0.2, 0.2),
    "gpt2": Gpt2Config(67, 2, 2, 16, 32, 64, 1e-5, "gelu_tanh", 0.2, 0.2, 0.2),
    "llama": LlamaConfig(
        67, 2, 4, 2, 8, 16, 32, 64, 1e-5, 1e4, None, "silu", True, False, False, True, False, 3, 0.0, causal=False
    ),
    "mpnet": BertConfig(61, 2, 2, 16, 32, 64, 0, 1e-12, "gelu", 0.2, 0.2, first_position=2, distance_kinds=32),
    "modernbert": ModernBertConfig(
        67,
        3,
        2,
        16,
        32,
        64,
        1e-5,
        "gelu",
        False,
        False,
        False,
        0.2,
        0.2,
        0.2,
        (LayerKind(1e4), LayerKind(1e3, None, 3)),
        (0, 1, 1),
    ),
}


@pytest.mark.parametrize("num_tokens", [9, 14, 19])
def test_what_is_real_is_kept_and_comes_back_and_so_does_its_gradient(num_tokens):
    packing = packing_of(jnp.asarray(MASK), num_tokens)
    assert packing is not None
    np.testing.assert_array_equal(packing.slot[:9], np.flatnonzero(MASK))
    assert len(set(packing.slot.tolist())) == num_tokens
    kept = np.isin(np.arange(20), packing.slot).reshape(4, 5)
    rows = jnp.arange(1.0, 61.0).reshape(4, 5, 3)
    again = unpacked(packed(rows, packing), packing)
    np.testing.assert_array_equal(again, np.where(kept[:, :, None], rows, 0))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=rows.shape))
    gradient = jax.grad(lambda rows: jnp.sum(unpacked(packed(rows, packing), packing) * weights))(rows)
    np.testing.assert_array_equal(gradient, np.where(kept[:, :, None], weights, 0).astype(np.float32))


def test_nothing_is_packed_where_nothing_would_be_left_out():
    rows = jnp.zeros((4, 5))
    for num_tokens in (0, 20, 30):
        assert packing_of(jnp.asarray(MASK), num_tokens) is None
    assert packed(rows, None) is rows and repeated(None, 3) is None


def test_rows_that_stand_several_times():
    packing = packing_of(jnp.asarray(MASK), 11)
    thrice = repeated(packing, 3)
    assert thrice is not None and packing is not None
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(12, 5, 2)))
    kept = np.repeat(np.isin(np.arange(20), packing.slot).reshape(4, 5), 3, axis=0)
    assert thrice.slot.shape == (33,)
    np.testing.assert_array_equal(unpacked(packed(rows, thrice), thrice), np.where(kept[:, :, None], rows, 0))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_makes_the_same_states_and_gradients(name, side):
    """With dropout, whose bits belong to a row's slots: packed tokens lose what they lose where they stand."""
    graphdef, shapes = models.abstract(ENCODERS[name])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0.1, 0.3, a.shape), a.dtype), shapes)
    lengths = np.array([3, 7, 1, 5, 6])
    slots = np.arange(8)
    mask = slots < lengths[:, None] if side == "right" else slots >= 8 - lengths[:, None]
    ids = np.where(mask, rng.integers(1, 61, (5, 8)), 0).astype(np.int32)
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)
    keys, weights = jax.random.split(jax.random.key(1), 5), rng.normal(size=(5, 8, 16)).astype(np.float32)

    @jax.jit(static_argnames="num_tokens")
    @jax.value_and_grad
    def loss(params, num_tokens):
        hidden = nnx.merge(graphdef, params)(ids, mask, keys, num_tokens)
        return jnp.sum(jnp.where(mask[:, :, None], jnp.sin(hidden) * weights, 0.0))

    expected, gradients = loss(params, num_tokens=0)
    found, of_packed = loss(params, num_tokens=24)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(of_packed), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_padding_that_is_not_kept_costs_no_product():
    """The products of the compiled program are those of so many tokens."""
    config = dataclasses.replace(ENCODERS["bert"], num_layers=1)
    graphdef, params = models.abstract(config)
    mask = jax.ShapeDtypeStruct((5, 8), bool)

    def text(num_tokens):
        def hidden(params, ids, mask):
            return nnx.merge(graphdef, params)(ids, mask, None, num_tokens)

        return jax.jit(hidden).lower(params, jax.ShapeDtypeStruct((5, 8), jnp.int32), mask).as_text()

    assert "tensor<40x16xf32>, tensor<16x32xf32>" in text(0)
    assert "tensor<24x16xf32>, tensor<16x32xf32>" in text(24)
    assert "tensor<40x16xf32>, tensor<16x" not in text(24)


def test_dropped_bits_of_packed_tokens_are_those_of_their_slots():
    packing = packing_of(jnp.asarray(MASK), 9)
    keys, rows = jax.random.split(jax.random.key(0), 4), jnp.ones((4, 5, 6))
    expected = packed(layers.dropout(rows, 0.5, keys), packing)
    np.testing.assert_array_equal(layers.dropout(packed(rows, packing), 0.5, keys, packing), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_what_dropout_takes_does_not_depend_on_padding(name):
    """Not of attention either: a batch takes a shape by what else is in it."""
    graphdef, shapes = models.abstract(ENCODERS[name])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0.1, 0.3, a.shape), a.dtype), shapes)
    keys, lengths = jax.random.split(jax.random.key(1), 5), np.array([3, 7, 1, 5, 6])
    ids, model = rng.integers(1, 61, (5, 12)).astype(np.int32), nnx.merge(graphdef, params)
    mask = np.arange(12) < lengths[:, None]
    short = model(jnp.asarray(ids[:, :8]), jnp.asarray(mask[:, :8]), keys)
    long = model(jnp.asarray(ids), jnp.asarray(mask), keys)
    np.testing.assert_allclose(long[:, :8][mask[:, :8]], short[mask[:, :8]], rtol=1e-4, atol=1e-5)
