"""Names of every tensor, Hugging Face's beside ours: one table a family, read in both directions."""

import dataclasses

from rag_jax.models import BertConfig, Gpt2Config, LlamaConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of theirs and ours. `{i}` counts layers, which ours stack on a leading axis.

    Several of ours lie side by side along their last axis. `transpose`: PyTorch's linear layers are (out, in).
    """

    hf: str
    ours: str | tuple[str, ...]
    transpose: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def stacked(self) -> bool:
        return "{i}" in self.hf


def _linear(hf: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{hf}.weight", f"{ours}/kernel", transpose=True), Rule(f"{hf}.bias", f"{ours}/bias")


def _norm(hf: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{hf}.weight", f"{ours}/scale"), Rule(f"{hf}.bias", f"{ours}/bias")


def _conv1d(hf: str, *ours: str) -> tuple[Rule, Rule]:
    """GPT-2's linear layers are (in, out)."""
    kernels, biases = (tuple(f"{name}/{leaf}" for name in ours) for leaf in ("kernel", "bias"))
    return Rule(f"{hf}.weight", kernels), Rule(f"{hf}.bias", biases)


BERT = (
    Rule("embeddings.word_embeddings.weight", "embed/word/embedding"),
    Rule("embeddings.position_embeddings.weight", "embed/position/embedding"),
    Rule("embeddings.token_type_embeddings.weight", "embed/token_type/embedding"),
    *_norm("embeddings.LayerNorm", "embed/norm"),
    *_linear("encoder.layer.{i}.attention.self.query", "layers/attention/query"),
    *_linear("encoder.layer.{i}.attention.self.key", "layers/attention/key"),
    *_linear("encoder.layer.{i}.attention.self.value", "layers/attention/value"),
    *_linear("encoder.layer.{i}.attention.output.dense", "layers/attention/out"),
    *_norm("encoder.layer.{i}.attention.output.LayerNorm", "layers/attention_norm"),
    *_linear("encoder.layer.{i}.intermediate.dense", "layers/mlp/up"),
    *_linear("encoder.layer.{i}.output.dense", "layers/mlp/down"),
    *_norm("encoder.layer.{i}.output.LayerNorm", "layers/mlp_norm"),
)

_ATTENTION = ("layers/attention/query", "layers/attention/key", "layers/attention/value")
GPT2 = (
    Rule("transformer.wte.weight", "embed/word/embedding"),
    Rule("transformer.wpe.weight", "embed/position/embedding"),
    *_norm("transformer.h.{i}.ln_1", "layers/attention_norm"),
    *_conv1d("transformer.h.{i}.attn.c_attn", *_ATTENTION),
    *_conv1d("transformer.h.{i}.attn.c_proj", "layers/attention/out"),
    *_norm("transformer.h.{i}.ln_2", "layers/mlp_norm"),
    *_conv1d("transformer.h.{i}.mlp.c_fc", "layers/mlp/up"),
    *_conv1d("transformer.h.{i}.mlp.c_proj", "layers/mlp/down"),
    *_norm("transformer.ln_f", "norm"),
)

LLAMA = (
    Rule("model.embed_tokens.weight", "embed/word/embedding"),
    Rule("model.layers.{i}.input_layernorm.weight", "layers/attention_norm/scale"),
    *_linear("model.layers.{i}.self_attn.q_proj", "layers/attention/query"),
    *_linear("model.layers.{i}.self_attn.k_proj", "layers/attention/key"),
    *_linear("model.layers.{i}.self_attn.v_proj", "layers/attention/value"),
    *_linear("model.layers.{i}.self_attn.o_proj", "layers/attention/out"),
    Rule("model.layers.{i}.self_attn.q_norm.weight", "layers/attention/query_norm/scale"),
    Rule("model.layers.{i}.self_attn.k_norm.weight", "layers/attention/key_norm/scale"),
    Rule("model.layers.{i}.post_attention_layernorm.weight", "layers/mlp_norm/scale"),
    *_linear("model.layers.{i}.mlp.gate_proj", "layers/mlp/gate"),
    *_linear("model.layers.{i}.mlp.up_proj", "layers/mlp/up"),
    *_linear("model.layers.{i}.mlp.down_proj", "layers/mlp/down"),
    Rule("model.norm.weight", "norm/scale"),
    Rule("lm_head.weight", "head/kernel", transpose=True),
)

RULES: dict[type, tuple[Rule, ...]] = {BertConfig: BERT, Gpt2Config: GPT2, LlamaConfig: LLAMA}

# What a file may have before its names, or lack: the same tensors saved from a model with or without its head.
PREFIXES: dict[type, str] = {BertConfig: "bert.", Gpt2Config: "transformer.", LlamaConfig: "model."}

# Tensors that no rule names and that may stand in a file. Carried: part of the model, but not of our forward pass, so
# export writes them as they came. Dropped: buffers and heads that a loaded model makes anew or does not have.
CARRIED = r"pooler\.dense\.(weight|bias)"
DROPPED = (
    r"(.*\.)?(position_ids|token_type_ids|inv_freq|attn\.bias|attn\.masked_bias)"
    r"|cls\..*|lm_head\.weight|score\.weight"
)
