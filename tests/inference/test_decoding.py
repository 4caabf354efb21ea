"""Greedy decoding against `transformers.generate`, and the mixture over passages against full forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from rag_jax import models, rag
from rag_jax.inference import decoding

V, EOS, LP, LQ, T = 89, 1, 12, 6, 14
LLAMA = models.LlamaConfig(
    V, 2, 4, 2, 8, 32, 48, 64, 1e-5, 1e4, None, "silu", False, False, False, False, False, None, 0.0
)
MISTRAL = models.LlamaConfig(
    V, 2, 4, 2, 8, 32, 48, 64, 1e-5, 1e4, None, "silu", False, False, False, False, True, 7, 0.0
)
GPT2 = models.Gpt2Config(V, 2, 4, 32, 64, 64, 1e-5, "gelu_tanh", 0.0, 0.0, 0.0)
CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "mistral": MISTRAL}
TORCH = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=32,
            intermediate_size=48, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.4,
            bos_token_id=0, eos_token_id=EOS, pad_token_id=0,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V, n_layer=2, n_head=4, n_embd=32, n_inner=64, n_positions=64, layer_norm_epsilon=1e-5,
            initializer_range=0.4, bos_token_id=0, eos_token_id=EOS, pad_token_id=0,
        )
    ),
}  # fmt: skip


def from_torch(name, tensors):
    """Our parameter tree, put together by hand: tensors of one kind stacked over layers."""
    arrays = {key: value.detach().numpy() for key, value in tensors.items()}

    def stacked(template, transpose):
        return np.stack([arrays[template.format(i)].T if transpose else arrays[template.format(i)] for i in range(2)])

    if name == "llama":
        parts = {"attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj"}
        parts |= {"attention.value": "self_attn.v_proj", "attention.out": "self_attn.o_proj"}
        parts |= {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
        norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        flat = {f"layers.{o}.kernel": stacked(f"model.layers.{{}}.{h}.weight", True) for o, h in parts.items()}
        flat |= {f"layers.{o}.scale": stacked(f"model.layers.{{}}.{h}.weight", False) for o, h in norms.items()}
        flat |= {"embed.word.embedding": arrays["model.embed_tokens.weight"], "norm.scale": arrays["model.norm.weight"]}
        flat |= {"head.kernel": arrays["lm_head.weight"].T}
    else:
        flat = {"embed.word.embedding": arrays["transformer.wte.weight"]}
        flat |= {"embed.position.embedding": arrays["transformer.wpe.weight"]}
        linears = {"attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
        for o, h in linears.items():
            flat[f"layers.{o}.kernel"] = stacked(f"transformer.h.{{}}.{h}.weight", False)
            flat[f"layers.{o}.bias"] = stacked(f"transformer.h.{{}}.{h}.bias", False)
        for leaf, hf in (("kernel", "weight"), ("bias", "bias")):
            thirds = np.split(stacked(f"transformer.h.{{}}.attn.c_attn.{hf}", False), 3, axis=-1)
            flat |= {f"layers.attention.{o}.{leaf}": a for o, a in zip(("query", "key", "value"), thirds, strict=True)}
        for leaf, hf in (("scale", "weight"), ("bias", "bias")):
            flat[f"norm.{leaf}"] = arrays[f"transformer.ln_f.{hf}"]
            flat[f"layers.attention_norm.{leaf}"] = stacked(f"transformer.h.{{}}.ln_1.{hf}", False)
            flat[f"layers.mlp_norm.{leaf}"] = stacked(f"transformer.h.{{}}.ln_2.{hf}", False)
    tree = {}
    for path, array in flat.items():
        *folders, leaf = path.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jnp.asarray(array)
    return tree


def padded(rows, length):
    mask = np.arange(length) < np.array([len(row) for row in rows])[:, None]
    return jnp.asarray([row + [0] * (length - len(row)) for row in rows], jnp.int32), jnp.asarray(mask)


def answers(graphdef, params, passages, queries, candidates, doc_log_probs, num_tokens):
    model = rag.Rag(rag.Objective("token", 1, 1.0, 1.0, 0.0, 1.0), None, graphdef, "mean", 1)
    prefix, query = (tuple(map(np.asarray, padded(*texts))) for texts in ((passages, LP), (queries, LQ)))
    ids = decoding.answer_ids(
        model, {"generator": params}, prefix, query, candidates.astype(np.int32), np.asarray(doc_log_probs),
        num_tokens=num_tokens, eos_id=EOS,
    )  # fmt: skip
    return np.asarray(ids).tolist()


def texts(rng, shortest, longest, count):
    return [rng.integers(2, V, rng.integers(shortest, longest + 1)).tolist() for _ in range(count)]


def upto_eos(ids):
    ids = list(ids)
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_passage_is_greedy_generation_of_transformers(name):
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    theirs = TORCH[name]().eval()
    graphdef, state = nnx.split(nnx.eval_shape(lambda: CONFIGS[name].build(nnx.Rngs(0))))
    params = from_torch(name, theirs.state_dict())
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    rng = np.random.default_rng(0)
    passages, queries = texts(rng, 3, LP, 5), texts(rng, 1, LQ, 12)
    candidates = rng.integers(0, 5, (12, 1))
    ours = answers(graphdef, params, passages, queries, candidates, jnp.zeros((12, 1)), T)
    for row, query in enumerate(queries):
        prompt = torch.tensor([passages[candidates[row, 0]] + query])
        whole = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=T)
        expected = whole[0, prompt.shape[1] :].tolist()
        assert upto_eos(ours[row]) == expected
        assert set(ours[row][len(expected) :]) <= {EOS}
    assert len({tuple(row) for row in ours}) > 3, "answers too alike to show anything"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_mixture_of_passages_token_by_token(name):
    """No cache, no shared prefix: every step runs every (passage, query, answer so far) string anew."""
    config = CONFIGS[name]
    module = config.build(nnx.Rngs(1))
    graphdef, state = nnx.split(module)
    sharp = jax.tree.map(lambda a: a * 4 if a.ndim > 1 else a, nnx.to_pure_dict(state))  # livelier than at random
    module = nnx.merge(graphdef, sharp)
    rng = np.random.default_rng(1)
    passages, queries = texts(rng, 3, LP, 4), texts(rng, 1, LQ, 3)
    candidates = np.stack([rng.permutation(4)[:3] for _ in queries])
    doc_log_probs = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(3, 3)), jnp.float32))
    ours = answers(graphdef, sharp, passages, queries, candidates, doc_log_probs, 5)
    forward = jax.jit(lambda ids, mask: module.logits(module(ids, mask)))
    for row, query in enumerate(queries):
        answer = []
        while len(answer) < 5 and EOS not in answer:
            mixed = np.zeros(V)
            for k, passage in enumerate(candidates[row]):
                string = passages[passage] + query + answer
                logits = np.asarray(forward(*padded([string], LP + LQ + 5))[0, len(string) - 1], np.float64)
                p = np.exp(logits - logits.max())
                mixed += np.exp(float(doc_log_probs[row, k])) * p / p.sum()
            answer.append(int(mixed.argmax()))
        assert upto_eos(ours[row]) == answer


def test_text_ends_at_end_of_sequence():
    class Tokenizer:
        eos_token_id = EOS

        def decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return " " + "-".join(map(str, ids)) + " "

    assert decoding.text(Tokenizer(), np.array([5, 6, EOS, 7])) == "5-6"
    assert decoding.text(Tokenizer(), np.array([5, 6])) == "5-6"
    assert decoding.text(Tokenizer(), np.array([EOS, EOS])) == ""
