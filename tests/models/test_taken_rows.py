"""Rows taken by number, and the sums that are their gradients, against numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.models import rows

SUMS = [rows.summed_one_by_one, rows.summed_by_product, rows.summed_in_blocks]


def drawn(dtype, num_rows, num_addends):
    """Some rows are met all the time, as words are, and some never."""
    rng = np.random.default_rng(num_rows + num_addends)
    shares = 1 / np.arange(1, num_rows + 1)
    index = rng.choice(num_rows, num_addends, p=shares / shares.sum())
    addends = jnp.asarray(rng.uniform(0.5, 1.5, (num_addends, 3)), dtype)
    expected = np.zeros((num_rows, 3))
    np.add.at(expected, index, np.asarray(addends, np.float64))
    return addends, jnp.asarray(index), expected


# Fewer addends than a block, rows that go on over several blocks, a single row, most rows without any.
@pytest.mark.parametrize(
    ("num_rows", "num_addends", "dtype"),
    [(3, 5, "float32"), (40, 1000, "bfloat16"), (1, 300, "float32"), (5000, 1001, "bfloat16")],
)
@pytest.mark.parametrize("summed", SUMS)
def test_sums_are_those_of_numpy(summed, dtype, num_rows, num_addends):
    addends, index, expected = drawn(dtype, num_rows, num_addends)
    got = jax.jit(summed, static_argnums=2)(addends, index, num_rows)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_are_taken_and_their_gradient(dtype):
    weights, index, expected = drawn(dtype, 7, 2000)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
    taken, pullback = jax.vjp(lambda table: rows.taken(table, index, jnp.dtype(dtype)), table)
    np.testing.assert_array_equal(taken, table[index].astype(dtype))
    np.testing.assert_allclose(pullback(weights)[0], expected, rtol=1e-5)


def test_an_accelerator_scatters_to_one_row_each():
    """What promises an order of sums costs nothing there only if no two addends go to the same row."""
    addends, index, _ = drawn("bfloat16", 3000, 500)
    gradient = jax.grad(lambda table: jnp.vdot(rows.taken(table, index, addends.dtype), addends))
    text = jax.jit(gradient).trace(jnp.zeros((3000, 3))).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('"stablehlo.scatter"(') == text.count("unique_indices = true") == 1


@pytest.mark.parametrize("of_rows", [rows.cut_and_summed, rows.summed_and_cut])
def test_sums_of_what_is_joined(of_rows):
    addends, index, expected = drawn("bfloat16", 40, 1000)
    joined = jnp.concatenate([addends[:, None], 2 * addends[:, None], -addends[:, None]], axis=1)
    got = jax.jit(of_rows, static_argnums=(2, 3))(joined, index, 40, 2)
    np.testing.assert_allclose(got, np.stack([expected, 2 * expected], axis=1), rtol=1e-5)


def test_rows_that_are_taken_and_joined_and_their_gradients():
    rng = np.random.default_rng(0)
    table, own, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((7, 5, 2), (90, 3, 2), (90, 8, 2)))
    index = rng.integers(7, size=90)
    operands = jnp.asarray(table), jnp.asarray(own)
    joined, pullback = jax.vjp(lambda table, own: rows.taken_and_joined(table, jnp.asarray(index), own), *operands)
    np.testing.assert_array_equal(joined, np.concatenate([table[index], own], axis=1))
    expected = np.zeros((7, 5, 2))
    np.add.at(expected, index, weights[:, :5])
    of_table, of_own = pullback(jnp.asarray(weights))
    np.testing.assert_allclose(of_table, expected, rtol=1e-5)
    np.testing.assert_array_equal(of_own, weights[:, 5:])


def test_a_gpu_sums_what_is_joined_before_it_cuts():
    """A product by cuBLAS would have a copy made of a cut operand."""
    index, own, weights = jnp.zeros(90, int), jnp.zeros((90, 3, 2)), jnp.ones((90, 8, 2))

    def gradient(table):
        return jax.vjp(lambda table: rows.taken_and_joined(table, index, own), table)[1](weights)

    text = jax.jit(gradient).trace(jnp.zeros((7, 5, 2))).lower(lowering_platforms=("cuda",)).as_text()
    (product,) = re.findall(r"stablehlo.dot_general .* -> tensor<([\dx]+)xf32>", text)
    assert product == f"7x{8 * 2}"
