"""Our models against `transformers` in PyTorch, float32: hidden states, logits and the gradient of every parameter."""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import transformers
from flax import nnx

from rag_jax import hf, models
from rag_jax.hf import config as configs
from rag_jax.models import Computing, attention, layers

VOCAB, WIDTH, LENGTH = 53, 32, 11
LENGTHS = (11, 4, 8)
TOLERANCE = 1e-4

LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    pad_token_id=None,
)
# Eight channels turn by 1, 0.1, 0.01 and 0.001 a position: over 16 positions all but the first are slow.
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
GEMMA = LLAMA | dict(head_dim=10, query_pre_attn_scalar=7, tie_word_embeddings=True)
BERT = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
    pad_token_id=None,
)
SPECIAL = dict(eos_token_id=1, bos_token_id=2, cls_token_id=2, sep_token_id=1)
# Of each family its model type and what its config says.
FAMILIES = {
    "bert": ("bert", BERT),
    "gpt2": ("gpt2", dict(vocab_size=VOCAB, n_embd=WIDTH, n_inner=48, n_layer=2, n_head=4, n_positions=16)),
    "llama2": ("llama", LLAMA | dict(num_key_value_heads=4)),
    "llama-llama3-rope": ("llama", LLAMA | dict(rope_parameters=LLAMA3)),
    "llama-linear-rope": (
        "llama",
        LLAMA | dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0)),
    ),
    "llama-tied": ("llama", LLAMA | dict(tie_word_embeddings=True)),
    "llama-biases": ("llama", LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", LLAMA | dict(sliding_window=3)),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-local": (
        "qwen2",
        LLAMA | dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
    "qwen3": ("qwen3", LLAMA | dict(head_dim=10, tie_word_embeddings=True)),
    "smollm3": ("smollm3", LLAMA | dict(num_hidden_layers=3, no_rope_layers=[1, 0, 1])),
    "smollm3-local": (
        "smollm3",
        LLAMA | dict(num_hidden_layers=3, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=3),
    ),
    "granite": (
        "granite",
        LLAMA
        | dict(
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            attention_multiplier=0.2,
            logits_scaling=2.5,
            attention_bias=True,
        ),
    ),
    "olmo2": ("olmo2", LLAMA | dict(pad_token_id=None)),
    "olmo3": ("olmo3", LLAMA | dict(num_hidden_layers=4, sliding_window=3, rope_scaling=YARN)),
    "phi3": ("phi3", LLAMA | dict(sliding_window=4, rope_theta=500.0, partial_rotary_factor=0.5)),
    "phi3-longrope": (
        "phi3",
        LLAMA
        | dict(
            original_max_position_embeddings=32,
            rope_scaling=dict(type="longrope", short_factor=[1.0, 1.5, 2.0, 4.0], long_factor=[2.0, 3.0, 4.0, 9.0]),
        ),
    ),
    "llama-yarn": ("llama", LLAMA | dict(rope_parameters=YARN | dict(rope_theta=10000.0))),
    "llama-dynamic": ("llama", LLAMA | dict(rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=4.0))),
    "gemma": ("gemma", LLAMA | dict(head_dim=10, tie_word_embeddings=True)),
    "gemma2": ("gemma2", GEMMA | dict(sliding_window=3, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": ("gemma3_text", GEMMA | dict(sliding_window=3, num_hidden_layers=3, sliding_window_pattern=3)),
    "gemma3-scaled": (
        "gemma3_text",
        GEMMA
        | dict(
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention"],
            rope_scaling=dict(rope_type="linear", factor=8.0),
            final_logit_softcapping=3.0,
        ),
    ),
    "embeddinggemma": (
        "gemma3_text",
        GEMMA | dict(sliding_window=6, num_hidden_layers=3, sliding_window_pattern=3, use_bidirectional_attention=True),
    ),
    "roberta": ("roberta", BERT | dict(max_position_embeddings=18, type_vocab_size=1, pad_token_id=1)),
    "xlm-roberta": ("xlm-roberta", BERT | dict(max_position_embeddings=18, type_vocab_size=1, pad_token_id=1)),
    "mpnet": ("mpnet", BERT | dict(max_position_embeddings=18, pad_token_id=1)),
    "distilbert": (
        "distilbert",
        dict(vocab_size=VOCAB, dim=WIDTH, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=16),
    ),
    "modernbert": (
        "modernbert",
        BERT | dict(num_hidden_layers=4, local_attention=4, **SPECIAL) | dict(max_position_embeddings=64),
    ),
    "modernbert-biases": (
        "modernbert",
        BERT
        | dict(num_hidden_layers=2, local_attention=4, norm_bias=True, attention_bias=True, mlp_bias=True, **SPECIAL),
    ),
}
ENCODERS = [
    name
    for name, (kind, _) in FAMILIES.items()
    if kind in ("bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "modernbert") or name == "embeddinggemma"
]


# Layers in turn look at three tokens and turn fast, and look at all and turn slowly: local and global attention.
TWO_ROPES = models.LlamaConfig(
    VOCAB, 4, 4, 2, 8, WIDTH, 48, 64, 1e-5, 1e6, None, "silu", False, False, False, True, True, None, 0.0,
    layer_kinds=(1, 0, 1, 0), further_kinds=(models.LayerKind(100.0, models.RopeScaling("linear", 2.0), 3),),
)  # fmt: skip


class Batch(NamedTuple):
    ids: np.ndarray
    mask: np.ndarray
    picks: np.ndarray  # the token whose log-probability counts
    weights: np.ndarray  # of every number of the hidden states

    @property
    def positions(self):
        return np.clip(np.cumsum(self.mask, axis=1) - 1, 0, None)


def make_batch(side):
    """Ragged rows; padding holds tokens too, which nothing may notice."""
    rng = np.random.default_rng(5)
    lengths = np.array(LENGTHS)[:, None]
    slots = np.arange(LENGTH)
    mask = slots < lengths if side == "right" else slots >= LENGTH - lengths
    shape = (len(LENGTHS), LENGTH)
    ids, picks = rng.integers(2, VOCAB, (2, *shape))  # the first two may be padding, which PyTorch does not train
    return Batch(ids, mask, picks, rng.standard_normal((*shape, WIDTH)).astype(np.float32))


def hf_config(family):
    model_type, values = FAMILIES[family]
    return transformers.AutoConfig.for_model(model_type, **values)


def make_model(family, **changes):
    """Graphdef and parameters without PyTorch, all of them away from their usual values."""
    problems = []
    config = TWO_ROPES if family == "two ropes" else configs.from_hf(hf_config(family).to_dict(), problems)
    assert not problems
    graphdef, shapes = models.abstract(dataclasses.replace(config, **changes))
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.2, leaf.shape), leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def ours(graphdef, params, batch):
    """(loss, (hidden, logits)) and the gradients of the loss: one program for both sides of padding."""

    def loss(params):
        model = nnx.merge(graphdef, params)
        hidden = model(batch.ids, batch.mask)
        total = (hidden * batch.weights * batch.mask[:, :, None]).sum() / batch.mask.sum()
        if not model.config.causal:
            return total, (hidden, None)
        logits = model.logits(hidden)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.picks[:, :, None], axis=-1)[:, :, 0]
        return total + (log_probs * batch.mask).sum() / batch.mask.sum(), (hidden, logits)

    return jax.value_and_grad(loss, has_aux=True)(params)


def theirs(model, batch, folder, model_type, config):
    """The same of PyTorch; its gradients take the way of the weights: a file, read by the table of names."""
    import torch

    ids, mask, picks, positions = (torch.tensor(a) for a in (batch.ids, batch.mask, batch.picks, batch.positions))
    count = mask.sum()
    inputs = dict(input_ids=ids, attention_mask=mask.long(), position_ids=positions)
    if isinstance(config, models.BertConfig):
        inputs["position_ids"] = positions + config.first_position
    if model_type == "distilbert":  # it has them, but takes none from outside
        inputs["inputs_embeds"] = model.embeddings.word_embeddings(inputs.pop("input_ids"))
    if not config.causal:
        hidden, logits = model(**inputs).last_hidden_state, None
    else:
        output = model(**inputs, output_hidden_states=True, use_cache=False)
        hidden, logits = output.hidden_states[-1], output.logits
    loss = (hidden * torch.tensor(batch.weights) * mask[:, :, None]).sum() / count
    if logits is not None:
        log_probs = torch.log_softmax(logits, dim=-1).gather(-1, picks[:, :, None])[:, :, 0]
        loss = loss + (log_probs * mask).sum() / count
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if not n.startswith("pooler.")}
    safetensors.numpy.save_file(gradients, folder / "model.safetensors")
    outputs = (hidden.detach().numpy(), None if logits is None else logits.detach().numpy())
    found = hf.load_params(folder, model_type, config)
    if model_type == "modernbert":
        found["layers"]["attention_norm"] = {
            leaf: np.concatenate([np.zeros_like(value[:1]), value[1:]])  # the first layer has none
            for leaf, value in found["layers"]["attention_norm"].items()
        }
    return (loss.item(), outputs), found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(family, side)`: what ours and what PyTorch's model gives, from the same files."""
    torch = pytest.importorskip("torch")

    @functools.cache
    def load(family):
        folder = tmp_path_factory.mktemp("model")
        config = hf_config(family)
        auto = transformers.AutoModel if family in ENCODERS else transformers.AutoModelForCausalLM
        model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_norm = name.endswith("weight") and any(kind in name.lower() for kind in ("norm", ".ln_"))
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + is_norm)
        model.save_pretrained(folder)
        model_type, read = configs.read_config(folder, family)
        assert model_type == config.model_type
        return model, model_type, read, jax.tree.map(jnp.asarray, hf.load_params(folder, model_type, read))

    @functools.cache
    def run(family, side):
        model, model_type, config, params = load(family)
        batch = make_batch(side)
        got = ours(models.abstract(config)[0], params, batch)
        return batch, got, theirs(model, batch, tmp_path_factory.mktemp("gradients"), model_type, config)

    return run


def relative(a, b, floor=0.0):
    return float(np.linalg.norm(np.asarray(a) - b) / max(np.linalg.norm(b), floor))


def assert_trees_close(got, expected, tolerance):
    """Every tensor by its norm, but none by less than a thousandth of all.

    A key bias without rotation shifts all of a query's scores alike: its gradient is zero but for rounding,
    and both sides must be nothing beside the whole.
    """
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    total = float(optax.tree.norm(expected))
    errors = []
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (got, expected)), strict=True)
    for (key_path, a), (_, b) in pairs:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if path.endswith("key/bias") and np.linalg.norm(b) < 1e-6 * total:
            errors.append((float(np.linalg.norm(a)) / total, path))
        else:
            errors.append((relative(a, b, 1e-3 * total), path))
    assert max(errors)[0] < tolerance, max(errors)


sides = pytest.mark.parametrize("side", ["right", "left"])


@sides
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_logits_equal_pytorch(pair, family, side):
    batch, ((_, (hidden, logits)), _), ((_, (their_hidden, their_logits)), _) = pair(family, side)
    assert relative(hidden[batch.mask], their_hidden[batch.mask]) < TOLERANCE
    assert (logits is None) == (family in ENCODERS)
    if logits is not None:
        assert relative(logits[batch.mask], their_logits[batch.mask]) < TOLERANCE


@sides
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_parameter_equal_pytorch(pair, family, side):
    _, ((loss, _), gradients), ((their_loss, _), their_gradients) = pair(family, side)
    np.testing.assert_allclose(loss, their_loss, rtol=TOLERANCE)
    assert_trees_close(gradients, their_gradients, TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_and_right_padding_agree(family):
    graphdef, params = make_model(family)
    (_, (left, _)), _ = ours(graphdef, params, make_batch("left"))
    right_batch = make_batch("right")
    ids = np.zeros_like(right_batch.ids)
    ids[right_batch.mask] = make_batch("left").ids[make_batch("left").mask]
    (_, (right, _)), _ = ours(graphdef, params, right_batch._replace(ids=ids))
    got = np.asarray(left)[make_batch("left").mask]
    assert relative(got, np.asarray(right)[right_batch.mask]) < 1e-5


@pytest.mark.parametrize(
    ("family", "change"),
    [("llama-llama3-rope", {"rope_scaling": None}), ("llama-linear-rope", {"rope_scaling": None})]
    + [("mistral", {"sliding_window": None}), ("llama2", {"rope_theta": 500.0})]
    + [("qwen2-local", {"layer_kinds": (1, 0, 1)}), ("qwen2-local", {"layer_kinds": (0, 0, 0)})]
    + [("llama-yarn", {"rope_scaling": None}), ("phi3-longrope", {"rope_scaling": None})]
    + [("phi3", {"rotary_channels": None}), ("phi3", {"sliding_window": None})]
    + [("smollm3", {"layer_kinds": (0, 0, 0)}), ("smollm3-local", {"layer_kinds": (0, 0, 0)})]
    + [("olmo3", {"layer_kinds": (1, 1, 1, 1)}), ("gemma3", {"layer_kinds": (1, 1, 1)})]
    + [("embeddinggemma", {"layer_kinds": (1, 1, 1)}), ("embeddinggemma", {"causal": True})]
    + [("gemma2", {"score_softcap": None}), ("gemma2", {"attention_scale": None})]
    + [("granite", {name: 1.0}) for name in ("embed_scale", "residual_scale", "attention_scale")]
    + [("modernbert", {"layer_kinds": (0, 2, 2, 2)}), ("modernbert", {"layer_kinds": (1, 1, 1, 2)})],
)
def test_what_tells_the_families_apart_matters_here(family, change):
    """Else agreement with PyTorch would say nothing about it."""
    batch = make_batch("right")
    (graphdef, params), (changed, _) = make_model(family), make_model(family, **change)
    hidden, other = (np.asarray(ours(g, params, batch)[0][1][0])[batch.mask] for g in (graphdef, changed))
    assert relative(hidden, other) > 0.01


@functools.partial(jax.jit, static_argnums=(0, 4))
def fill_cache(graphdef, params, ids, mask, max_len):
    return nnx.merge(graphdef, params).fill_cache(ids, mask, max_len)


@functools.partial(jax.jit, static_argnums=0)
def decode_step(graphdef, params, ids, cache):
    return nnx.merge(graphdef, params).decode_step(ids, cache)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ENCODERS] + ["two ropes"])
def test_a_filled_cache_and_its_steps_equal_the_plain_forward(family):
    graphdef, params = make_model(family)
    prompt, batch = 6, make_batch("right")
    lengths = np.array([6, 2, 3])
    steps = LENGTH - prompt
    mask = np.arange(LENGTH) < (lengths + steps)[:, None]
    (_, (hidden, _)), _ = ours(graphdef, params, batch._replace(mask=mask))
    prompt_mask = mask[:, :prompt] & (np.arange(prompt) < lengths[:, None])
    got, cache = fill_cache(graphdef, params, batch.ids[:, :prompt], prompt_mask, LENGTH)
    assert relative(got[prompt_mask], np.asarray(hidden)[:, :prompt][prompt_mask]) < 1e-5
    rows = np.arange(len(lengths))
    for step in range(steps):
        got, cache = decode_step(graphdef, params, batch.ids[rows, lengths + step], cache)
        assert relative(got, np.asarray(hidden)[rows, lengths + step]) < 1e-5
    np.testing.assert_array_equal(cache.length, lengths + steps)


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "gpt2", "llama2", "qwen3", "phi3", "gemma2"])
def test_every_product_is_in_the_dtype_of_the_parameters(family):
    """One float32 value on the way would make all that follows float32."""
    graphdef, params = make_model(family, computing=Computing("bfloat16"))
    half = cast_kernels(params)
    ids, mask = map(jnp.asarray, make_batch("right")[:2])
    hidden = jax.jit(lambda params: nnx.merge(graphdef, params)(ids, mask))
    assert jax.eval_shape(hidden, half).dtype == jnp.bfloat16
    lowered = jax.jit(jax.grad(lambda params: hidden(params).sum(dtype=jnp.float32))).lower(half)
    operands = re.findall(r"dot_general .* : \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\)", lowered.as_text())
    assert len(operands) >= 24
    assert set(operands) == {("bf16", "bf16")}


def cast_kernels(params):
    """As `rag.Rag.model` does."""

    def cast(path, leaf):
        return leaf.astype(jnp.bfloat16) if path[-1].key == "kernel" else leaf

    return params | {"layers": jax.tree_util.tree_map_with_path(cast, params["layers"])}


def test_gradients_of_rows_that_are_met_often_are_summed_in_float32():
    """Of a table and of a bias, under 4,096 equal gradients: bfloat16 sums stand still at 256 of them."""
    parts = layers.Embed(3, 2, "bfloat16", nnx.Rngs(0)), layers.linear(2, 2, bias=True, rngs=nnx.Rngs(0))
    (table, _), (line, _) = map(nnx.split, parts)
    kernel, ids = jnp.eye(2, dtype=jnp.bfloat16), jnp.zeros(4096, jnp.int32)

    def total(embedding, bias):
        rows = nnx.merge(table, {"embedding": embedding})(ids)
        return nnx.merge(line, {"kernel": kernel, "bias": bias})(rows).sum(dtype=jnp.float32)

    of_table, of_bias = jax.grad(total, (0, 1))(jnp.ones((3, 2)), jnp.ones(2))
    np.testing.assert_array_equal(of_table, [[4096, 4096], [0, 0], [0, 0]])
    np.testing.assert_array_equal(of_bias, [4096, 4096])


def test_random_bits_are_uniform_and_tell_rows_and_places_apart():
    keys = layers.several_keys(layers.named_keys(jax.random.split(jax.random.key(0), 8), "x"), 8)
    bits = np.asarray(layers.random_bits(keys, (40, 25)))
    assert bits.shape == (64, 40, 25) and bits.dtype == np.uint32
    np.testing.assert_array_equal(bits[5], layers.random_bits(keys[5:6], (40, 25))[0])
    flat = bits.reshape(64, -1)
    assert len(np.unique(flat)) > 63_990  # of 64,000, where chance lets one in two billion pairs meet
    ones = np.unpackbits(flat.view(np.uint8).reshape(64, 1000, 4), axis=-1).reshape(64, 1000, 32).astype(float)
    most = 5 * 0.5  # five standard deviations of a bit
    assert np.abs(ones.mean((0, 1)) - 0.5).max() < most / np.sqrt(64_000)
    signs = 2 * ones - 1
    for other in (np.roll(signs, 1, axis=0), np.roll(signs, 1, axis=1), np.roll(signs, 1, axis=2)):
        assert np.abs((signs * other).mean((0, 1))).max() < 5 / np.sqrt(64_000)
    kept = np.asarray(layers.dropout(jnp.ones((64, 1000)), 0.1, keys)) != 0
    assert abs(kept.mean() - 0.9) < 5 * 0.3 / np.sqrt(64_000)


@pytest.mark.parametrize("policy", ["dots", "sums", "full"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama2"])
def test_rematerialisation_changes_nothing(family, policy):
    batch = make_batch("right")
    (graphdef, params), (remat, _) = make_model(family), make_model(family, computing=Computing(remat=policy))
    assert graphdef != remat
    (loss, _), gradients = ours(graphdef, params, batch)
    (again, _), gradients_again = ours(remat, params, batch)
    np.testing.assert_allclose(again, loss, rtol=1e-5, atol=2e-6)  # a mean of many numbers of either sign, near zero
    assert_trees_close(gradients_again, jax.tree.map(np.asarray, gradients), 1e-5)


def test_layers_of_two_kinds_equal_one_layer_after_the_other():
    """Each layer cut out of the stack and run by hand, with the rope and the mask of its kind in full."""
    (graphdef, params), batch = make_model("two ropes"), make_batch("right")
    (_, (hidden, _)), _ = ours(graphdef, params, batch)
    model = nnx.merge(graphdef, params)
    layer_graph, stacked = nnx.split(model.layers)
    turns = {0: 1e6 ** -(np.arange(0, 8, 2) / 8), 1: 100.0 ** -(np.arange(0, 8, 2) / 8) / 2}
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    x = model.embed.word(jnp.asarray(batch.ids))
    for n, kind in enumerate(TWO_ROPES.layer_kinds):
        layer = nnx.merge(layer_graph, jax.tree.map(lambda a, n=n: a[n], stacked))
        angles = np.asarray(batch.positions[:, :, None] * turns[kind], np.float32)
        seen = (distance >= 0) & (distance < (LENGTH, 3)[kind]) & batch.mask[:, None, :]
        x = by_hand(layer, np.asarray(x), (np.cos(angles), np.sin(angles)), seen)
    assert relative(np.asarray(hidden)[batch.mask], np.asarray(model.norm(x))[batch.mask]) < 1e-5


def by_hand(layer, x, rope, seen):
    """A Llama's layer with attention over all pairs of tokens, in numpy."""

    def heads(projected):
        return np.asarray(projected).reshape(*x.shape[:2], -1, 8).swapaxes(1, 2)

    def turned(a):
        first, second = np.split(a, 2, axis=-1)
        cos, sin = (part[:, None] for part in rope)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    attention, normed = layer.attention, layer.attention_norm(x)
    query = turned(np.asarray(attention.query_norm(heads(attention.query(normed)))))
    key = turned(np.asarray(attention.key_norm(heads(attention.key(normed))))).repeat(2, axis=1)
    value = heads(attention.value(normed)).repeat(2, axis=1)
    scores = np.where(seen[:, None], query @ key.swapaxes(-1, -2) / 8**0.5, -1e30)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ value
    x = x + attention.out(jnp.asarray(mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1)))
    return x + layer.mlp(layer.mlp_norm(x))


FUSED = pytest.mark.parametrize("kernel", ["xla", "pallas-interpreted"])


@FUSED
@pytest.mark.parametrize("family", ["bert", "mistral", "qwen3"])
def test_a_fused_kernel_equals_the_plain_one(family, kernel):
    """Of cuDNN's, all that is ours around it: keys in one array, how they lie, the mask. Of the TPU's, everything."""
    batch = make_batch("right")
    (graphdef, params), (fused, _) = make_model(family), make_model(family, computing=Computing(attention=kernel))
    (loss, _), gradients = ours(graphdef, params, batch)
    (again, _), gradients_again = ours(fused, params, batch)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    assert_trees_close(gradients_again, jax.tree.map(np.asarray, gradients), 1e-5)


@FUSED
@pytest.mark.parametrize("family", ["gpt2", "two ropes"])
def test_a_fused_kernel_behind_shared_prefixes_equals_the_plain_one(family, kernel):
    (graphdef, params), (fused, _) = make_model(family), make_model(family, computing=Computing(attention=kernel))
    rng = np.random.default_rng(2)
    prefix, suffix = (
        tuple(map(jnp.asarray, (rng.integers(0, VOCAB, (len(lengths), size)), np.arange(size) < lengths[:, None])))
        for lengths, size in ((np.array([5, 2, 6]), 6), (np.array([4, 2]), 4))
    )
    candidates, weights = jnp.asarray([[0, 2], [1, 0]]), rng.normal(size=(2, 2, 4, 32)).astype(np.float32)

    def of(graphdef):
        def loss(params):
            hidden = nnx.merge(graphdef, params).forward_shared_prefix(prefix, suffix, candidates)
            return jnp.sum(jnp.where(suffix[1][:, None, :, None], hidden, 0.0) * weights)

        return jax.jit(jax.value_and_grad(loss))(params)

    (loss, gradients), (again, gradients_again) = of(graphdef), of(fused)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    assert_trees_close(gradients_again, jax.tree.map(np.asarray, gradients), 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen2-local", "two ropes"])
def test_a_shared_prefix_equals_the_plain_forward(family):
    """Of several lengths, so with padding between prefix and suffix, against one string each; and behind a cache."""
    graphdef, params = make_model(family)
    rng = np.random.default_rng(2)
    prefix_len, suffix_len, candidates = np.array([5, 2, 6]), np.array([4, 2]), np.array([[0, 2], [1, 0]])
    prefix, suffix = (
        tuple(map(jnp.asarray, (rng.integers(0, VOCAB, (len(lengths), size)), np.arange(size) < lengths[:, None])))
        for lengths, size in ((prefix_len, 6), (suffix_len, 5))
    )

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        _, cache = model.fill_cache(*prefix, 7)
        repeated = (a.repeat(2, axis=0) for a in suffix)
        behind = model.read_cache(*repeated, cache, jnp.asarray(candidates.ravel()))
        return model.forward_shared_prefix(prefix, suffix, jnp.asarray(candidates)), behind

    shared, behind = run(params)
    np.testing.assert_allclose(behind.reshape(shared.shape)[:, :, :2], shared[:, :, :2], rtol=1e-4, atol=1e-5)
    plain = jax.jit(lambda params, ids, mask: nnx.merge(graphdef, params)(ids, mask))
    for b, k in np.ndindex(2, 2):
        p, length = candidates[b, k], prefix_len[candidates[b, k]]
        ids = np.zeros((1, LENGTH), int)
        string = [*prefix[0][p, :length], *suffix[0][b, : suffix_len[b]]]
        ids[0, : len(string)] = string
        mask = jnp.arange(LENGTH)[None] < len(string)
        expected = plain(params, jnp.asarray(ids), mask)[0, length : len(string)]
        assert relative(shared[b, k, : suffix_len[b]], expected) < 1e-5


def attention_inputs():
    rng = np.random.default_rng(1)
    query, key, value = (rng.normal(size=(2, heads, 6, 4)).astype(np.float32) for heads in (4, 2, 2))
    return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), np.arange(6) < np.array([[6], [3]])


@pytest.mark.parametrize("kind", ["plain", "divided"])
def test_parts_of_keys_add_up_to_all_of_them(kind):
    """Values and gradients; also where a part comes divided, with the logarithm of its sum, as of a fused kernel."""
    *arrays, real = attention_inputs()

    def whole(query, key, value):
        keys_values = (jnp.swapaxes(key, -1, -2), value)
        return attention.attend(query, [(keys_values, attention.Seen(jnp.asarray(real)))])

    def parts(query, key, value):
        grouped, found = (query * 4**-0.5).reshape(2, 2, 12, 4), []
        for cut in (slice(0, 4), slice(4, 6)):
            keys_values = (jnp.swapaxes(key[:, :, cut], -1, -2), value[:, :, cut])
            part = attention.attend_part(grouped, keys_values, jnp.asarray(real[:, None, cut]), 0.0, None)
            if kind == "divided":
                log_sum_exp = part.highest + jnp.log(part.total)
                part = attention.Part(part.out / part.total, log_sum_exp, jnp.ones_like(part.total))
            found.append(part)
        out, _, total = attention.merged(*found)
        return (out / total).reshape(query.shape)

    weights = np.random.default_rng(4).normal(size=(2, 4, 6, 4))
    results = [
        jax.value_and_grad(lambda *a, fn=fn: jnp.sum(fn(*a) * weights), argnums=(0, 1, 2))(*arrays)
        for fn in (whole, parts)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("offset", [None, (7, 3)])
def test_what_is_seen_by_counting(causal, window, offset):
    *_, real = attention_inputs()
    at = None if offset is None else jnp.asarray(offset)
    mask = np.broadcast_to(attention.Seen(jnp.asarray(real), window, causal, at).mask(3), (2, 3, 6))
    for b, i, j in np.ndindex(2, 3, 6):
        distance = (0 if offset is None else offset[b]) + i - j
        seen = real[b, j] and (not causal or distance >= 0) and (window is None or abs(distance) < window)
        assert mask[b, i, j] == seen


def test_gelu_of_bfloat16_numbers_is_rounded_once():
    """As PyTorch's kernels do it: computed in bfloat16, its constants alone would be off by a thousandth."""
    x = jnp.linspace(-6, 6, 4001).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = exact / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (exact + 0.044715 * exact**3)))
    np.testing.assert_array_equal(layers.gelu_tanh(x), jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))
    slope = jax.vmap(jax.grad(layers.gelu_tanh))(x)
    h = 1e-6
    shifted = [np.asarray(x, np.float64) + sign * h for sign in (1, -1)]
    above, below = (y / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3))) for y in shifted)
    np.testing.assert_allclose(np.asarray(slope, np.float64), (above - below) / (2 * h), rtol=2**-8, atol=1e-4)
