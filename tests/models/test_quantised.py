"""Frozen weights in fewer bits: the codes by hand, and models on them against the same models on what the codes say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_models import assert_trees_close, hf_config, make_batch

from rag_jax import hf, models
from rag_jax.hf import config as configs
from rag_jax.hf import weights
from rag_jax.models import Computing, Lora, adapters, quantised

LORA = Lora(3, 6.0, ("attention/", "mlp/"))


def rounded(number):
    """To bfloat16: 8 bits of a mantissa, of which the first is not kept."""
    step = 2.0 ** (np.floor(np.log2(number)) - 7) if number else 1.0
    return np.round(number / step) * step, np.ceil(number / step) * step


def by_hand(kernel, kind):
    """The nearest of all values that a block has, number by number; of four bits by the best of three scales."""
    if kind == "uint4":
        return evenly_by_hand(kernel)
    block = quantised.block_of(kind, len(kernel))
    levels = np.arange(-127, 128) / 127 if kind == "int8" else quantised.NF4.astype(np.float64)
    out = np.empty(kernel.shape)
    for column in range(kernel.shape[1]):
        for start in range(0, len(kernel), block):
            part = kernel[start : start + block, column].astype(np.float64)
            largest = np.abs(part).max()
            scales = [rounded(largest)[1]]
            if kind == "int4":
                scales += [rounded(np.float32(share) * np.float32(largest))[0] for share in (0.92, 0.84)]
            found = [(levels * scale)[np.abs(part[:, None] - levels * scale).argmin(axis=1)] for scale in scales]
            out[start : start + block, column] = min(found, key=lambda each: np.sum((each - part) ** 2))
    return out


def evenly_by_hand(kernel):
    """Sixteen values from the least number of a block to the largest, or of the best range that is drawn together."""
    block, out = quantised.block_of("uint4", len(kernel)), np.empty(kernel.shape)
    for column in range(kernel.shape[1]):
        for start in range(0, len(kernel), block):
            part, found = kernel[start : start + block, column], []
            for share in (1.0, 0.92, 0.84):
                low, high = part.min(), part.max()
                middle, half = (high + low) / 2, np.float32(share) * (high - low) / 2
                least = low if share == 1 else middle - half
                step = np.float16(np.float32(share) * (high - low) / 15)
                levels = np.float64(np.float16(least)) + np.arange(16) * np.float64(step)
                found.append(levels[np.abs(part[:, None] - levels).argmin(axis=1)])
            out[start : start + block, column] = min(found, key=lambda each: np.sum((each - part) ** 2))
    return out


def test_weights_that_came_out_of_such_codes_go_back_as_they_were():
    """GGUF's Q4_1: a step and a least number in float16 of 32 weights, whose codes reach from 0 to 15."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (4, 32, 6))
    codes[:, 0], codes[:, 31] = 0, 15
    step, low = (rng.uniform(0.001, 0.02, (4, 1, 6)).astype(np.float16).astype(np.float32) for _ in range(2))
    kernel = (codes * step + np.float16(-8 * low).astype(np.float32)).astype(np.float32).reshape(128, 6)
    leaves = quantised.quantised(kernel, "uint4")
    got = quantised.dequantised(*(jnp.asarray(leaves[n]) for n in quantised.LEAVES), jnp.float32)
    np.testing.assert_allclose(got, kernel, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", quantised.KINDS)
@pytest.mark.parametrize("inputs", [64, 128, 48, 6])
def test_every_number_is_the_nearest_that_its_block_has(kind, inputs):
    rng = np.random.default_rng(inputs)
    kernel = rng.standard_normal((inputs, 5)).astype(np.float32) * np.float32(0.02)
    kernel[:, 2] = 0.0
    kernel[0, 3] = 7.0  # an outlier costs its own block alone
    leaves = quantised.quantised(kernel, kind)
    for name, (shape, dtype) in quantised.shapes(kind, inputs, 5).items():
        assert leaves[name].shape == shape and leaves[name].dtype == dtype
    got = np.asarray(quantised.dequantised(*(jnp.asarray(leaves[n]) for n in quantised.LEAVES), jnp.float32))
    np.testing.assert_allclose(got, by_hand(kernel, kind), rtol=1e-5, atol=1e-7)
    error = np.linalg.norm((got - kernel)[:, [0, 1, 4]]) / np.linalg.norm(kernel[:, [0, 1, 4]])
    assert error < (0.007 if kind == "int8" else 0.09)


def test_bits_of_a_weight():
    for kind, bits in (("int8", 8.25), ("int4", 4.5), ("uint4", 5.0)):
        size = sum(
            np.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in quantised.shapes(kind, 4096, 8).values()
        )
        assert 8 * size / (4096 * 8) == bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(family)`: random weights of a family in a file, and its config."""

    def make(family):
        path = tmp_path_factory.mktemp("model")
        problems = []
        config = configs.from_hf(hf_config(family).to_dict(), problems)
        assert not problems
        rng = np.random.default_rng(3)
        # Gemma adds 1 to what it has learned of a scale. At twice the usual scales attention would be so sharp that one
        # rounding of a weight moves states by more than is compared to.
        scale = float(family != "gemma3")
        draw = lambda p, a: rng.normal(scale * (p[-1].key == "scale"), 0.2, a.shape).astype(np.float32)  # noqa: E731
        params = jax.tree_util.tree_map_with_path(draw, models.abstract(config)[1])
        weights.save_params(params, path, hf_config(family).model_type, config, np.float32)
        return path, config

    return make


def loaded(folder, family, base_dtype):
    """The model on such a base, with adapters, and on what the base says in float32 with the same adapters."""
    path, config = folder(family)
    reduced = models.with_base(models.with_lora(config, LORA), base_dtype)
    held = jax.tree.map(jnp.asarray, hf.load_params(path, hf_config(family).model_type, reduced))
    whole = jax.tree.map(jnp.asarray, adapters.merged(held, None))
    own = {}
    rng = np.random.default_rng(4)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(models.abstract(reduced)[1]):
        name = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if adapters.is_adapter(name):
            own[name] = jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32)
    return (reduced, held), (models.with_lora(config, LORA), whole), own


def loss_of(config, params, own):
    batch = make_batch("right")
    graphdef, shapes = models.abstract(config)
    flat = {
        jax.tree_util.keystr(p, simple=True, separator="/"): a for p, a in jax.tree_util.tree_leaves_with_path(params)
    }

    def loss(own):
        leaf = lambda p, _: (flat | own)[jax.tree_util.keystr(p, simple=True, separator="/")]  # noqa: E731
        model = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(leaf, shapes))
        hidden = model(jnp.asarray(batch.ids), jnp.asarray(batch.mask))
        return jnp.sum(hidden * batch.weights * batch.mask[:, :, None]), hidden

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(own)


@pytest.mark.parametrize("base_dtype", ["bfloat16", *quantised.KINDS])
@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "gpt2", "llama-biases", "phi3", "gemma3"])
def test_a_model_on_such_a_base_is_that_on_its_dequantised_copy(folder, family, base_dtype):
    held, whole, own = loaded(folder, family, base_dtype)
    (_, hidden), gradients = loss_of(*held, own)
    (_, expected), of_whole = loss_of(*whole, own)
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)
    assert_trees_close(gradients, of_whole, 5e-5)
    # And not that on the float32 base.
    path, config = folder(family)
    params = jax.tree.map(jnp.asarray, hf.load_params(path, hf_config(family).model_type, config))
    assert np.abs(loss_of(models.with_lora(config, LORA), params, own)[0][1] - expected).max() > 1e-4


@pytest.mark.parametrize("base_dtype", quantised.KINDS)
def test_no_layer_is_kept_whole_for_the_backward_pass(folder, base_dtype):
    """In the program of the gradient no array has the shape of all layers' kernels in a wider type."""
    (config, held), _, own = loaded(folder, "llama2", base_dtype)
    batch = make_batch("right")
    for remat in ("none", "dots", "full"):
        computing = dataclasses.replace(config.computing, remat=remat)
        graphdef, shapes = models.abstract(dataclasses.replace(config, computing=computing))
        flat = {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_leaves_with_path(held)}

        def loss(own, graphdef=graphdef, shapes=shapes, flat=flat):
            def leaf(path, _):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                return own[name] if name in own else flat[jax.tree_util.keystr(path)]

            model = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(leaf, shapes))
            return jnp.sum(model(jnp.asarray(batch.ids), jnp.asarray(batch.mask)))

        text = jax.jit(jax.grad(loss)).lower(own).as_text()
        assert "tensor<2x32x48xf32>" not in text and "tensor<32x48xf32>" in text


def test_computing_says_how_weights_are_held():
    assert Computing().base_dtype == "float32"
    with pytest.raises(ValueError, match="5 inputs are odd"):
        quantised.block_of("int4", 5)
