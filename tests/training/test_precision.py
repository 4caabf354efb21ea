"""`matmul_precision` in the lowered program of the real step: what every product asks the device for."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_mesh import ALL, mesh_of
from test_rag import make, make_rows

from rag_jax import config, data, models, pair, rag
from rag_jax.distributed import sharding
from rag_jax.models import head
from rag_jax.training import optim
from rag_jax.training import step as train_step

TINY = "configs/tiny.py"
TYPES = re.compile(r" : \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\) -> tensor<(?:\d+x)*(\w+)>")
PRECISION = re.compile(r"precision = \[(\w+), (\w+)\]")


@pytest.fixture(autouse=True)
def as_before():
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


def products(text):
    """How many products of which operands ask for which precision: {((type, type), precision): number}."""
    found = collections.Counter()
    for line in text.splitlines():
        if "dot_general" in line:
            types, precision = TYPES.search(line), PRECISION.search(line)
            assert types, line
            asked = set(precision.groups()) if precision else {"DEFAULT"}
            assert len(asked) == 1, line
            found[types.groups()[:2], asked.pop()] += 1
    assert found and "convolution" not in text
    return found


def lowered_step(**overrides):
    """The step of two small models, as a run with such a config traces it."""
    loaded = config.load(TINY, overrides)
    pair.use_precision(loaded)
    (model, params), mesh = make("llama", loaded.dtype), mesh_of((1, 1, 1))
    optimizer = optax.adamw(1e-2)
    state = train_step.abstract_state(*optim.split_frozen(params, ALL), optimizer, mesh)
    places = jax.tree.map(lambda a: a.sharding, state)
    step = train_step.make_train_step(model, optimizer, lambda step: 1e-2, places, dropout_seed=None)
    return products(step.lower(state, sharding.put_batch(mesh, make_rows(32), 32), None).as_text())


FLOAT32, BFLOAT16 = ("f32", "f32"), ("bf16", "bf16")


@pytest.mark.slow
def test_every_product_of_a_float32_run_is_as_exact_as_asked():
    highest = lowered_step()  # what the shipped config says
    assert set(highest) == {(FLOAT32, "HIGHEST")}
    high = lowered_step(matmul_precision="high")
    default = lowered_step(matmul_precision="default")
    # Scores and logits are exact whatever is asked for: their products and the gradients of those.
    for rougher, name in ((high, "HIGH"), (default, "DEFAULT")):
        assert set(rougher) == {(FLOAT32, "HIGHEST"), (FLOAT32, name)}
        assert sum(rougher.values()) == highest[FLOAT32, "HIGHEST"] and rougher[FLOAT32, name] > 100
    assert default == collections.Counter({(FLOAT32, "HIGHEST"): high[FLOAT32, "HIGHEST"], **{
        (FLOAT32, "DEFAULT"): high[FLOAT32, "HIGH"]}})  # fmt: skip


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_a_bfloat16_run_asks_for_nothing_slower(precision):
    found = lowered_step(dtype="bfloat16", matmul_precision=precision)
    assert found[BFLOAT16, "DEFAULT"] > 100
    assert {key for key in found if "bf16" in key[0]} == {(BFLOAT16, "DEFAULT")}
    assert 0 < found[FLOAT32, "HIGHEST"] <= 10  # the scores


def test_logits_of_a_float32_run_alone_are_exact():
    def asked(dtype):
        hidden, kernel, ids = jnp.ones((3, 8), dtype), jnp.ones((5, 8), dtype), jnp.zeros(3, jnp.int32)
        return set(products(jax.jit(head.gold_log_probs).lower(hidden, kernel, ids).as_text()))

    jax.config.update("jax_default_matmul_precision", "default")
    assert asked(jnp.float32) == {(FLOAT32, "HIGHEST")}
    assert asked(jnp.bfloat16) == {(BFLOAT16, "DEFAULT")}


def test_runs_one_after_the_other_get_what_each_asks_for():
    """Also from a function that the first has traced: what jax keeps is kept by precision."""
    double = jax.jit(lambda a: a @ a)
    for name in ("highest", "default", "highest"):
        pair.use_precision(config.load(TINY, {"matmul_precision": name}))
        assert set(products(double.lower(jnp.ones((2, 2))).as_text())) == {(FLOAT32, name.upper())}


@pytest.mark.slow
def test_gradients_of_a_bfloat16_step_leaf_by_leaf():
    """Against float32: tables and biases, whose gradients sum over all tokens, are about as exact as kernels."""
    B, K, L, V = 64, 4, 24, 500
    rng = np.random.default_rng(0)
    bert = models.BertConfig(V, 2, 2, 32, 64, 64, 2, 1e-12, "gelu", 0.0, 0.0)
    gpt2 = models.Gpt2Config(V, 2, 2, 32, 64, 64, 1e-5, "gelu_tanh", 0.0, 0.0, 0.0)

    def tokens():
        """Some words are met in every second place, as in any text."""
        return np.minimum(rng.zipf(1.3, (B, L)), V - 1).astype(np.int32), np.ones((B, L), bool)

    rows, starts, answers = np.arange(B, dtype=np.int32), np.full(B, L // 2, np.int32), np.ones((B, L // 2), bool)
    query, passage, prefix, suffix = (tokens() for _ in range(4))
    pool = data.Pool(rows[:, None], *(array[:, None] for array in (*passage, *prefix)))
    batch = data.Batch(rows, rows, rows[:, None], *query, *suffix, starts, answers, None, None, None, pool)
    batch = jax.tree.map(jnp.asarray, batch)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.1, leaf.shape), jnp.float32)

    shapes = {"retriever": models.abstract(bert)[1], "generator": models.abstract(gpt2)[1]}
    params = jax.tree_util.tree_map_with_path(draw, shapes)

    def gradients(dtype):
        computing = models.Computing(dtype)
        graphs = (models.abstract(dataclasses.replace(config, computing=computing))[0] for config in (bert, gpt2))
        objective = rag.Objective("token", K, 0.2, 0.5, 1.0, 1.0)
        model = rag.Rag(objective, *graphs, "mean", B, jnp.dtype(dtype))
        return jax.jit(jax.grad(lambda params: rag.loss(model, params, batch, None)[0]))(params)

    exact, rough = jax.device_get((gradients("float32"), gradients("bfloat16")))
    for role in exact:
        # A bias of keys adds the same to all scores of a query: its gradient is nothing but rounding. What else is
        # small is held against a thousandth of the whole.
        least = 1e-3 * float(optax.tree.norm(exact[role]))
        errors = {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.linalg.norm(a - b)
            / max(np.linalg.norm(a), least)
            for (path, a), b in zip(jax.tree.leaves_with_path(exact[role]), jax.tree.leaves(rough[role]), strict=True)
        }
        kernels = max(error for path, error in errors.items() if path.endswith("kernel"))
        sums = {
            path: error
            for path, error in errors.items()
            if path.endswith(("embedding", "bias")) and not path.endswith("key/bias")
        }
        assert len(sums) > 8 and kernels < 0.04
        assert max(sums.values()) < 2.5 * kernels, sums  # summed in bfloat16 ten to a hundred times
