"""What the hub's most used models say in their config.json, as older and newer releases of `transformers` wrote it.

Facts of the models' pages: the keys that decide what is computed. Each loads, or is refused for the reason given.
"""

import json

import pytest

from rag_jax.errors import UserError
from rag_jax.hf import config as configs
from rag_jax.hf import known

WHERE = "generator.path='x'"


def keys(name, **more):
    """Those of a model that is known by name, under the names that its file has."""
    model_type, sizes = known.KNOWN[name]
    return {"model_type": model_type, **sizes, **more}


OLD_BERT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "pad_token_id": 0}
OLD_BERT |= {"attention_probs_dropout_prob": 0.1, "position_embedding_type": "absolute"}
ROBERTA = OLD_BERT | {"layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
MODERN = {
    "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3, "norm_eps": 1e-5,
    "hidden_activation": "gelu", "attention_bias": False, "mlp_bias": False, "norm_bias": False,
    "embedding_dropout": 0.0, "position_embedding_type": "absolute", "layer_norm_eps": 1e-5,
    "pad_token_id": 50283, "sep_token_id": 50282,
}  # fmt: skip
SMOL = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False, "rope_theta": 100000, "rope_scaling": None}
LLAMA3 = {
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
QWEN25 = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "sliding_window": 32768, "use_sliding_window": False}
QWEN25 |= {"max_window_layers": 21, "hidden_act": "silu", "attention_dropout": 0.0}
QWEN3 = QWEN25 | {"attention_bias": False, "rope_scaling": None, "sliding_window": None, "max_window_layers": 28}
GEMMA3 = {
    "rope_theta": 1000000.0, "rope_local_base_freq": 10000, "sliding_window_pattern": 6, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "attention_bias": False, "rope_scaling": None,
}  # fmt: skip
GEMMA2 = {
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096, "rope_theta": 10000.0,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
}  # fmt: skip
GRANITE = {"rope_theta": 10000000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False}
OLMO3 = {
    "rope_theta": 500000, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1,
        "attention_factor": 1.2079441541679836,
    },
}  # fmt: skip
PHI3 = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "hidden_act": "silu",
}
LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i / 4 for i in range(48)]}
OTHERWISE = {
    "rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SMOLLM3 = {
    "rope_theta": 5000000.0, "rms_norm_eps": 1e-6, "no_rope_layer_interval": 4, "use_sliding_window": False,
    "no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36, "hidden_act": "silu",
}  # fmt: skip

LOADED = {
    "all-MiniLM-L6-v2": keys("sentence-transformers/all-MiniLM-L6-v2", **OLD_BERT, gradient_checkpointing=False),
    "all-MiniLM-L12-v2": keys("sentence-transformers/all-MiniLM-L12-v2", **OLD_BERT),
    "paraphrase-multilingual-MiniLM-L12-v2": keys(
        "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2", **OLD_BERT
    ),
    "bge-small-en-v1.5": keys("BAAI/bge-small-en-v1.5", **OLD_BERT, id2label={"0": "LABEL_0"}),
    "bge-base-en-v1.5": keys("BAAI/bge-base-en-v1.5", **OLD_BERT),
    "bge-large-en-v1.5": keys("BAAI/bge-large-en-v1.5", **OLD_BERT),
    "e5-base-v2": keys("intfloat/e5-base-v2", **OLD_BERT),
    "gte-base": keys("thenlper/gte-base", **OLD_BERT),
    "mxbai-embed-large-v1": keys("mixedbread-ai/mxbai-embed-large-v1", **OLD_BERT, use_cache=False),
    "arctic-embed-m": keys("Snowflake/snowflake-arctic-embed-m", **OLD_BERT),
    "multilingual-e5-small": keys("intfloat/multilingual-e5-small", **OLD_BERT),
    "multilingual-e5-base": keys("intfloat/multilingual-e5-base", **ROBERTA, output_past=True),
    "multilingual-e5-large": keys("intfloat/multilingual-e5-large", **ROBERTA),
    "bge-m3": keys("BAAI/bge-m3", **ROBERTA, torch_dtype="float32"),
    "arctic-embed-l-v2.0": keys("Snowflake/snowflake-arctic-embed-l-v2.0", **ROBERTA),
    "roberta-base": keys("FacebookAI/roberta-base", **ROBERTA),
    "xlm-roberta-base": keys("FacebookAI/xlm-roberta-base", **ROBERTA),
    "all-distilroberta-v1": keys("FacebookAI/roberta-base", **ROBERTA) | {"num_hidden_layers": 6},
    "all-mpnet-base-v2": keys("sentence-transformers/all-mpnet-base-v2", hidden_act="gelu", layer_norm_eps=1e-5),
    "multi-qa-mpnet-base-dot-v1": keys("sentence-transformers/multi-qa-mpnet-base-dot-v1", layer_norm_eps=1e-5),
    "multi-qa-distilbert-cos-v1": keys(
        "sentence-transformers/multi-qa-distilbert-cos-v1",
        activation="gelu",
        sinusoidal_pos_embds=False,
        tie_weights_=True,
    ),
    "distilbert-base-uncased": keys("distilbert/distilbert-base-uncased", dropout=0.1, attention_dropout=0.1),
    "ModernBERT-base": keys("answerdotai/ModernBERT-base", **MODERN),
    "ModernBERT-large": keys("answerdotai/ModernBERT-large", **MODERN),
    "gte-modernbert-base": keys("Alibaba-NLP/gte-modernbert-base", **MODERN, reference_compile=False),
    "modernbert-embed-base": keys("nomic-ai/modernbert-embed-base", **MODERN),
    "granite-embedding-english-r2": keys(
        "ibm-granite/granite-embedding-english-r2", **MODERN | {"global_rope_theta": 8e4}
    ),
    "ettin-encoder-150m": keys("jhu-clsp/ettin-encoder-150m", **MODERN),
    "embeddinggemma-300m": keys("google/embeddinggemma-300m", **GEMMA3),
    "Qwen3-Embedding-0.6B": keys("Qwen/Qwen3-Embedding-0.6B", **QWEN3),
    "Qwen3-Embedding-4B": keys("Qwen/Qwen3-Embedding-4B", **QWEN3 | {"max_window_layers": 36}),
    "Qwen3-Embedding-8B": keys("Qwen/Qwen3-Embedding-8B", **QWEN3 | {"max_window_layers": 36}),
    "gpt2": keys("gpt2", activation_function="gelu_new", n_ctx=1024, resid_pdrop=0.1, summary_type="cls_index"),
    "SmolLM2-135M": keys("HuggingFaceTB/SmolLM2-135M", **SMOL, is_llama_config=True),
    "SmolLM2-1.7B": keys("HuggingFaceTB/SmolLM2-1.7B", **SMOL | {"rope_theta": 130000}),
    "SmolLM3-3B": keys("HuggingFaceTB/SmolLM3-3B", **SMOLLM3),
    "TinyLlama-1.1B": keys("TinyLlama/TinyLlama-1.1B-Chat-v1.0", **SMOL | {"rope_theta": 10000.0}, pretraining_tp=1),
    "Llama-2-7b": keys("meta-llama/Llama-2-7b-hf", rms_norm_eps=1e-5, rope_scaling=None, hidden_act="silu"),
    "Llama-3.1-8B": keys("meta-llama/Llama-3.1-8B", **LLAMA3),
    "Llama-3.2-1B": keys("meta-llama/Llama-3.2-1B", **LLAMA3),
    "Llama-3.2-3B": keys("meta-llama/Llama-3.2-3B", **LLAMA3),
    "Mistral-7B-v0.1": keys("mistralai/Mistral-7B-v0.1", rope_theta=10000.0, rms_norm_eps=1e-5, hidden_act="silu"),
    "Qwen2.5-0.5B": keys("Qwen/Qwen2.5-0.5B", **QWEN25),
    "Qwen2.5-1.5B": keys("Qwen/Qwen2.5-1.5B", **QWEN25),
    "Qwen2.5-7B, longer by YaRN": keys("Qwen/Qwen2.5-7B", **QWEN25, rope_scaling=YARN),
    "Qwen3-0.6B": keys("Qwen/Qwen3-0.6B", **QWEN3),
    "Qwen3-4B": keys("Qwen/Qwen3-4B", **QWEN3 | {"max_window_layers": 36}),
    "gemma-3-270m": keys("google/gemma-3-270m", **GEMMA3),
    "gemma-3-1b-it": keys("google/gemma-3-1b-it", **GEMMA3),
    "gemma-2-2b": keys("google/gemma-2-2b", **GEMMA2),
    "gemma-2-9b": keys("google/gemma-2-9b", **GEMMA2),
    "granite-3.3-2b-instruct": keys("ibm-granite/granite-3.3-2b-instruct", **GRANITE),
    "granite-3.3-8b-instruct": keys("ibm-granite/granite-3.3-8b-instruct", **GRANITE),
    "OLMo-2-0425-1B": keys("allenai/OLMo-2-0425-1B", rope_theta=500000, rms_norm_eps=1e-6, attention_bias=False),
    "Olmo-3-1025-7B": keys("allenai/Olmo-3-1025-7B", **OLMO3),
    "Phi-3-mini-4k-instruct": keys("microsoft/Phi-3-mini-4k-instruct", **PHI3, original_max_position_embeddings=4096),
    "Phi-4-mini-instruct": keys("microsoft/Phi-4-mini-instruct", **PHI3 | {"rope_scaling": LONG})
    | {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144},
}
REFUSED = {
    "gemma-3-4b-it, which sees": ({"model_type": "gemma3", "text_config": {}}, "model_type='gemma3' is not supported"),
    "nomic-embed-text-v1.5": (
        {"model_type": "nomic_bert", "auto_map": {"AutoModel": "a--b.C"}},
        "model_type='nomic_bert' is code of its own",
    ),
    "gte-multilingual-base": ({"model_type": "new", "auto_map": {"AutoModel": "a--b.C"}}, "is code of its own"),
    "deberta-v3-base": ({"model_type": "deberta-v2"}, "model_type='deberta-v2' is not supported"),
    "gpt-oss-20b": ({"model_type": "gpt_oss"}, "model_type='gpt_oss' is not supported"),
    "a BERT that decodes": (LOADED["bge-base-en-v1.5"] | {"is_decoder": True}, "is_decoder=True"),
    "a Gemma 2 that sees both ways": (
        LOADED["gemma-2-2b"] | {"use_bidirectional_attention": True},
        "use_bidirectional_attention=True",
    ),
    "a Granite without logits": (LOADED["granite-3.3-2b-instruct"] | {"logits_scaling": 0.0}, "logits_scaling=0.0"),
    "a Gemma 3 that turns in part in some layers": (
        LOADED["gemma-3-270m"]
        | {"rope_parameters": {"sliding_attention": {"rope_type": "default", "partial_rotary_factor": 0.5}}},
        "partial_rotary_factor=0.5",
    ),
    "an Olmo 3 that turns its long texts otherwise in some layers": (
        LOADED["Olmo-3-1025-7B"] | {"rope_scaling": OTHERWISE},
        "rope_type='longrope' of some layers",
    ),
    "a Llama that turns in part": (
        LOADED["Llama-2-7b"]
        | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
}  # fmt: skip


def test_there_are_enough():
    assert len(LOADED) + len(REFUSED) >= 60


@pytest.mark.parametrize("name", LOADED)
def test_a_model_in_use_loads_and_is_written_and_read_as_the_same(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LOADED[name]))
    model_type, config = configs.read_config(tmp_path, WHERE)
    assert model_type == LOADED[name]["model_type"]
    written = configs.to_hf(config, model_type) | {"pad_token_id": LOADED[name].get("pad_token_id")}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert configs.read_config(tmp_path, WHERE) == (model_type, config)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_not_computed_here_is_refused_by_name(name, tmp_path):
    content, message = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        configs.read_config(tmp_path, WHERE)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_tells_some_of_them_apart(tmp_path):
    def read(name):
        (tmp_path / "config.json").write_text(json.dumps(LOADED[name]))
        return configs.read_config(tmp_path, WHERE)[1]

    gemma = read("embeddinggemma-300m")
    assert not gemma.causal and [kind.sliding_window for kind in gemma.kinds] == [256, None]
    assert gemma.layer_kinds == (0, 0, 0, 0, 0, 1) * 4
    assert [kind.rope_theta for kind in read("gemma-3-1b-it").kinds] == [1e4, 1e6]
    phi = read("Phi-4-mini-instruct")
    assert (phi.rotary_channels, phi.max_positions, phi.rope_scaling.kind) == (96, 4096, "channels")
    assert phi.rope_scaling.magnitude == pytest.approx(1.190238, abs=1e-6)
    assert [kind.rope_theta for kind in read("SmolLM3-3B").kinds] == [5e6, None]
    olmo = read("Olmo-3-1025-7B")
    assert [(kind.sliding_window, kind.rope_scaling is not None) for kind in olmo.kinds] == [
        (4096, False),
        (None, True),
    ]
    modern = read("granite-embedding-english-r2")
    assert [(kind.rope_theta, kind.sliding_window) for kind in modern.kinds] == [(8e4, None), (1e4, 65), (8e4, None)]
    assert (read("bge-m3").max_positions, read("bge-m3").first_position) == (8192, 2)
    granite = read("granite-3.3-8b-instruct")
    assert (granite.embed_scale, granite.residual_scale, granite.logit_scale) == (12.0, 0.22, 1 / 16)
    assert read("gemma-2-9b").attention_scale is None and read("gemma-2-9b").score_softcap == 50.0
