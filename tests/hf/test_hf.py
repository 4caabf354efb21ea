"""Hugging Face folders: weights and configs both ways, what is refused and how, pooling, exports read by others."""

import dataclasses
import functools
import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import transformers
from flax import nnx

from rag_jax import hf, models, rag
from rag_jax.errors import UserError
from rag_jax.hf import config as configs
from rag_jax.hf import folder as folders
from rag_jax.hf import tiny, weights
from rag_jax.hf.families import FAMILIES
from rag_jax.models import BertConfig, Gpt2Config, LayerKind, LlamaConfig, ModernBertConfig, RopeScaling

BERT = BertConfig(53, 2, 2, 16, 24, 32, 2, 1e-12, "gelu", 0.1, 0.2)
GPT2 = Gpt2Config(53, 2, 2, 16, 24, 32, 1e-5, "gelu_tanh", 0.1, 0.2, 0.3)
LLAMA = LlamaConfig(53, 2, 4, 2, 6, 16, 24, 32, 1e-5, 1e4, None, "silu", False, False, False, False, False, None, 0.0)
WHERE = "generator.path='x'"


def change(config, **values):
    return dataclasses.replace(config, **values)


QWEN2 = change(LLAMA, qkv_bias=True, head_dim=4)
QWEN3 = change(LLAMA, qk_norm=True)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
YARN = RopeScaling("yarn", 4.0, 1.0, 32.0, 16, magnitude=1.2, whole_channels=False)
LONG = RopeScaling("channels", 2.0, original_max_positions=32, channel_factors=(1.5, 2.0), magnitude=1.1)
OLMO = change(LLAMA, head_dim=4, qk_norm=True, qk_norm_all=True, norms="after")
GEMMA = change(
    LLAMA, norms="both", offset_norms=True, embed_scale=4.0, attention_scale=0.25, tied_head=True, logit_softcap=3.0
)
MODERN = ModernBertConfig(
    53, 2, 2, 16, 24, 32, 1e-5, "gelu", False, False, False, 0.0, 0.0, 0.0,
    (LayerKind(16e4), LayerKind(1e4, None, 3)), (0, 1),
)  # fmt: skip
# (model type, config) with every feature that a config can have.
CONFIGS = {
    **{f"random-{name}": (name, config) for name, config in tiny.MODELS.items()},
    "bert": ("bert", BERT),
    "bert-other": (
        "bert",
        change(BERT, num_layers=3, activation="relu", type_vocab_size=3, norm_eps=1e-7, dropout=0.0),
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2-other": ("gpt2", change(GPT2, num_layers=3, activation="gelu", norm_eps=1e-6, dropout=0.0)),
    "llama": ("llama", LLAMA),
    "llama-attention-biases": ("llama", change(LLAMA, qkv_bias=True, out_bias=True)),
    "llama-mlp-bias": ("llama", change(LLAMA, mlp_bias=True, attention_dropout=0.3)),
    "llama-tied": ("llama", change(LLAMA, num_layers=3, tied_head=True, rope_theta=5e5)),
    "llama-linear": ("llama", change(LLAMA, rope_scaling=RopeScaling("linear", 2.0), activation="gelu_tanh")),
    "llama-llama3": ("llama", change(LLAMA, rope_scaling=LLAMA3, num_heads=8, num_kv_heads=4)),
    "mistral": ("mistral", change(LLAMA, sliding_window=7)),
    "mistral-no-window": ("mistral", LLAMA),
    "qwen2": ("qwen2", QWEN2),
    "qwen2-tied": ("qwen2", change(QWEN2, tied_head=True)),
    "qwen2-local": ("qwen2", change(QWEN2, layer_kinds=(0, 1), further_kinds=(LayerKind(1e4, None, 7),))),
    "qwen3": ("qwen3", QWEN3),
    "qwen3-encoder": ("qwen3", change(QWEN3, causal=False)),
    "qwen3-window": ("qwen3", change(QWEN3, sliding_window=7)),
    "qwen3-biases": ("qwen3", change(QWEN3, qkv_bias=True, out_bias=True, rope_scaling=RopeScaling("linear", 4.0))),
    "smollm3": ("smollm3", change(LLAMA, layer_kinds=(0, 1), further_kinds=(LayerKind(None),))),
    "granite": (
        "granite",
        change(LLAMA, embed_scale=3.0, residual_scale=0.5, attention_scale=0.25, logit_scale=0.125),
    ),
    "phi3": ("phi3", change(LLAMA, head_dim=4, rotary_channels=2, dropout=0.1)),
    "phi3-longrope": ("phi3", change(LLAMA, head_dim=4, rope_scaling=LONG)),
    "olmo2": ("olmo2", OLMO),
    "olmo3": ("olmo3", change(OLMO, layer_kinds=(0, 1), further_kinds=(LayerKind(1e4, YARN),), sliding_window=7)),
    "gemma": ("gemma", change(LLAMA, offset_norms=True, embed_scale=4.0, tied_head=True)),
    "gemma2": (
        "gemma2",
        change(GEMMA, layer_kinds=(0, 1), further_kinds=(LayerKind(1e4),), sliding_window=7, score_softcap=5.0),
    ),
    "gemma3": (
        "gemma3_text",
        change(
            GEMMA,
            qk_norm=True,
            layer_kinds=(0, 1),
            further_kinds=(LayerKind(1e6),),
            sliding_window=7,
            logit_softcap=None,
        ),
    ),
    "embeddinggemma": (
        "gemma3_text",
        change(
            GEMMA,
            qk_norm=True,
            layer_kinds=(0, 1),
            further_kinds=(LayerKind(1e6),),
            sliding_window=7,
            causal=False,
            attention_scale=None,
        ),
    ),
    "roberta": ("roberta", change(BERT, first_position=2)),
    "xlm-roberta": ("xlm-roberta", change(BERT, first_position=2, type_vocab_size=1)),
    "mpnet": ("mpnet", change(BERT, first_position=2, type_vocab_size=0, distance_kinds=32)),
    "distilbert": ("distilbert", change(BERT, type_vocab_size=0)),
    "modernbert": ("modernbert", MODERN),
    "modernbert-biases": (
        "modernbert",
        change(
            MODERN,
            vocab_size=57,
            num_heads=4,
            width=24,
            mlp_width=20,
            max_positions=48,
            norm_eps=1e-6,
            activation="relu",
            attention_bias=True,
            mlp_bias=True,
            norm_bias=True,
            embed_dropout=0.1,
            attention_dropout=0.2,
            mlp_dropout=0.3,
            num_layers=3,
            layer_kinds=(0, 1, 2),
            kinds=(LayerKind(1e4), LayerKind(1e3, None, 5), LayerKind(1e4)),
        ),
    ),
}
every_config = pytest.mark.parametrize(("model_type", "config"), CONFIGS.values(), ids=CONFIGS)
# The families as their tensors go.
SHAPES = (
    "bert gpt2 llama llama-attention-biases llama-mlp-bias llama-tied mistral qwen2 qwen3 phi3 olmo2 gemma3 "
    "embeddinggemma roberta mpnet distilbert modernbert modernbert-biases"
).split()
every_family = pytest.mark.parametrize("family", SHAPES)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def draw(config, seed=0):
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), models.abstract(config)[1])
    if isinstance(config, ModernBertConfig):
        for leaf in drawn["layers"]["attention_norm"].values():
            leaf[0] = 1.0  # the first layer has none
    return drawn


def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_model(folder, model_type, config, dtype="float32"):
    """config.json and drawn weights; returns the weights by their file's names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", configs.to_hf(config, model_type))
    weights.save_params(draw(config), folder, model_type, config, DTYPES[dtype])
    return read_tensors(folder)


def read_tensors(folder):
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safetensors.safe_open(path, "np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def write_tensors(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / weights.SINGLE)


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == expected[name].dtype, name
        assert got[name].shape == expected[name].shape, name
        assert got[name].tobytes() == expected[name].tobytes(), name


def assert_same_tree(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An own cache folder for `random:` models."""
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    """Whoever asks the hub for a model fails the test."""

    def asked(*args, **kwargs):
        raise AssertionError(f"asked the hub for {args}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)


@pytest.fixture
def random_model(cache, tmp_path):
    """`random_model(name)`: a copy of that random model, to be changed."""

    def make(name):
        return shutil.copytree(folders.resolve(f"random:{name}", "path"), tmp_path / "models" / name)

    return make


def open_model(folder, role="retriever"):
    return hf.open_model(str(folder), f"{role}.path", role)


# Weights.


def torch_model(folder, model_type, dtype):
    """A model of PyTorch's for the folder's config.json, every parameter away from its usual value."""
    torch = pytest.importorskip("torch")
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        config.pad_token_id = None
    auto = transformers.AutoModelForCausalLM if FAMILIES[model_type].config.causal else transformers.AutoModel
    model = auto.from_config(config, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@every_dtype
@every_family
def test_save_of_load_is_what_transformers_writes_bit_for_bit(tmp_path, family, dtype):
    model_type, config = CONFIGS[family]
    write_json(tmp_path / "config.json", configs.to_hf(config, model_type))
    source = tmp_path / "source"
    torch_model(tmp_path, model_type, dtype).save_pretrained(source)
    theirs = read_tensors(source)
    assert configs.read_config(source, WHERE) == (model_type, config)
    assert weights.file_dtype(source, model_type, config) == dtype
    params, rest = hf.load_params(source, model_type, config), weights.load_rest(source, model_type)
    assert set(rest) == (
        {"pooler.dense.weight", "pooler.dense.bias"}
        if isinstance(config, BertConfig) and model_type != "distilbert"
        else set()
    )
    for name, shard_bytes in {"single": weights.SHARD_BYTES, "sharded": 2000}.items():
        (tmp_path / name).mkdir()
        weights.save_params(params, tmp_path / name, model_type, config, DTYPES[dtype], rest, shard_bytes)
        assert (tmp_path / name / weights.INDEX).exists() == (name == "sharded")
        assert_same_bits(read_tensors(tmp_path / name), theirs)
        assert_same_tree(hf.load_params(tmp_path / name, model_type, config), params)


@every_family
def test_load_of_save_is_the_same_tree_in_one_file_and_in_many(tmp_path, family):
    model_type, config = CONFIGS[family]
    params = draw(config)
    for name, shard_bytes in {"single": weights.SHARD_BYTES, "sharded": 2000}.items():
        (tmp_path / name).mkdir()
        weights.save_params(params, tmp_path / name, model_type, config, np.float32, shard_bytes=shard_bytes)
        assert_same_tree(hf.load_params(tmp_path / name, model_type, config), params)
    assert_same_bits(read_tensors(tmp_path / "sharded"), read_tensors(tmp_path / "single"))
    shards = [path.name for path in sorted((tmp_path / "sharded").glob("*.safetensors"))]
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "sharded" / weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in read_tensors(tmp_path / "single").values())
    assert sorted(set(index["weight_map"].values())) == shards


def test_transformers_reads_our_shards(tmp_path):
    torch = pytest.importorskip("torch")
    write_json(tmp_path / "config.json", configs.to_hf(LLAMA, "llama"))
    weights.save_params(draw(LLAMA), tmp_path, "llama", LLAMA, np.float32, shard_bytes=2000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert_same_bits(state, read_tensors(tmp_path))


@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "qwen3"])
def test_names_without_their_prefix_and_buffers(tmp_path, family):
    """As in the hub's `gpt2` (`h.0.ln_1.weight`) and in embedding models (`layers.0.mlp.up_proj.weight`)."""
    model_type, config = CONFIGS[family]
    tensors = write_model(tmp_path, model_type, config)
    expected = hf.load_params(tmp_path, model_type, config)
    prefix = {"gpt2": "transformer."}.get(family, "model.")
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert {"gpt2": "h.0.ln_1.weight"}.get(family, "layers.1.mlp.up_proj.weight") in bare
    buffers = (
        ["h.0.attn.bias", "h.1.attn.masked_bias"] if family == "gpt2" else ["layers.0.self_attn.rotary_emb.inv_freq"]
    )
    write_tensors(tmp_path, bare | {name: np.ones((2, 2), np.float32) for name in buffers})
    assert_same_tree(hf.load_params(tmp_path, model_type, config), expected)
    assert weights.load_rest(tmp_path, model_type) == {}


def test_a_copy_of_a_tied_output_matrix_is_dropped(tmp_path):
    for model_type, config in (CONFIGS["gpt2"], CONFIGS["llama-tied"]):
        tensors = write_model(tmp_path, model_type, config)
        expected = hf.load_params(tmp_path, model_type, config)
        write_tensors(tmp_path, tensors | {"lm_head.weight": np.zeros((53, 16), np.float32)})
        assert_same_tree(hf.load_params(tmp_path, model_type, config), expected)


def test_names_of_old_bert_files(tmp_path):
    """`bert.` in front, gamma and beta, heads of pretraining, buffers, pooler."""
    tensors = write_model(tmp_path, "bert", BERT)
    expected = hf.load_params(tmp_path, "bert", BERT)
    old = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert "bert.encoder.layer.1.attention.output.LayerNorm.gamma" in old
    pooler = {
        "bert.pooler.dense.weight": np.eye(16, dtype=np.float32),
        "bert.pooler.dense.bias": np.ones(16, np.float32),
    }
    others = {
        "bert.embeddings.position_ids": np.arange(32)[None],
        "cls.predictions.bias": np.zeros(53, np.float32),
        "cls.seq_relationship.weight": np.zeros((2, 16), np.float32),
    }
    write_tensors(tmp_path, old | pooler | others)
    assert_same_tree(hf.load_params(tmp_path, "bert", BERT), expected)
    rest = weights.load_rest(tmp_path, "bert")
    assert_same_bits(rest, {name.removeprefix("bert."): tensor for name, tensor in pooler.items()})


@pytest.mark.parametrize("on_devices", [False, True])
def test_parameters_are_read_in_the_dtypes_of_the_model(tmp_path, monkeypatch, on_devices):
    write_model(tmp_path, "gpt2", GPT2)
    expected, abstract = hf.load_params(tmp_path, "gpt2", GPT2), models.abstract

    def half_mlp(config):
        graphdef, shapes = abstract(config)
        mlp = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), shapes["layers"]["mlp"])
        return graphdef, shapes | {"layers": shapes["layers"] | {"mlp": mlp}}

    monkeypatch.setattr(models, "abstract", half_mlp)
    wanted = half_mlp(GPT2)[1]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    got = hf.load_params(tmp_path, "gpt2", GPT2, jax.tree.map(lambda _: place, wanted) if on_devices else None)
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, wanted)
    assert_same_tree(got, jax.tree.map(lambda a, leaf: a.astype(leaf.dtype), expected, wanted))


def test_parameters_that_no_rule_fills_are_listed(tmp_path, monkeypatch):
    write_model(tmp_path, "bert", BERT)
    rules = [rule for rule in FAMILIES["bert"].rules if "mlp_norm" not in rule.parts[0]]
    monkeypatch.setitem(FAMILIES, "bert", dataclasses.replace(FAMILIES["bert"], rules=tuple(rules)))
    message = "no rule fills layers/mlp_norm/bias, layers/mlp_norm/scale; add one"
    with pytest.raises(ValueError, match=message):
        hf.load_params(tmp_path, "bert", BERT)
    with pytest.raises(ValueError, match=message):
        weights.save_params(draw(BERT), tmp_path / "out", "bert", BERT, np.float32)


def test_names_are_those_of_the_model_type_not_of_our_config(tmp_path, monkeypatch):
    """Another model type may share a config of ours and have a prefix and a head of its own."""
    other = dataclasses.replace(FAMILIES["bert"], prefix="other.", dropped=r"lm_head\..*")
    monkeypatch.setitem(FAMILIES, "other", other)
    tensors = write_model(tmp_path, "bert", BERT)
    expected = hf.load_params(tmp_path, "bert", BERT)
    theirs = {f"other.{name}": tensor for name, tensor in tensors.items()}
    write_tensors(tmp_path, theirs | {"lm_head.dense.weight": np.zeros((16, 16), np.float32)})
    assert_same_tree(hf.load_params(tmp_path, "other", BERT), expected)
    with pytest.raises(UserError, match="embeddings.word_embeddings.weight is missing"):
        hf.load_params(tmp_path, "bert", BERT)


@pytest.mark.parametrize(("name", "dtype"), [("bert", "bfloat16"), ("gpt2", "float16")])
def test_what_is_not_trained_survives_a_workdir(random_model, tmp_path, name, dtype):
    """Model -> small files beside checkpoints -> export in the dtype that it came in, pooler included."""
    folder = random_model(name)
    tensors = {key: tensor.astype(DTYPES[dtype]) for key, tensor in read_tensors(folder).items()}
    if name == "bert":
        rng = np.random.default_rng(0)
        tensors |= {
            "pooler.dense.weight": rng.standard_normal((64, 64)).astype(DTYPES[dtype]),
            "pooler.dense.bias": rng.standard_normal(64).astype(DTYPES[dtype]),
        }
    write_tensors(folder, tensors)
    source = open_model(folder)
    assert source.dtype == dtype
    params = hf.load_params(folder, source.model_type, source.model_config)
    copy, out = tmp_path / "workdir" / name, tmp_path / "out"
    hf.copy_small_files(source, copy)
    assert not (copy / weights.SINGLE).exists()
    shutil.rmtree(folder)
    again = open_model(copy)
    there = {"folder": source.folder, "around": source.around}
    assert dataclasses.replace(again, path="", tokenizer=None, **there) == dataclasses.replace(
        source, path="", tokenizer=None
    )
    assert again.tokenizer("some text").input_ids == source.tokenizer("some text").input_ids
    out.mkdir()
    hf.save_model(again, params, out, "source")
    assert_same_bits(read_tensors(out), tensors)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def broken_weights(case, folder):
    """A whole folder, broken in one way; returns what the message must say."""
    tensors = write_model(folder, "llama", LLAMA)
    if case == "truncated":
        data = (folder / weights.SINGLE).read_bytes()
        (folder / weights.SINGLE).write_bytes(data[: len(data) // 2])
        return "model.safetensors is not a complete safetensors file .*fetch it again"
    if case == "no header":
        (folder / weights.SINGLE).write_bytes(b"<html>not found</html>")
        return "model.safetensors is not a complete safetensors file"
    if case == "ill-fitting":
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = np.ones(17, np.float32)
        tensors["model.layers.0.mlp.router.weight"] = np.ones(3, np.float32)
        tensors["lm_head.weight"] = np.ones((53, 16), np.int32)
        write_tensors(folder, tensors)
        parts = (
            r"do not fit its config\.json: (?=.*model\.layers\.1\.mlp\.up_proj\.weight is missing)",
            r"(?=.*model\.norm\.weight is \(17,\), not \(16,\))",
            r"(?=.*model\.layers\.0\.mlp\.router\.weight is unknown)",
            r"(?=.*lm_head\.weight is I32, not one of F32, F16, BF16)",
        )
        return "".join(parts)
    if case == "another model's":
        (folder / weights.SINGLE).unlink()
        weights.save_params(draw(GPT2), folder, "gpt2", GPT2, np.float32)
        return "model.embed_tokens.weight is missing; .*; and [0-9]+ more$"
    (folder / weights.SINGLE).unlink()
    if case == "only pickle":
        (folder / "pytorch_model.bin").write_bytes(b"")
        return r"pytorch_model\.bin is refused, for it holds not an archive as PyTorch writes it .*; nothing in it was"
    if case == "none":
        return r"holds no weights; needed is model\.safetensors or model\.safetensors\.index\.json"
    weights.save_params(draw(LLAMA), folder, "llama", LLAMA, np.float32, shard_bytes=4000)
    if case == "missing shard":
        (second,) = folder.glob("model-00002-of-*")
        second.unlink()
        return f"lacks {second.name}, named in model.safetensors.index.json; fetch it again"
    if case == "outside":
        write_json(folder / weights.INDEX, {"weight_map": {"model.norm.weight": "../other.safetensors"}})
        return r"index\.json points outside of its folder, to \.\./other\.safetensors"
    write_json(folder / weights.INDEX, case)
    return "model.safetensors.index.json is not an index of safetensors files"


CASES = ["truncated", "no header", "ill-fitting", "another model's", "only pickle", "none", "missing shard", "outside"]


@pytest.mark.parametrize("case", [*CASES, "{", "[]", '{"weight_map": [1]}', '{"weight_map": {"model.norm.weight": 3}}'])
def test_broken_weights_are_told_in_one_line(tmp_path, case):
    message = broken_weights(case, tmp_path)
    with pytest.raises(UserError, match=message) as error:
        hf.load_params(tmp_path, "llama", LLAMA)
    assert "\n" not in str(error.value)


# Configs.


@every_config
def test_config_round_trip(tmp_path, model_type, config):
    problems = []
    assert configs.from_hf(configs.to_hf(config, model_type), problems) == config
    assert problems == []
    write_json(tmp_path / "config.json", configs.to_hf(config, model_type))
    assert configs.read_config(tmp_path, WHERE) == (model_type, config)


def test_every_field_of_the_configs_is_covered():
    """The round trip would not notice a field that all of its configs share."""
    for family in (BertConfig, Gpt2Config, LlamaConfig, ModernBertConfig):
        values = [vars(config) for _, config in CONFIGS.values() if type(config) is family]
        same = [name for name in values[0] if all(v[name] == values[0][name] for v in values)]
        assert same == ["computing"]


OLD_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ({"rope_scaling": None}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {"rope_type": "llama3", **OLD_LLAMA3}}, LLAMA3),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_older_rope_settings_read_alike(tmp_path, model_type, old, expected):
    theirs = configs.to_hf(CONFIGS[model_type][1], model_type)
    del theirs["rope_parameters"]
    write_json(tmp_path / "config.json", theirs | {"rope_theta": 5e5} | old)
    wanted = change(CONFIGS[model_type][1], rope_theta=5e5, rope_scaling=expected)
    assert configs.read_config(tmp_path, WHERE) == (model_type, wanted)


def test_what_configs_may_leave_out(tmp_path):
    """First Llamas have as many key-value heads as heads; GPT-2's MLP is four times as wide as the model."""
    theirs = configs.to_hf(change(LLAMA, head_dim=4), "llama")
    del theirs["num_key_value_heads"], theirs["head_dim"], theirs["rope_parameters"]
    write_json(tmp_path / "config.json", theirs)
    assert configs.read_config(tmp_path, WHERE)[1] == change(LLAMA, num_kv_heads=4, head_dim=4)
    write_json(tmp_path / "config.json", configs.to_hf(GPT2, "gpt2") | {"n_inner": None})
    assert configs.read_config(tmp_path, WHERE)[1] == change(GPT2, mlp_width=64)


def test_dropouts_may_be_written_as_whole_numbers(tmp_path):
    """JSON's 0 is read as 0.0, where `transformers` takes it; of an epsilon it does not."""
    theirs = configs.to_hf(GPT2, "gpt2")
    write_json(tmp_path / "config.json", theirs | {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0})
    found = configs.read_config(tmp_path, WHERE)[1]
    rates = {name: value for name, value in vars(found).items() if name.endswith("dropout")}
    assert len(rates) == 3 and all(type(rate) is float and rate == 0 for rate in rates.values())
    write_json(tmp_path / "config.json", theirs | {"layer_norm_epsilon": 1})
    with pytest.raises(UserError, match="layer_norm_epsilon"):
        configs.read_config(tmp_path, WHERE)


@pytest.mark.parametrize(
    ("family", "values", "named"),
    [
        (
            "bert",
            {"is_decoder": True, "position_embedding_type": "relative_key", "hidden_act": "mish"},
            ["is_decoder=True (supported: False)", "position_embedding_type='relative_key'", "hidden_act='mish'"],
        ),
        (
            "gpt2",
            {"scale_attn_weights": False, "tie_word_embeddings": False, "activation_function": "mish"},
            ["scale_attn_weights=False", "tie_word_embeddings=False", "activation_function='mish'"],
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "proportional",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "partial_rotary_factor": 0.5,
                },
                "num_key_value_heads": 3,
            },
            [
                "rope_type='proportional' (supported: default, dynamic, linear, llama3,",
                "partial_rotary_factor=0.5",
                "4 heads are not",
            ],
        ),
        ("mistral", {"hidden_act": "mish"}, ["hidden_act='mish'"]),
        (
            "qwen2-local",
            {"sliding_window": -4, "layer_types": ["sliding_attention", "chunked_attention"]},
            [
                "sliding_window=-4 (must be a whole number above 0)",
                "layer_types=['sliding_attention', 'chunked_attention']",
            ],
        ),
        ("bert", {"num_attention_heads": 3, "hidden_size": 16}, ["width 16 is not a multiple of 3 heads"]),
        ("bert", {"num_hidden_layers": 0}, ["num_layers=0 (must be a whole number above 0)"]),
    ],
)
def test_unsupported_values_are_named_all_at_once(tmp_path, family, values, named):
    model_type, config = CONFIGS[family]
    write_json(tmp_path / "config.json", configs.to_hf(config, model_type) | values)
    with pytest.raises(UserError, match="its config.json holds what is not supported: ") as error:
        configs.read_config(tmp_path, WHERE)
    assert str(error.value).startswith(WHERE)
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "t5"}, "model_type='t5' is not supported; supported are bert, roberta, xlm-roberta, mpnet,"),
        ({"model_type": "no-such-type"}, "model_type='no-such-type' is not supported; supported are bert, roberta"),
        ({"hidden_size": 8}, r"cannot be read \(.*model_type"),
        ('{"model_type": "bert",', r"cannot be read \(.*not a valid JSON file"),
        ("[]", "cannot be read"),
        ("3", "cannot be read"),
        ({"model_type": "bert", "hidden_size": "wide"}, r"cannot be read \(.*hidden_size"),
        ({"model_type": "bert", "hidden_size": 32.5}, r"cannot be read \(.*hidden_size"),
        ({"model_type": "llama", "head_dim": 7}, r"cannot be read \(.*head_dim"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, r"cannot be read \(.*factor"),
    ],
)
def test_unreadable_configs(tmp_path, content, message):
    write_json(tmp_path / "config.json", content)
    with pytest.raises(UserError, match=message) as error:
        configs.read_config(tmp_path, WHERE)
    assert "\n" not in str(error.value)


def test_no_config(tmp_path):
    with pytest.raises(UserError, match="generator.path='.*': no config.json in .*; give the folder of a Hugging Face"):
        open_model(tmp_path, "generator")


# Models as a whole.


def test_a_bert_cannot_generate(cache):
    message = "generator.path='random:bert': a bert model cannot generate; give one of type gpt2, llama, mistral, qwen2"
    with pytest.raises(UserError, match=message):
        open_model("random:bert", "generator")


def test_a_retriever_has_no_output_matrix(random_model, tmp_path):
    folder = random_model("llama")
    source = open_model(folder)
    params = hf.load_params(folder, source.model_type, source.model_config)
    assert "head" not in params and "head" in hf.load_params(
        folder, "llama", open_model(folder, "generator").model_config
    )
    out = tmp_path / "out"
    out.mkdir()
    hf.save_model(source, params, out, pooling=source.pooling)
    expected = read_tensors(folder)
    del expected["lm_head.weight"]
    assert_same_bits(read_tensors(out), expected)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaModel"]


def test_tokens_beyond_the_vocabulary(random_model):
    folder = random_model("gpt2")
    settings = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", settings | {"vocab_size": 200})
    with pytest.raises(UserError, match="its tokenizer has ids up to 256, but the model only 200 embeddings"):
        open_model(folder, "generator")


def test_a_tokenizer_that_cannot_be_read(random_model):
    folder = random_model("gpt2")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"its tokenizer cannot be read \(.*\); is tokenizer.json complete"):
        open_model(folder, "generator")


@pytest.mark.parametrize("name", tiny.MODELS)
def test_random_models_are_the_same_everywhere(tmp_path, monkeypatch, offline, name):
    files = []
    for cache in ("one", "two"):
        monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / cache))
        folder = folders.resolve(f"random:{name}", "retriever.path")
        assert tmp_path / cache in folder.parents
        assert folders.resolve(f"random:{name}", "retriever.path") == folder
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]
    source = open_model(f"random:{name}")
    params = hf.load_params(source.folder, source.model_type, source.model_config)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert source.tokenizer.decode(source.tokenizer("Grüße, 1\n").input_ids, skip_special_tokens=True) == "Grüße, 1\n"


def test_no_such_random_model(cache):
    with pytest.raises(
        UserError, match="'random:t5': there is no such random model; there are bert, gpt2, llama, qwen3"
    ):
        open_model("random:t5")


@pytest.mark.parametrize("path", ["./nowhere/x/y", "nowhere/x/y", "/nowhere/x", "../nowhere", "~/nowhere/x", "a b"])
def test_a_missing_folder_is_not_asked_of_the_hub(offline, path):
    with pytest.raises(UserError, match="retriever.path='.*': no such folder; give one, or a hub name such as BAAI/"):
        open_model(path)


def test_a_file_is_no_folder(offline, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a file; give the folder of a Hugging Face model"):
        open_model(tmp_path / "model.safetensors")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache of its own, as the hub's client lays it out: `hub(name)` is the folder of its one snapshot."""
    root = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))

    def snapshot(name, commit="0123456789abcdef0123456789abcdef01234567"):
        repository = root / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        return repository / "snapshots" / commit

    return snapshot


@pytest.mark.parametrize("name", ["someone/some.bert-small", "bert_of-old"])
def test_hub_names_are_read_from_the_hubs_cache(hub, random_model, monkeypatch, name):
    """A model that is there is not looked up again, so that a run started anew reads the same one."""
    download = huggingface_hub.snapshot_download

    def local_only(name, local_files_only=False, **kwargs):
        assert local_files_only
        return download(name, local_files_only=True, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local_only)
    shutil.copytree(random_model("bert"), snapshot := hub(name), dirs_exist_ok=True)
    source = open_model(name)
    assert source.folder == snapshot and source.path == name and source.model_config == tiny.MODELS["bert"]


def test_hub_names_that_are_not_there(hub, random_model):
    with pytest.raises(
        UserError, match="retriever.path='someone/model': no such folder, and the hub cannot be reached"
    ):
        open_model("someone/model")
    # A download that broke off before its weights is no model yet.
    shutil.copytree(random_model("bert"), snapshot := hub("someone/half"), dirs_exist_ok=True)
    (snapshot / weights.SINGLE).unlink()
    assert folders._cached("someone/half") is None
    with pytest.raises(
        UserError, match="not complete in the hub's cache: .* holds no weights; needed.* connect and run again"
    ):
        open_model("someone/half")


# Pooling.


def write_modules(folder, pooling, extra=()):
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *extra]
    modules = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{k}"} for i, (path, k) in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", pooling)


def flags(**on):
    names = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
    return {"word_embedding_dimension": 8} | {f"pooling_mode_{name}": on.get(name, False) for name in names}


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (flags(cls_token=True), "cls"),
        (flags(mean_tokens=True), "mean"),
        (flags(lasttoken=True) | {"include_prompt": True}, "last"),
        ({"embedding_dimension": 8, "pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["mean", "cls"]}, "mean+cls"),
        (flags(weightedmean_tokens=True, max_tokens=True, cls_token=True), "cls+max+weighted_mean"),
        ({"embedding_dimension": 8, "pooling_mode": "mean"}, "mean"),
        ({"embedding_dimension": 8, "pooling_mode": "lasttoken", "include_prompt": True}, "last"),
    ],
)
def test_pooling_modes_old_and_new(tmp_path, content, mode):
    write_modules(tmp_path, content, [("2_Normalize", "Normalize")])
    for default in ("mean", "last", "cls"):
        assert hf.pooling.read_pooling(tmp_path, default, WHERE) == hf.Pooling(mode)


def test_module_types_by_their_new_names(tmp_path):
    write_modules(tmp_path, {"pooling_mode": "cls"})
    text = (tmp_path / "modules.json").read_text()
    moved = text.replace(
        "sentence_transformers.models.P", "sentence_transformers.sentence_transformer.modules.pooling.P"
    )
    assert moved != text
    write_json(tmp_path / "modules.json", moved)
    assert hf.pooling.read_pooling(tmp_path, "mean", WHERE).mode == "cls"


def test_no_pooling_files_leave_the_default(tmp_path, cache):
    assert hf.pooling.read_pooling(tmp_path, "last", WHERE) == hf.Pooling("last")
    assert open_model("random:bert").pooling.mode == "mean"
    assert open_model("random:gpt2").pooling.mode == "last"


@pytest.mark.parametrize(
    ("prompts", "query", "passage"),
    [
        ({"query": "query: ", "passage": "passage: "}, "query: ", "passage: "),
        ({"query": "q: ", "document": "d: "}, "q: ", "d: "),
        ({"s2p_query": "Instruct: ", "s2s_query": "no"}, "Instruct: ", ""),
        ({"query": "", "document": "", "corpus": "c: "}, "", "c: "),
        ({}, "", ""),
        (None, "", ""),
    ],
)
def test_prompts_and_length(tmp_path, prompts, query, passage):
    write_json(tmp_path / "config_sentence_transformers.json", {"prompts": prompts})
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 77, "do_lower_case": False})
    assert hf.pooling.read_pooling(tmp_path, "mean", WHERE) == hf.Pooling("mean", query, passage, 77)


@pytest.mark.parametrize(
    ("content", "extra", "message"),
    [
        (
            {"pooling_mode": "mean"},
            [("2_CNN", "CNN")],
            r"a module CNN, which is part of the model \(supported: Transformer, Pooling, Dense, LayerN",
        ),
        ({"pooling_mode": "mean"}, [("2_Dense", "Dense")], "a module Dense with in_features=None"),
        (
            flags(mean_tokens=True) | {"pooling_mode_min_tokens": True},
            [],
            "pooling by mean and pooling_mode_min_tokens ",
        ),
        (
            {"pooling_mode": "min"},
            [],
            r"pooling by min \(supported: cls, max, mean, mean_sqrt_len_tokens, weightedmean",
        ),
        ({"pooling_mode": ["mean", 3]}, [], "pooling by mean and 3 "),
        (flags(), [], "pooling by nothing"),
        (flags(mean_tokens=True) | {"include_prompt": False}, [], r"leaves the prompt out \(include_prompt\)"),
        ({"pooling_mode": "mean"}, [("../other", "Pooling")], "points outside of the folder, to ../other/config.json"),
        ({"pooling_mode": "mean"}, [("/etc", "Pooling")], "points outside of the folder, to /etc/config.json"),
        ("{", [], r"1_Pooling/config.json cannot be read \(not a valid JSON file"),
    ],
)
def test_pooling_that_is_refused(tmp_path, content, extra, message):
    write_modules(tmp_path, content, extra)
    with pytest.raises(UserError, match=f"^{WHERE}: .*{message}"):
        hf.pooling.read_pooling(tmp_path, "mean", WHERE)


def test_several_problems_of_pooling_in_one_message(tmp_path):
    write_modules(tmp_path, {"pooling_mode": "min"}, [("2_Dense", "Dense"), ("3_LayerNorm", "LayerNorm")])
    with pytest.raises(UserError, match="by min.*module Dense.*module LayerNorm.*; give another model"):
        hf.pooling.read_pooling(tmp_path, "mean", WHERE)


@pytest.mark.parametrize("mode", [*rag.POOLING, "cls+max+last"])
def test_written_pooling_is_read_back(tmp_path, mode):
    dot = hf.Pooling(mode, similarity="dot", truncate_dim=8, lower_case=True)
    for pooling in (hf.Pooling(mode), hf.Pooling(mode, "query: ", "Grüße: ", 64), dot):
        hf.write_pooling(tmp_path, pooling, 16)
        for default in ("mean", "last"):
            assert hf.pooling.read_pooling(tmp_path, default, WHERE) == pooling


@pytest.mark.parametrize(
    ("settings", "normalises", "expected"),
    [
        ({}, False, "cosine"),
        ({"similarity_fn_name": None}, False, "cosine"),
        ({"similarity_fn_name": "dot"}, False, "dot"),
        ({"similarity_fn_name": "dot"}, True, "cosine"),  # of unit vectors it is the same
        ({"similarity_fn_name": "dot", "truncate_dim": 4}, False, "dot"),
        ({"truncate_dim": 4}, True, "cosine"),
    ],
)
def test_similarity_that_a_folder_names(tmp_path, settings, normalises, expected):
    write_modules(tmp_path, {"pooling_mode": "mean"}, [("2_Normalize", "Normalize")] if normalises else [])
    write_json(tmp_path / "config_sentence_transformers.json", settings)
    found = hf.pooling.read_pooling(tmp_path, "mean", WHERE)
    assert (found.similarity, found.truncate_dim) == (expected, settings.get("truncate_dim"))


def test_unit_vectors_that_are_cut_have_no_inner_product_of_ours(tmp_path):
    write_modules(tmp_path, {"pooling_mode": "mean"}, [("2_Normalize", "Normalize")])
    write_json(tmp_path / "config_sentence_transformers.json", {"similarity_fn_name": "dot", "truncate_dim": 4})
    with pytest.raises(UserError, match="similarity_fn_name=dot with truncate_dim, of unit vectors that are cut"):
        hf.pooling.read_pooling(tmp_path, "mean", WHERE)


@pytest.mark.parametrize("settings", [{"similarity_fn_name": "manhattan"}, {"truncate_dim": 0}, {"truncate_dim": "8"}])
def test_embeddings_that_are_not_ours(tmp_path, settings):
    write_json(tmp_path / "config_sentence_transformers.json", settings)
    ((name, value),) = settings.items()
    with pytest.raises(UserError, match=f"config_sentence_transformers.json: {name}={value!r}"):
        hf.pooling.read_pooling(tmp_path, "mean", WHERE)


# Exports as others read them.

TEXTS = ["What?", "Where is the river that was named?", "a", "Grüße aus der Küche"]


@functools.cache
def encoder(config, mode):
    graphdef = models.abstract(config)[0]
    return jax.jit(lambda params, ids, mask: rag.encode(nnx.merge(graphdef, params), ids, mask, mode))


@pytest.mark.parametrize(("name", "mode"), [("bert", "mean"), ("bert", "cls"), ("qwen3", "last")])
def test_sentence_transformers_embeds_an_export_as_we_do(cache, tmp_path, name, mode):
    pytest.importorskip("torch")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = open_model(f"random:{name}")
    params = jax.tree.map(
        lambda a, b: a + 0.1 * b,
        hf.load_params(source.folder, source.model_type, source.model_config),
        draw(source.model_config),
    )
    pooling = hf.Pooling(mode, "query: ", "passage: ", 24)
    hf.save_model(source, params, tmp_path, pooling=pooling)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert theirs.max_seq_length == 24
    for prompt_name, prefix in {"query": pooling.query_prefix, "document": pooling.passage_prefix}.items():
        tokens = [source.tokenizer(prefix + text, truncation=True, max_length=24).input_ids for text in TEXTS]
        ids, mask = np.zeros((len(TEXTS), 24), np.int32), np.zeros((len(TEXTS), 24), bool)
        for row, text in enumerate(tokens):
            ids[row, : len(text)], mask[row, : len(text)] = text, True
        ours = encoder(source.model_config, mode)(params, jnp.asarray(ids), jnp.asarray(mask))
        got = theirs.encode(TEXTS, prompt_name=prompt_name)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(got, ours, atol=1e-5)
    assert open_model(tmp_path).pooling == pooling


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers_reads_an_exported_generator_as_we_do(cache, tmp_path, name):
    torch = pytest.importorskip("torch")
    source = open_model(f"random:{name}", "generator")
    config = source.model_config
    params = jax.tree.map(
        lambda a, b: a + 0.05 * b, hf.load_params(source.folder, source.model_type, config), draw(config)
    )
    hf.save_model(source, params, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.dtype == torch.float32 and type(model).__name__ == configs.FAMILIES[name].architecture
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = np.array([tokenizer("Where is the river?").input_ids])
    assert ids.tolist() == [source.tokenizer("Where is the river?").input_ids]
    graphdef = models.abstract(config)[0]

    @jax.jit
    def logits(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(jnp.asarray(ids), jnp.ones(ids.shape, bool)))

    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    ours = np.asarray(logits(params))
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
