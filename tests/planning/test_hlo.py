"""FLOPs read from compiled programs against products counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import growth
from rag_jax.planning import hlo


def compiled_text(fn, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn).lower(*arguments).compile().as_text()


def layers(kernels, x):
    return jnp.sum(jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0])


def test_products_of_one_call():
    text = compiled_text(lambda a, b: jnp.einsum("gij,gjk->gik", a, b), (3, 4, 5), (3, 5, 6))
    assert hlo.dot_flops(text) == 2 * 3 * 4 * 5 * 6


def test_a_loop_counts_as_often_as_it_runs():
    assert hlo.dot_flops(compiled_text(layers, (7, 8, 8), (4, 8))) == 7 * 2 * 4 * 8 * 8
    # The backward pass has two products a layer more.
    assert hlo.dot_flops(compiled_text(jax.grad(layers), (7, 8, 8), (4, 8))) == 3 * 7 * 2 * 4 * 8 * 8


def test_rematerialisation_shows():
    kept = compiled_text(jax.grad(layers), (7, 8, 8), (4, 8))
    again = compiled_text(jax.grad(lambda k, x: jnp.sum(jax.checkpoint(layers)(k, x) ** 2)), (7, 8, 8), (4, 8))
    assert hlo.dot_flops(again) == pytest.approx(hlo.dot_flops(kept) * 4 / 3)


def test_a_loop_of_unknown_length_is_refused():
    def until_small(a):
        return jax.lax.while_loop(lambda a: a.sum() > 1, lambda a: a @ a * 0.01, a)

    with pytest.raises(ValueError, match="does not say how often"):
        hlo.dot_flops(compiled_text(until_small, (8, 8)))


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "most"), [("none", 1.10), ("dots", 1.10), ("full", 1.40)])
def test_the_step_computes_little_more_than_the_maths_needs(remat, most):
    assert 1.0 <= growth.measure(growth.Point(remat=remat), steps=0)["flops"] <= most
