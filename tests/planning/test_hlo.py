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


@pytest.mark.slow
def test_evidence_costs_no_backward_pass():
    """At K = 8 a listwise objective computes at most .65 of a marginal, with a frozen generator .40."""
    token, pdist, frozen = (growth.measure(point, steps=0) for point in growth.SWEEPS["objective"])
    assert pdist["work"] <= 0.65 * token["work"] and frozen["work"] <= 0.40 * token["work"]
    assert max(pdist["flops"], frozen["flops"]) <= 1.10


@pytest.mark.slow
def test_adapters_cost_no_gradient_of_what_they_are_of():
    """A step that trains adapters of rank 16 computes at most .72 of one that trains all, and what the maths needs."""
    full, lora = (growth.measure(growth.Point(rank=rank), steps=0) for rank in (0, 16))
    assert lora["work"] <= 0.72 * full["work"]
    assert lora["flops"] <= 1.10


@pytest.mark.parametrize(
    ("window", "taps"),
    [
        ("size=3", 3 * 8),
        ("size=3 pad=1_1", 3 * 8 + 2 * 2),  # ten places, of which the outer two meet one element less each
        ("size=8 pad=7_7 lhs_dilate=8 rhs_reversal=1", 80),  # one of eight
        ("size=10 stride=9 lhs_dilate=10", 10),  # a batch of ten
        ("size=2 rhs_dilate=3", 2 * 7),
    ],
)
def test_taps_of_convolutions_by_a_loop(window, taps):
    """What meets padding or a gap is no work; ten elements along the dimension."""
    (parsed,) = hlo._windows(f"window={{{window}}}, dim_labels=b0f_0io->b0f")
    reach = (parsed.size - 1) * parsed.rhs_dilate + 1
    places = sum(parsed.pad) + 9 * parsed.lhs_dilate + 1
    size_out = (places - reach) // parsed.stride + 1
    met = 0
    for out in range(size_out):
        for tap in range(parsed.size):
            place = out * parsed.stride - parsed.pad[0] + tap * parsed.rhs_dilate
            met += place in range(0, 9 * parsed.lhs_dilate + 1, parsed.lhs_dilate)
    assert hlo._taps(10, size_out, parsed) == met == taps


CUDNN_TEXT = """
ENTRY %main (q: bf16[4,12,64,32], k: bf16[4,12,320,32]) -> bf16[4,12,64,32] {
  %q = bf16[4,64,12,32]{3,2,1,0} parameter(0)
  %k = bf16[4,320,12,32]{3,2,1,0} parameter(1)
  %there = (bf16[4,12,64,32]{3,1,2,0}, f32[4,12,64]{2,1,0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaScaleBiasSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["4", "12", "64", "320"]}}}
  ROOT %back = (bf16[4,12,64,32]{3,1,2,0}, f32[4,12,64]{2,1,0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["4", "12", "64", "320"]}}}
}
"""  # noqa: E501


OWN_KERNEL_TEXT = """
ENTRY %main (q: bf16[4,64,128]) -> bf16[4,64,128] {
  %q = bf16[4,64,128]{2,1,0} parameter(0)
  ROOT %attention.1 = bf16[4,64,128]{2,1,0} custom-call(%q), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": {"cost_estimate":{"flops":"12345","transcendentals":"6","bytes_accessed":"7"}}}
}
"""  # noqa: E501


def test_a_kernel_of_our_own_says_what_it_computes():
    assert hlo.dot_flops(OWN_KERNEL_TEXT) == 12345


def test_products_of_fused_attention():
    """Two on the way there; five on the way back, the scores' once more."""
    assert hlo.dot_flops(CUDNN_TEXT) == (2 + 5) * 2 * 4 * 12 * 64 * 320 * 32
