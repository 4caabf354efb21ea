"""The kernel for TPUs, interpreted, against the plain way; that the real compiler takes it is tested with plans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.models import attention, tpu_attention
from rag_jax.models.attention import Context, Seen

B, R, C = 5, 4, 8
INDEX = jnp.asarray([2, 0, 2, 1, 0])  # rows of one context apart from each other, and one that no row reads


def plain(query, own, context=None, index=None, offset=None, *, causal, window=None):
    def part(key, value, real, *where):
        return (jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)), Seen(real, window, *where)

    parts = [part(*own, causal)]
    if context is not None:
        keys_values, seen = part(*context, False, offset)
        parts.insert(0, Context(keys_values, seen, index).of_rows())
    return jnp.swapaxes(attention.attend(jnp.swapaxes(query, 1, 2), parts), 1, 2)


def both(heads, length, context_length, **kwargs):
    """Attended values and gradients by both."""
    rng = np.random.default_rng(0)
    (H, G), Lc = heads, context_length

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def keys_values(rows, length):
        real = jnp.asarray(rng.random((rows, length)) < 0.7).at[:, 0].set(True)  # so that every query sees something
        return normal(rows, length, G, C), normal(rows, length, G, C), real

    query, own, weights = normal(B, length, H, C), keys_values(B, length), normal(B, length, H, C)
    more = ()
    if Lc:
        context = keys_values(R, Lc)
        more = context, INDEX, context[2].sum(axis=1)[INDEX]

    def of(attend):
        def loss(query, own, more):
            out = attend(query, own, *more, **kwargs)
            return jnp.vdot(out, weights), out

        def arrays(tree):
            return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32]

        gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True)
        gradients, out = jax.jit(gradient)(query, own, more)
        return [out, *arrays(gradients)]

    interpreted = jax.tree_util.Partial(tpu_attention.attend, interpret=True)
    return zip(of(interpreted), of(plain), strict=True)


@pytest.mark.parametrize(
    ("heads", "length", "context_length", "in_blocks", "kwargs"),
    [
        ((4, 4), 6, 10, False, {"causal": True}),
        ((4, 2), 10, 6, True, {"causal": True, "window": 3}),  # some contexts are out of sight
        ((4, 2), 10, 0, True, {"causal": True}),
        ((2, 2), 7, 0, False, {"causal": False, "window": 4}),
    ],
)
def test_it_equals_the_plain_way(monkeypatch, heads, length, context_length, in_blocks, kwargs):
    if in_blocks:  # of 4 queries and of one key-value head
        monkeypatch.setattr(tpu_attention, "QUERY_BLOCK", 4)
        monkeypatch.setattr(tpu_attention, "MOST_BYTES", 0)
        monkeypatch.setattr(tpu_attention, "LANES", C)
    for got, expected in both(heads, length, context_length, **kwargs):
        np.testing.assert_allclose(got, expected, atol=3e-6)


def test_a_row_that_sees_nothing_gives_a_mean():
    ones = jnp.ones((1, 4, 1, C))
    out = tpu_attention.attend(ones, (ones, 3 * ones, jnp.zeros((1, 4), bool)), causal=False, interpret=True)
    np.testing.assert_allclose(out, 3 * ones)


@pytest.mark.parametrize(
    ("heads", "most_shared", "most", "at_a_time"),
    [
        ((12, 12, 64), 18, 16, 12),  # all
        ((12, 12, 64), 9, 16, 6),  # a divisor, in pairs: 128 lanes
        ((12, 12, 64), 18, 4, 4),
        ((9, 3, 64), 18, 1, 3),  # 192 lanes cannot be cut
        ((32, 8, 128), 9, 16, 4),
        ((32, 8, 128), 0, 1, 1),
    ],
)
def test_heads_of_a_block(heads, most_shared, most, at_a_time):
    assert tpu_attention.heads_at_a_time(heads, most_shared, most) == at_a_time
