"""GPT-2."""

from rag_jax.hf.families.entry import HEADS, Family, Rule, conv1d, norm
from rag_jax.models import Gpt2Config

_ATTENTION = ("layers/attention/query", "layers/attention/key", "layers/attention/value")

FAMILIES = {
    "gpt2": Family(
        Gpt2Config,
        "GPT2LMHeadModel",
        {
            "vocab_size": "vocab_size",
            "n_layer": "num_layers",
            "n_head": "num_heads",
            "n_embd": "width",
            "n_inner": "mlp_width",
            "n_positions": "max_positions",
            "layer_norm_epsilon": "norm_eps",
            "activation_function": "activation",
            "resid_pdrop": "dropout",
            "embd_pdrop": "embed_dropout",
            "attn_pdrop": "attention_dropout",
        },
        (
            Rule("transformer.wte.weight", "embed/word/embedding"),
            Rule("transformer.wpe.weight", "embed/position/embedding"),
            *norm("transformer.h.{i}.ln_1", "layers/attention_norm"),
            *conv1d("transformer.h.{i}.attn.c_attn", *_ATTENTION),
            *conv1d("transformer.h.{i}.attn.c_proj", "layers/attention/out"),
            *norm("transformer.h.{i}.ln_2", "layers/mlp_norm"),
            *conv1d("transformer.h.{i}.mlp.c_fc", "layers/mlp/up"),
            *conv1d("transformer.h.{i}.mlp.c_proj", "layers/mlp/down"),
            *norm("transformer.ln_f", "norm"),
        ),
        "transformer.",
        dropped=HEADS,
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
            "is_causal": True,
        },
        absent={"mlp_width": lambda ours: 4 * ours["width"]},
    )
}
