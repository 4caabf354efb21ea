"""What every family owes besides its plain forward pass: shared prefixes, decoding, and a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from jax.sharding import AxisType
from test_models import ENCODERS, FAMILIES, LENGTH, assert_trees_close, make_batch, make_model, relative

from rag_jax import hf, models, rag
from rag_jax.distributed import sharding
from rag_jax.hf import config as configs
from rag_jax.inference import decoding

CAUSAL = [name for name in FAMILIES if name not in ENCODERS]
# Passages longer than any window of the tests, and more tokens than that behind them.
PREFIXES, SUFFIXES, CANDIDATES = (9, 6, 7), (5, 3), ((0, 2), (1, 2))
NEW_TOKENS = 200
# Of all that a family may do differently, each at least once; the others are for releases.
DECODED = ("smollm3-local", "granite", "olmo3", "phi3", "gemma2", "gemma3")


def ragged(rng, lengths, room=0):
    ids = rng.integers(2, 53, (len(lengths), max(lengths) + room)).astype(np.int32)
    return jnp.asarray(ids), jnp.asarray(np.arange(ids.shape[1]) < np.array(lengths)[:, None])


@pytest.mark.parametrize("family", CAUSAL)
def test_suffixes_behind_shared_prefixes_are_those_of_whole_texts(family):
    """Log-probabilities and the gradients of all parameters, of each pair in a row of its own."""
    graphdef, params = make_model(family)
    rng = np.random.default_rng(2)
    prefix, suffix, pairs = ragged(rng, PREFIXES, 2), ragged(rng, SUFFIXES, 1), jnp.asarray(CANDIDATES)
    L = max(SUFFIXES) - 1
    weights = rng.standard_normal((*pairs.shape, L)).astype(np.float32) * np.asarray(suffix[1])[:, None, 1 : L + 1]

    def shared(params):
        model = nnx.merge(graphdef, params)
        hidden = model.forward_shared_prefix(prefix, suffix, pairs)[:, :, :L]
        ids = jnp.broadcast_to(suffix[0][:, None, 1 : L + 1], hidden.shape[:3])
        log_probs = model.gold_log_probs(hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1), 5)
        return jnp.sum(log_probs.reshape(ids.shape) * weights)

    def whole(params):
        model, total = nnx.merge(graphdef, params), 0.0
        texts = [(k, b) for b, row in enumerate(CANDIDATES) for k in row]
        ids = np.zeros((len(texts), max(PREFIXES) + max(SUFFIXES)), np.int32)
        for n, (k, b) in enumerate(texts):
            text = [*np.asarray(prefix[0])[k, : PREFIXES[k]], *np.asarray(suffix[0])[b, : SUFFIXES[b]]]
            ids[n, : len(text)] = text
        mask = np.arange(ids.shape[1]) < np.array([[PREFIXES[k] + SUFFIXES[b]] for k, b in texts])
        log_probs = jax.nn.log_softmax(model.logits(model(jnp.asarray(ids), jnp.asarray(mask))))
        for n, (k, b) in enumerate(texts):
            at = PREFIXES[k] + np.arange(SUFFIXES[b] - 1)
            of_text = log_probs[n, at, ids[n, at + 1]]
            total += jnp.sum(of_text * weights[b, CANDIDATES[b].index(k), : len(at)])
        return total

    (got, gradients), (wanted, expected) = (jax.jit(jax.value_and_grad(of))(params) for of in (shared, whole))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert_trees_close(gradients, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in DECODED else pytest.mark.soak) for name in CAUSAL]
)
def test_greedy_decoding_is_that_of_transformers(family, tmp_path):
    """Beyond every window, from prompts of two lengths."""
    torch = pytest.importorskip("torch")
    model_type, values = FAMILIES[family]
    positions = {"n_positions": 256} if model_type == "gpt2" else {"max_position_embeddings": 256}
    if "original_max_position_embeddings" in values:
        positions |= {"max_position_embeddings": 512, "original_max_position_embeddings": 256}
    if "final_logit_softcapping" in values:
        positions["final_logit_softcapping"] = 30.0  # at the tests' usual one all likely tokens would be equally likely
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(model_type, **values | positions | ends)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # The last norm turns states away from the embedding, to which the output matrix may be tied.
            spread = 2.0 if name in ("model.norm.weight", "transformer.ln_f.weight") else 0.4
            is_norm = ("norm" in name or ".ln_" in name) and spread < 1
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator) + is_norm)
    theirs.save_pretrained(tmp_path)
    _, read = configs.read_config(tmp_path, family)
    params = jax.tree.map(jnp.asarray, hf.load_params(tmp_path, model_type, read))
    rng = np.random.default_rng(0)
    (passages, there), (queries, asked) = ragged(rng, (11, 6)), ragged(rng, (4, 7))
    model = rag.Rag(rag.Objective("token", 1, 1.0, 1.0, 0.0, 1.0), None, models.abstract(read)[0], "mean", 1)
    found = decoding.answer_ids(
        model, {"generator": params}, (np.asarray(passages), np.asarray(there)),
        (np.asarray(queries), np.asarray(asked)), np.array([[0], [1]], np.int32), np.zeros((2, 1), np.float32),
        num_tokens=NEW_TOKENS, eos_id=-1,
    )  # fmt: skip
    for row, (passage, query) in enumerate(((11, 4), (6, 7))):
        prompt = torch.tensor([[*map(int, passages[row, :passage]), *map(int, queries[row, :query])]])
        whole = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        np.testing.assert_array_equal(np.asarray(found)[row], whole[0, prompt.shape[1] :])
    assert len(set(np.asarray(found)[0].tolist())) > 2, "answers too alike to show anything"


@pytest.mark.parametrize("family", ["olmo3", "phi3", "gemma2", "mpnet", "modernbert"])
def test_tensor_parallel_states_and_gradients_are_those_of_one_device(family):
    graphdef, params = make_model(family)
    mesh = jax.make_mesh((1, 1, 2), sharding.AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:2])
    batch = make_batch("right")

    @functools.partial(jax.jit, static_argnums=0)
    def loss(of, params):
        hidden = nnx.merge(of, params)(jnp.asarray(batch.ids), jnp.asarray(batch.mask))
        return jnp.sum(hidden * batch.weights * batch.mask[:, :, None])

    placed = jax.device_put(params, sharding.param_shardings(mesh, params))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    (got, gradients), (wanted, expected) = (jax.value_and_grad(loss, 1)(graphdef, each) for each in (placed, params))
    assert relative(got, np.asarray(wanted)) < 1e-5
    assert_trees_close(jax.device_get(gradients), jax.device_get(expected), 1e-5)


def test_the_text_of_these_tests_is_longer_than_their_windows():
    for model_type, values in FAMILIES.values():
        window = values.get("sliding_window") or values.get("local_attention") or 1
        assert window < min(PREFIXES) + min(SUFFIXES) and window < LENGTH, model_type
