"""Every mesh computes the same: loss, every gradient, and ten steps of training, against one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_rag import (
    BERT,
    GENERATORS,
    assert_trees_close,
    make,
    make_rows,
    packed_rows,
    value_and_grad,
    with_adapters,
    with_dropout,
)

from rag_jax import data, models
from rag_jax.distributed import sharding
from rag_jax.training import optim
from rag_jax.training import step as train_step
from rag_jax.workdir import checkpoint


def cases(quick, slow=(), soak=()):
    """Parameters, by how often they are tried."""
    marked = ((pytest.mark.slow, slow), (pytest.mark.soak, soak))
    return [*quick, *(pytest.param(case, marks=mark) for mark, several in marked for case in several)]


MESHES = cases([(2, 2, 2)], [(1, 1, 8)], [(1, 8, 1), (1, 2, 1), (1, 4, 1), (8, 1, 1), (1, 4, 2)])
ALL = ((".*", 1.0),)
COLLECTIVE = re.compile(r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")


# In a lowered program, before a compiler has put casts around what its device cannot sum: what is summed over devices.
SUM = re.compile(r'"stablehlo\.(?:reduce_scatter|all_reduce)".*?\^bb0\(%\w+: tensor<(\w+)>', re.DOTALL)


def mesh_of(shape):
    return sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def lower_gradients(mesh, model, params, rows, dropout_seed=None, rules=ALL):
    """The lowered program of the training step's gradients, and what it takes."""
    trainable, frozen = optim.split_frozen(params, rules)
    places = [sharding.param_shardings(mesh, tree) for tree in (trainable, frozen)]
    gradients = jax.jit(train_step.make_gradients(model, *places, dropout_seed))
    placed = [jax.device_put(tree, place) for tree, place in zip((trainable, frozen), places, strict=True)]
    split = jax.device_put(rows, jax.sharding.NamedSharding(mesh, sharding.BATCH))
    inputs = (*placed, split, jnp.zeros((), jnp.int32))
    return gradients.lower(*inputs), inputs


def gradients_on(mesh, model, params, rows, dropout_seed=None, rules=ALL):
    """Total loss and gradients as the training step computes them, and the text of the compiled program."""
    lowered, inputs = lower_gradients(mesh, model, params, rows, dropout_seed, rules)
    compiled = lowered.compile()
    grads, metrics = compiled(*inputs)
    return metrics["loss/total"], jax.device_get(grads), compiled.as_text()


def assert_same_on(shape, model, params, rows, dropout_seed=None):
    key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), 0)
    loss, gradients = value_and_grad(model, params, rows, key)
    meshed, meshed_gradients, text = gradients_on(mesh_of(shape), model, params, rows, dropout_seed)
    np.testing.assert_allclose(meshed, loss, rtol=1e-5)
    assert_trees_close(meshed_gradients, jax.device_get(gradients), 1e-5)
    return text


@pytest.mark.parametrize("shape", MESHES)
def test_loss_and_gradients(shape):
    """Duplicates, so that masks of negatives cross devices; several groups a device; the retriever in chunks."""
    model, params = make("llama")
    rows = make_rows(32, passages=[0, 1, 0, *range(2, 31)])
    assert_same_on(shape, dataclasses.replace(model, chunk_size=3), params, rows)


@pytest.mark.slow
def test_rows_that_are_packed():
    """On each of four devices its own rows, in two blocks of groups; against one device, where nothing is packed."""
    model, params = make("gpt2", candidates=3)
    model = dataclasses.replace(with_dropout(model), groups_at_a_time=1)
    rows, mesh = make_rows(32, passages=[0, 1, 0, *range(2, 31)]), mesh_of((2, 2, 2))
    key = jax.random.fold_in(jax.random.key(3), 0)
    loss, gradients = value_and_grad(model, params, rows, key)
    packed = packed_rows(rows, data.Blocks(4, sharding.batch_shards(mesh), 1), spare=1)
    assert 0 < packed.packed.passage < rows.pool.passage_mask[:8].size
    meshed, meshed_gradients, _ = gradients_on(mesh, model, params, packed, 3)
    np.testing.assert_allclose(meshed, loss, rtol=1e-5)
    assert_trees_close(meshed_gradients, jax.device_get(gradients), 1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)])
@pytest.mark.parametrize("name", ["token", "sequence"])
def test_tied_head_and_dropout(shape, name):
    """A row's noise depends on its place in the whole batch, not on the device it lies on."""
    model, params = make("gpt2", name=name)
    assert_same_on(shape, with_dropout(model), params, make_rows(32), dropout_seed=3)


@pytest.mark.parametrize("shape", cases([], [(2, 2, 2)], [(1, 8, 1)]))
def test_negatives_that_queries_bring(shape):
    """Of all devices' rows; some bring none, some the own passage of a row elsewhere; dropout, chunks, a tied head."""
    model, params = make("gpt2", candidates=6, negatives=2)
    model = dataclasses.replace(with_dropout(model), chunk_size=3)
    negatives = np.random.default_rng(0).integers(-1, 60, (32, 2))
    assert (negatives < 0).any() and ((0 <= negatives) & (negatives < 31)).any()
    rows = make_rows(32, passages=[0, 1, 0, *range(2, 31)], negatives=negatives)
    assert_same_on(shape, model, params, rows, dropout_seed=3)


@pytest.mark.parametrize("shape", cases([], [(2, 2, 2)], [(1, 8, 1)]))
def test_evidence(shape):
    model, params = make(
        "llama", name="pdist", evidence="both", label_share=0.2, evidence_temperature=0.5, document_weight=0.6
    )
    assert_same_on(shape, dataclasses.replace(model, labelled=False), params, rows_of_all_kinds())


def rows_of_all_kinds():
    """Two rows in three do not name their passage; of every other one of these the document is known."""
    rows = make_rows(32, passages=[0, 1, 0, *range(2, 31)])
    named, keys = np.arange(32) % 3 == 0, np.asarray(rows.pool.key)
    document = np.where(keys < 0, -1, keys // 5)
    of_row = np.where(named | (np.arange(32) % 2 == 0), -1, document[:, 0])
    groups = document.reshape(-1, 4).repeat(4, axis=0)
    return rows._replace(
        right_key=jnp.where(jnp.asarray(named)[:, None], rows.right_key, -1),
        pool=rows.pool._replace(document=jnp.asarray(document)),
        document=jnp.asarray(of_row),
        readable=jnp.asarray((of_row[:, None] < 0) | (groups == of_row[:, None])),
    )


@pytest.mark.parametrize("shape", cases([], [(2, 2, 2)], [(1, 8, 1)]))
def test_evidence_that_is_known_corrects_labels(shape):
    model, params = make("gpt2", name="pdist", marginal_weight=0.0, label_noise=0.3, document_weight=0.6)
    rng = np.random.default_rng(0)
    evidence, none = rng.normal(-2, 0.5, (32, 4)), rng.normal(-2.2, 0.3, 32)
    evidence[rng.random((32, 4)) < 0.2] = np.nan
    known = {"evidence": jnp.asarray(evidence, jnp.float32), "evidence_none": jnp.asarray(none, jnp.float32)}
    model, rows = dataclasses.replace(model, labelled=False), rows_of_all_kinds()._replace(**known)
    loss, expected = value_and_grad(model, params, rows)
    meshed, got, _ = gradients_on(mesh_of(shape), model, params, rows, rules=(("^generator/", 0.0), (".*", 1.0)))
    np.testing.assert_allclose(meshed, loss, rtol=1e-5)
    assert_trees_close({"retriever": got["retriever"]}, {"retriever": jax.device_get(expected)["retriever"]}, 1e-5)


@pytest.mark.parametrize("shape", cases([], [(2, 2, 2)], [(1, 2, 4), (1, 8, 1)]))
def test_rematerialisation_and_a_fused_kernel_of_attention(shape):
    model, params = make("gpt2")
    config = dataclasses.replace(GENERATORS["gpt2"], computing=models.Computing(remat="full", attention="xla"))
    assert_same_on(shape, dataclasses.replace(model, generator=models.abstract(config)[0]), params, make_rows(32))


# Along `model` the vocabulary is split where 8 divides it, along `data` never.
VOCABULARIES = cases(
    [], [((1, 1, 8), 50257), ((1, 1, 8), 49152)], [((1, 8, 1), 50257), ((1, 8, 1), 49152), ((1, 1, 8), 30522)]
)


@pytest.mark.parametrize("case", VOCABULARIES)
def test_vocabularies_that_8_divides_and_does_not(case):
    shape, vocab_size = case
    config = dataclasses.replace(GENERATORS["gpt2"], vocab_size=vocab_size)
    model, params = make("gpt2")
    graphdef, shapes = models.abstract(config)
    rng = np.random.default_rng(0)
    generator = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.1, a.shape), a.dtype), shapes)
    model = dataclasses.replace(model, generator=graphdef)
    assert_same_on(shape, model, params | {"generator": generator}, make_rows(32))


@pytest.mark.slow
def test_frozen_parameters():
    rules = (("^generator/layers/", 0.0), (".*", 1.0))
    model, params = make("llama")
    rows = make_rows(32)
    _, expected = value_and_grad(model, params, rows)
    _, got, _ = gradients_on(mesh_of((1, 4, 2)), model, params, rows, rules=rules)
    assert_trees_close(got, jax.device_get(optim.split_frozen(expected, rules)[0]), 1e-5)


@pytest.mark.parametrize("shape", cases([], [(1, 4, 2)], [(1, 8, 1), (2, 2, 2)]))
def test_adapters(shape):
    """Their gradients alone, with dropout of what they read; a base shared by devices, along both axes."""
    model, params = with_adapters(*make("llama"), dropout=0.2)
    rules = optim.with_adapters(ALL, params)
    rows, key = make_rows(32), jax.random.fold_in(jax.random.key(3), 0)
    loss, gradients = value_and_grad(model, params, rows, key)
    assert loss != value_and_grad(model, params, rows)[0]
    meshed, got, _ = gradients_on(mesh_of(shape), model, params, rows, 3, rules)
    np.testing.assert_allclose(meshed, loss, rtol=1e-5)
    expected = optim.split_frozen(jax.device_get(gradients), rules)[0]
    assert len(jax.tree.leaves(expected)) == 2 * 6 + 2 * 7  # every linear layer of BERT and of Llama
    assert_trees_close(got, expected, 1e-5)


@pytest.mark.slow
def test_bfloat16_gradients_are_summed_in_float32():
    """Eight devices with a share of the batch each are as near to float32 as one device with all of it."""
    model, params = make("llama")
    rows, half = make_rows(32), make("llama", dtype="bfloat16")[0]
    _, exact = value_and_grad(model, params, rows)
    _, one = value_and_grad(half, params, rows)
    _, eight, _ = gradients_on(mesh_of((1, 8, 1)), half, params, rows)

    def distance(tree):
        return float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, jax.device_get(tree), jax.device_get(exact))))

    assert distance(eight) < 1.2 * distance(one)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1)])
def test_all_sums_over_devices_are_of_float32(shape):
    """Of the gradients of a bfloat16 run too: asked of the program itself, as CPUs sum in float32 whatever it says."""
    model, params = make("llama")
    mesh, half = mesh_of(shape), make("llama", dtype="bfloat16")[0]
    text = lower_gradients(mesh, half, params, make_rows(32))[0].as_text()
    assert "bf16" in text and len(re.findall("stablehlo.reduce_scatter", text)) > 20
    # Counts of rows and tokens are whole numbers.
    assert set(SUM.findall(text)) <= {"f32", "i32"} and SUM.findall(text).count("f32") > 20

    def sums(a):
        return jax.lax.psum_scatter(a, "data", tiled=True), jax.lax.psum(a, "data")

    rows = jax.sharding.PartitionSpec("data")
    whole = jax.sharding.PartitionSpec()
    rough = jax.shard_map(sums, mesh=mesh, in_specs=rows, out_specs=(rows, whole), check_vma=False)
    control = jax.jit(rough).lower(jnp.zeros((64, 2), jnp.bfloat16)).as_text()
    assert SUM.findall(control) == ["bf16", "bf16"]


@pytest.mark.slow
def test_only_weights_and_embeddings_cross_devices():
    """No collective is as large as keys, values or logits, by count: all have the size of a weight or of embeddings."""
    model, params = make("llama", candidates=4)
    rows = make_rows(64, passages=[0, 1, 0, *range(2, 63)])
    text = assert_same_on((1, 8, 1), model, params, rows)
    weights = {leaf.size for leaf in jax.tree.leaves(params)} | {
        leaf.size // leaf.shape[0] for model in params.values() for leaf in jax.tree.leaves(model["layers"])
    }
    allowed = weights | {size // 8 for size in weights} | {64 * BERT.width, 8 * BERT.width, 64, 1}
    found = [shape for result, _ in COLLECTIVE.findall(text) for shape in re.findall(r"\w+\[([\d,]*)\]", result)]
    sizes = {int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found}
    assert sizes and sizes <= allowed, sizes - allowed


@functools.cache
def ten_losses(shape):
    """Of ten steps of training on such a mesh."""
    (model, params), mesh = make("gpt2"), mesh_of(shape)
    trainable, frozen = optim.split_frozen(params, ALL)
    optimizer = optax.adamw(1e-2)
    abstract = train_step.abstract_state(trainable, frozen, optimizer, mesh)
    places = jax.tree.map(lambda a: a.sharding, abstract)
    step = train_step.make_train_step(model, optimizer, lambda step: 1e-2, places, dropout_seed=None)
    placed = jax.device_put(jax.tree.map(np.array, trainable), sharding.param_shardings(mesh, trainable))
    state = train_step.init_state(placed, frozen, optimizer, mesh)
    found = []
    for n in range(10):
        state, metrics = step(state, sharding.put_batch(mesh, make_rows(32, seed=n % 2), 32), None)
        found.append(float(metrics["loss/total"]))
    return np.array(found)


@pytest.mark.parametrize("shape", cases([], [(2, 2, 2)], [(1, 8, 1), (1, 1, 8)]))
def test_ten_steps(shape):
    expected = ten_losses((1, 1, 1))
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(ten_losses(shape), expected, rtol=1e-4)


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"no sharding rule matches generator/adapter/a"):
        sharding.param_shardings(mesh_of((1, 8, 1)), {"generator": {"adapter": {"a": jnp.zeros((8, 8))}}})


@pytest.mark.slow
def test_a_state_moves_from_mesh_to_mesh_bit_for_bit(tmp_path):
    """8 devices of FSDP -> 4 with tensor parallelism -> 8 of tensor parallelism -> 1, through checkpoints."""
    _, params = make("gpt2")
    optimizer = optax.adamw(1e-2)
    trainable, frozen = optim.split_frozen(params, ALL)
    placed = jax.device_put(jax.tree.map(np.array, trainable), sharding.param_shardings(mesh_of((1, 8, 1)), trainable))
    state = train_step.init_state(placed, frozen, optimizer, mesh_of((1, 8, 1)))
    state = dataclasses.replace(state, opt_state=jax.tree.map(lambda a: a + 1, state.opt_state))
    first = jax.device_get((state.params, state.opt_state))
    with checkpoint.Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, shape in enumerate([(1, 2, 2), (1, 1, 8), (1, 1, 1)], start=1):
            checkpoints.save(step, {"params": state.params, "opt_state": state.opt_state})
            abstract = train_step.abstract_state(trainable, frozen, optimizer, mesh_of(shape))
            wanted = {"params": abstract.params, "opt_state": abstract.opt_state}
            found = checkpoints.restore(wanted, step)
            state = dataclasses.replace(abstract, params=found["params"], opt_state=found["opt_state"])
            kernel = state.params["generator"]["layers"]["mlp"]["up"]["kernel"]
            assert kernel.sharding.mesh.size == int(np.prod(shape))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), first)
