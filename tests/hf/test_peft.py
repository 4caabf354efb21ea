"""Adapters against PEFT in PyTorch: outputs, losses, every gradient, and folders in both directions."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from flax import nnx

from rag_jax import hf, losses, models
from rag_jax.errors import UserError
from rag_jax.hf import config as configs
from rag_jax.hf import peft as folders
from rag_jax.hf import weights
from rag_jax.hf.families import FAMILIES
from rag_jax.models import adapters
from rag_jax.models.head import gold_log_probs

VOCAB, WIDTH, RANK = 53, 32, 4
LLAMA = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=None,
)  # fmt: skip
BERT = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32, pad_token_id=None,
)  # fmt: skip
GPT2 = dict(vocab_size=VOCAB, n_embd=WIDTH, n_inner=48, n_layer=2, n_head=4, n_positions=64)
GEMMA = dict(head_dim=10, query_pre_attn_scalar=7, tie_word_embeddings=True)
SPECIAL = dict(local_attention=8, eos_token_id=1, bos_token_id=2, cls_token_id=2, sep_token_id=1)
# Model type, its config, and what PEFT's LoraConfig is given.
CASES = {
    "bert": ("bert", BERT, dict(target_modules=["query", "key", "value", "dense"])),
    "bert-attention": ("bert", BERT, dict(target_modules=["query", "attention.output.dense"], use_rslora=True)),
    "gpt2": ("gpt2", GPT2, dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2-stabilised": ("gpt2", GPT2, dict(target_modules=["c_attn"], fan_in_fan_out=True, use_rslora=True)),
    "llama": ("llama", LLAMA, dict(target_modules="all-linear")),
    "llama-pattern": ("llama", LLAMA, dict(target_modules=r".*\.(q_proj|down_proj)", use_rslora=True)),
    "qwen3": ("qwen3", LLAMA | dict(head_dim=10), dict(target_modules=["v_proj", "o_proj"])),
    "phi3": ("phi3", LLAMA, dict(target_modules="all-linear")),
    "gemma3": ("gemma3_text", LLAMA | GEMMA, dict(target_modules=["q_proj", "down_proj"])),
    "mpnet": (
        "mpnet",
        BERT | dict(max_position_embeddings=34, pad_token_id=1),
        dict(target_modules=["q", "o", "dense"]),
    ),
    "modernbert": ("modernbert", BERT | SPECIAL, dict(target_modules=["Wqkv", "Wi", "Wo"])),
}
TOLERANCE = 1e-4

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


def redrawn(model, seed):
    """All weights away from their usual values, adapters' too, so that each of them has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("weight") and any(kind in name.lower() for kind in ("norm", ".ln_"))
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + is_norm)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(case)`: PEFT's model, the folders of its base and of its adapter, and what we read from them."""

    @functools.cache
    def make(case):
        base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
        model_type, values, asked = CASES[case]
        config = transformers.AutoConfig.for_model(model_type, **values)
        is_causal = FAMILIES[model_type].config.causal
        auto = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel
        model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        redrawn(model, 7)
        model.save_pretrained(base)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=6, lora_dropout=0.0, **asked)).eval()
        redrawn(adapted, 8)
        adapted.base_model.model.load_state_dict(
            {**adapted.base_model.model.state_dict(), **_base_weights(adapted, base)}, strict=False
        )
        adapted.save_pretrained(adapter)
        return adapted, base, adapter, *read(base, adapter)

    return make


def _base_weights(adapted, base):
    """Of the layers that PEFT has wrapped, by its names for them: what was saved before."""
    saved = safetensors.numpy.load_file(base / "model.safetensors")
    own = adapted.base_model.model.state_dict()
    plain = {name.replace(".base_layer", ""): name for name in own}
    return {plain[name]: torch.tensor(value) for name, value in saved.items() if name in plain}


def read(base, adapter):
    model_type, plain = configs.read_config(base, "base")
    config = models.with_lora(plain, folders.read_config(adapter, "adapter", model_type, plain))
    return config, whole(base, adapter, model_type, config)


def whole(base, adapter, model_type, config):
    """The parameters of a model with its adapters."""
    return filled(hf.load_params(base, model_type, config), folders.load(adapter, "adapter", model_type, config))


def filled(params, leaves):
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = params
        for parent in parents:
            node = node[parent]
        node[last] = value
    return jax.tree.map(jnp.asarray, params)


def split(params):
    """({path: adapter's leaf}, {path: other leaf})."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    own = {path: leaf for path, leaf in named.items() if adapters.is_adapter(path)}
    return own, {path: leaf for path, leaf in named.items() if path not in own}


def joined(config, own, others):
    _, shapes = models.abstract(config)
    leaf = lambda path, _: (own | others)[jax.tree_util.keystr(path, simple=True, separator="/")]  # noqa: E731
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def gradients_of(adapted, folder, adapter, model_type, config):
    """PyTorch's gradients of all adapters, which take the way of the weights: a file, read by the table of names."""
    found = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in adapted.named_parameters()
        if ".lora_" in name and ".pooler." not in name  # which no loss of ours has
    }
    safetensors.numpy.save_file(found, folder / folders.TENSORS)
    (folder / folders.CONFIG).write_bytes((adapter / folders.CONFIG).read_bytes())
    return folders.load(folder, "gradients", model_type, config)


def assert_gradients_close(got, expected, model_type):
    """Where one A of theirs is of three layers of ours, theirs is the sum of our three."""
    assert got.keys() == expected.keys()
    for rule in FAMILIES[model_type].rules:
        parts = [part.replace("/kernel", f"/{adapters.A}") for part in rule.parts]
        if len(parts) > 1 and parts[0] in got:
            total = sum(np.asarray(got[part]) for part in parts)
            got = got | dict.fromkeys(parts, total)
    for path in expected:
        error = np.linalg.norm(np.asarray(got[path]) - expected[path]) / np.linalg.norm(expected[path])
        assert error < TOLERANCE, (path, error)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_peft(made, case, tmp_path):
    adapted, _, adapter, config, params = made(case)
    rng = np.random.default_rng(5)
    ids, mask = rng.integers(2, VOCAB, (3, 11)), np.arange(11) < np.array([[11], [4], [8]])
    out_weights = rng.standard_normal((3, 11, VOCAB if config.causal else WIDTH)).astype(np.float32) * mask[:, :, None]
    graphdef, _ = models.abstract(config)
    own, others = split(params)

    def loss(own):
        model = nnx.merge(graphdef, joined(config, own, others))
        hidden = model(jnp.asarray(ids), jnp.asarray(mask))
        out = model.logits(hidden) if config.causal else hidden
        return jnp.sum(out * out_weights), out

    (value, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(own)
    model_type = CASES[case][0]
    adapted.zero_grad(set_to_none=True)
    result = adapted(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long())
    theirs = result.logits if config.causal else result.last_hidden_state
    their_loss = (theirs * torch.tensor(out_weights)).sum()
    their_loss.backward()
    np.testing.assert_allclose(np.asarray(out)[mask], theirs.detach().numpy()[mask], rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(value, their_loss.item(), rtol=TOLERANCE)
    expected = gradients_of(adapted, tmp_path, adapter, model_type, config)
    assert_gradients_close(gradients, expected, model_type)
    # The adapters do something: without them, other outputs.
    tokens = jnp.asarray(ids), jnp.asarray(mask)
    plain = nnx.merge(graphdef, joined(config, jax.tree.map(jnp.zeros_like, own), others))(*tokens)
    with_them = nnx.merge(graphdef, params)(*tokens)
    assert np.abs(np.asarray(plain - with_them)[mask]).max() > 0.05


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_the_shared_prefix_marginal_equals_peft_on_whole_sequences(made, case, tmp_path):
    adapted, _, adapter, config, params = made(case)
    rng = np.random.default_rng(6)
    B, K, Lp, Ls, T = 2, 3, 7, 6, 3
    prefix, suffix = rng.integers(0, VOCAB, (4, Lp)), rng.integers(0, VOCAB, (B, Ls))
    prefix_len, suffix_len = np.array([7, 3, 5, 6]), np.array([6, 5])
    prefix_mask, suffix_mask = np.arange(Lp) < prefix_len[:, None], np.arange(Ls) < suffix_len[:, None]
    candidates, doc_log_probs = np.array([[0, 1, 3], [2, 0, 1]]), np.log(np.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]]))
    texts = (prefix, prefix_mask), (suffix, suffix_mask)
    start = suffix_len - T  # the last T tokens of each suffix are its answer
    graphdef, _ = models.abstract(config)
    own, others = split(params)

    def loss(own):
        model = nnx.merge(graphdef, joined(config, own, others))
        hidden = model.forward_shared_prefix(*jax.tree.map(jnp.asarray, texts), jnp.asarray(candidates))
        index = start[:, None] + np.arange(T)
        before = jnp.take_along_axis(hidden, jnp.asarray(index)[:, None, :, None] - 1, axis=2)
        ids = np.broadcast_to(np.take_along_axis(suffix, index, axis=1)[:, None], (B, K, T))
        log_probs = gold_log_probs(before.reshape(-1, WIDTH), model.head_kernel(), jnp.asarray(ids.reshape(-1)), 5)
        return -jnp.sum(losses.token_marginal(jnp.asarray(doc_log_probs, jnp.float32), log_probs.reshape(B, K, T)))

    value, gradients = jax.jit(jax.value_and_grad(loss))(own)
    adapted.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for b in range(B):
        rows = []
        for k in range(K):
            p = candidates[b, k]
            text = np.concatenate([prefix[p, : prefix_len[p]], suffix[b, : suffix_len[b]]])
            log_probs = torch.log_softmax(adapted(input_ids=torch.tensor(text[None])).logits[0], dim=-1)
            at = torch.arange(len(text) - T, len(text))
            rows.append(log_probs[at - 1, torch.tensor(text)[at]] + doc_log_probs[b, k])
        total = total - torch.logsumexp(torch.stack(rows), dim=0).sum()
    total.backward()
    np.testing.assert_allclose(value, total.item(), rtol=TOLERANCE)
    expected = gradients_of(adapted, tmp_path, adapter, CASES[case][0], config)
    assert_gradients_close(gradients, expected, CASES[case][0])


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_loaded_again_bit_for_bit(made, case, tmp_path):
    _, base, _, config, params = made(case)
    model_type = CASES[case][0]
    # Three adapters of one layer no longer begin alike.
    rng = np.random.default_rng(0)
    own, others = split(params)
    own = {path: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for path, leaf in own.items()}
    params = joined(config, own, others)
    folders.save(params, tmp_path, model_type, config, str(base), is_retriever=False)
    again, loaded = read(base, tmp_path)
    assert again == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


SAVED = [
    ("bert-attention", True),  # an encoder is no generator
    *(
        (case, is_retriever)
        for case in ("gpt2", "gpt2-stabilised", "llama", "llama-pattern")
        for is_retriever in (False, True)
    ),
]


@pytest.mark.parametrize(("case", "is_retriever"), SAVED)
def test_peft_loads_what_is_saved_and_a_merged_export_says_the_same(made, case, is_retriever, tmp_path):
    _, base, _, config, params = made(case)
    model_type = CASES[case][0]
    own, others = split(params)
    rng = np.random.default_rng(1)
    own = {path: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32) for path, leaf in own.items()}
    params = joined(config, own, others)
    trained = ("norm/scale", "layers/mlp_norm/scale")
    folders.save(params, tmp_path, model_type, config, str(base), is_retriever=is_retriever, trained=trained)
    auto = peft.AutoPeftModelForFeatureExtraction if is_retriever else peft.AutoPeftModelForCausalLM
    model = auto.from_pretrained(tmp_path).eval()
    ids = np.random.default_rng(5).integers(0, VOCAB, (2, 9))
    result = model(input_ids=torch.tensor(ids), attention_mask=torch.ones((2, 9), dtype=torch.long))
    with torch.no_grad():
        theirs = (result.last_hidden_state if is_retriever else result.logits).detach().numpy()
    graphdef, _ = models.abstract(config)

    def outputs(graphdef, params):
        model = nnx.merge(graphdef, params)
        hidden = model(jnp.asarray(ids), jnp.ones((2, 9), bool))
        return np.asarray(hidden if is_retriever else model.logits(hidden))

    ours = outputs(graphdef, params)
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    plain = models.plain(config)
    merged = outputs(models.abstract(plain)[0], adapters.merged(params, config.computing.lora))
    np.testing.assert_allclose(merged, ours, rtol=1e-4, atol=1e-5)


def test_leaves_that_were_trained_beside_adapters_come_back(made, tmp_path):
    _, base, _, config, params = made("llama")
    changed = {"norm/scale": params["norm"]["scale"] + 1, "head/kernel": params["head"]["kernel"] * 2}
    params = filled(params, changed)
    folders.save(params, tmp_path, "llama", config, str(base), is_retriever=False, trained=tuple(changed))
    asked = json.loads((tmp_path / folders.CONFIG).read_text())["modules_to_save"]
    assert asked == ["lm_head", "norm"]
    _, loaded = read(base, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    theirs = model.base_model.model.model.norm.modules_to_save["default"].weight.detach().numpy()
    np.testing.assert_array_equal(theirs, params["norm"]["scale"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(peft_type="LOHA"), "peft_type='LOHA' (supported: LORA)"),
        (dict(use_dora=True), "use_dora=True"),
        (dict(bias="all"), "bias='all' (supported: none)"),
        (dict(layers_to_transform=[0]), "layers_to_transform=[0]"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' (it changes the base"),
        (dict(r=0), "r=0 (must be a whole number above 0)"),
        (dict(r="8"), "r='8' (must be a whole number above 0)"),
        (dict(lora_alpha=None), "lora_alpha=None (must be a number above 0)"),
        (dict(target_modules=["q_proj", "c_attn"]), "target_modules: 'c_attn' is no linear layer of this base"),
        (dict(target_modules="(a+)+$"), "(it matches no layer of this base)"),
        (dict(target_modules=None), "target_modules=None (must be names or a pattern)"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern, alpha_pattern: self_attn.q_proj has 2, 6, others 4, 6"),
        (dict(r=64), "rank=64: layers/attention/"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(made, change, message, tmp_path):
    _, base, adapter, _, _ = made("llama")
    content = json.loads((adapter / folders.CONFIG).read_text())
    (tmp_path / folders.CONFIG).write_text(json.dumps(content | change))
    with pytest.raises(UserError) as caught:
        read(base, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_refused(made, tmp_path):
    _, base, adapter, config, _ = made("llama")
    tensors = safetensors.numpy.load_file(adapter / folders.TENSORS)
    name = next(name for name in tensors if "layers.1.self_attn.q_proj.lora_A" in name)
    for changed, message in (
        ({name: tensors[name][:, :8]}, "do not fit rank 4 of its base"),
        ({name: tensors[name] * np.nan}, "holds NaN or infinity"),
        ({"base_model.model.extra.weight": tensors[name]}, "extra.weight is unknown"),
    ):
        safetensors.numpy.save_file(tensors | changed, tmp_path / folders.TENSORS)
        with pytest.raises(UserError, match=message):
            folders.load(tmp_path, "adapter", "llama", config)
    safetensors.numpy.save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / folders.TENSORS)
    with pytest.raises(UserError, match=r"q_proj.lora_A or lora_B is missing"):
        folders.load(tmp_path, "adapter", "llama", config)
    (tmp_path / folders.TENSORS).write_bytes((adapter / folders.TENSORS).read_bytes()[:-50])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        folders.load(tmp_path, "adapter", "llama", config)


def test_no_family_has_layers_without_a_name_in_peft():
    """Each of our linear layers is reached by a rule, so that all-linear means all."""
    for case in ("bert", "gpt2", "llama"):
        model_type, values, _ = CASES[case]
        config = configs.from_hf(transformers.AutoConfig.for_model(model_type, **values).to_dict(), [])
        found = {path for each in folders._modules(FAMILIES[model_type], config) for path in each.paths}
        assert found == models.linear_layers(config).keys()
    assert weights.SINGLE  # the base's file, which an adapter's folder does without
