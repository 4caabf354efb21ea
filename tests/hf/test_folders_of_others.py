"""Folders as people have them, read to the values that sentence-transformers gives, and exported to the same."""

import collections
import io
import json
import pathlib
import pickle
import random
import zipfile

import command
import numpy as np
import pytest
import safetensors.numpy

from rag_jax import config, data, hf, pair
from rag_jax.errors import UserError
from rag_jax.hf import torch_file, weights
from rag_jax.inference import search

TEXTS = ["What is a Red Fox?", "short", "The Quick brown fox"]
VALUES = {"generator.path": "None", "objective.name": "none", "eval.answers": 0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))
    found = hf.open_model("random:bert", "retriever.path", "retriever").folder
    made = tmp_path / "model"
    made.mkdir()
    for path in found.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    return made


def write(folder, name, content):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def with_modules(folder, *more, similarity=None, **settings):
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *more]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    write(folder, "modules.json", modules)
    write(folder, "1_Pooling/config.json", {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True})
    for path, _ in more:
        (folder / path).mkdir()
    write(folder, "config_sentence_transformers.json", {"similarity_fn_name": similarity, **settings})


def embedded(folder, **values):
    """The pair and embeddings of TEXTS, by the texts' own lengths."""
    loaded = config.load("configs/tiny.py", VALUES | {"retriever.path": str(folder)} | values)
    opened = pair.open_pair(loaded)
    assert opened.retriever_text is not None
    tokens, _ = data.retriever_tokens(opened.retriever_text.tokenizer, TEXTS, "", 64)
    params = pair.pretrained_params(opened)
    return opened, params, search.embed(opened.model, params, tokens, batch_size=4, label="texts")


def lower_cased(folder):
    with_modules(folder, ("2_Normalize", "Normalize"))
    write(folder, "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": True})
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = None  # reads cases as they are
    write(folder, "tokenizer.json", content)


def dot(folder):
    with_modules(folder, similarity="dot")


def truncated(folder):
    with_modules(folder, ("2_Normalize", "Normalize"), truncate_dim=16)


def old_layout(folder):
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(inner / path.name)
    with_modules(folder)
    modules = json.loads((folder / "modules.json").read_text())
    write(folder, "modules.json", [modules[0] | {"path": "0_Transformer"}, *modules[1:]])


def saved(folder, pooling, *more):
    """Saved there by sentence-transformers itself, the parameters of what stands behind the pooling drawn."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    torch, st_models = pytest.importorskip("torch"), pytest.importorskip("sentence_transformers.models")
    modules = [st_models.Transformer(str(folder)), st_models.Pooling(64, pooling_mode=pooling)]
    modules += [kind(*args, **kwargs) for kind, args, kwargs in more]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in modules[2:]:
            for parameter in module.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    sentence_transformers.SentenceTransformer(modules=modules, device="cpu").save(str(folder))


def projected(folder):
    torch, st_models = pytest.importorskip("torch"), pytest.importorskip("sentence_transformers.models")
    identity = torch.nn.Identity()
    saved(
        folder, "mean", (st_models.Dense, (64, 96), {}), (st_models.LayerNorm, (96,), {}),
        (st_models.Normalize, (), {}), (st_models.Dense, (96, 48), {"bias": False, "activation_function": identity}),
        (st_models.Normalize, (), {}),
    )  # fmt: skip


def projected_dot(folder):
    st_models = pytest.importorskip("sentence_transformers.models")
    saved(folder, ["cls", "mean"], (st_models.Dense, (128, 32), {}))
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    write(folder, "config_sentence_transformers.json", settings | {"similarity_fn_name": "dot"})


def by_weighted_mean(folder):
    saved(folder, "weightedmean")


def by_three(folder):
    saved(folder, ["max", "mean_sqrt_len_tokens", "lasttoken"])


MAKES = [lower_cased, dot, truncated, old_layout, projected, projected_dot, by_weighted_mean, by_three]
WIDTHS = {truncated: 16, projected: 48, projected_dot: 32, by_three: 192}


@pytest.mark.parametrize("make", MAKES)
def test_embeddings_are_those_of_sentence_transformers_before_and_after_an_export(folder, tmp_path, make):
    pytest.importorskip("torch")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    make(folder)
    opened, params, ours = embedded(folder)
    source = opened.sources["retriever"]
    out = tmp_path / "out"
    out.mkdir()
    hf.save_model(source, params["retriever"], out, pooling=pair.pooling(opened.config, source))
    for read in (folder, out):
        theirs = sentence_transformers.SentenceTransformer(str(read), device="cpu")
        got = theirs.encode(TEXTS)
        if opened.model.similarity == "cosine":
            got = got / np.linalg.norm(got, axis=1, keepdims=True)
        np.testing.assert_allclose(ours, got, atol=1e-5 if make is projected_dot else 2e-6)
    is_dot = make in (dot, projected_dot)
    assert theirs.similarity_fn_name == opened.model.similarity == ("dot" if is_dot else "cosine")
    assert ours.shape[1] == WIDTHS.get(make, 64)
    copied = tmp_path / "copied"
    hf.copy_small_files(source, copied)  # what a workdir keeps says the same
    again = hf.read_pooling(copied, "cls", "x")
    assert again == source.pooling


def test_what_stands_behind_the_pooling_is_trained_kept_and_exported(folder, tmp_path):
    """By a run: its gradient moves it, a checkpoint and an export hold it, and an adapter leaves it as it was."""
    pytest.importorskip("torch")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    projected(folder)
    before = safetensors.numpy.load_file(folder / "2_Dense" / "model.safetensors")
    kept = VALUES | {"retriever.path": str(folder), "total_steps": 2, "checkpoint.every_steps": 2}
    for name, more in {"whole": {}, "adapter": {"retriever.lora.rank": 2}}.items():
        values = {key.replace(".", "__"): value for key, value in (kept | more).items()}
        run, out = tmp_path / name, tmp_path / f"{name}_out"
        trained = command.call(tmp_path / "cache", "main", f"--config={command.TINY}", f"--workdir={run}", **values)
        assert trained[0] == 0, trained[2]
        exported = command.call(tmp_path / "cache", "export", f"--workdir={run}", f"--out={out}")
        assert exported[0] == 0, exported[2]
        after = safetensors.numpy.load_file(out / "retriever" / "2_Dense" / "model.safetensors")
        moved = [np.abs(after[key] - before[key]).max() for key in before]
        assert (min(moved) > 0) if name == "whole" else (max(moved) == 0)
        _, _, ours = embedded(out / "retriever")
        theirs = sentence_transformers.SentenceTransformer(str(out / "retriever"), device="cpu").encode(TEXTS)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"linear.weight": np.zeros((96, 32), np.float32)}, r"linear.weight is \(32, 96\), not \(64, 96\)"),
        ({"linear.weight": None}, "linear.weight is missing"),
        ({"linear.bias": np.full(96, np.nan, np.float32)}, "linear.bias holds NaN or infinity"),
    ],
)
def test_a_broken_module_behind_the_pooling_is_named(folder, damage, message):
    projected(folder)
    path = folder / "2_Dense" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path) | damage
    safetensors.numpy.save_file({name: a for name, a in tensors.items() if a is not None}, path)
    with pytest.raises(UserError, match=f"2_Dense: {message}"):
        embedded(folder)


def test_modules_that_do_not_fit_together_are_named(folder):
    projected(folder)
    settings = json.loads((folder / "5_Dense" / "config.json").read_text())
    write(folder, "5_Dense/config.json", settings | {"in_features": 32})
    with pytest.raises(UserError, match="retriever.path=.* has a module Dense of 32 channels behind 96"):
        embedded(folder)


def test_leading_widths_must_be_below_the_whole_width(folder):
    with pytest.raises(UserError, match=r"retriever.matryoshka_dims=\(64, 16\): an embedding has 64 channels"):
        embedded(folder, **{"retriever.matryoshka_dims": "(64, 16)"})
    assert embedded(folder, **{"retriever.matryoshka_dims": "(32, 16)"})[0].model.matryoshka_dims == (32, 16)


def test_the_config_has_the_last_word_on_embeddings(folder):
    with_modules(folder, ("2_Normalize", "Normalize"), truncate_dim=16)
    opened, _, emb = embedded(folder, **{"retriever.truncate_dim": 8, "retriever.similarity": "dot"})
    assert (opened.model.similarity, emb.shape[1]) == ("dot", 8)
    assert not np.allclose(np.linalg.norm(emb, axis=1), 1.0)
    with pytest.raises(UserError, match=r"retriever.truncate_dim=65: .* has 64 channels; give fewer"):
        embedded(folder, **{"retriever.truncate_dim": 65})


def test_encoders_of_decoder_families_see_both_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("torch")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    found, made = hf.open_model("random:qwen3", "retriever.path", "retriever").folder, tmp_path / "model"
    made.mkdir()
    for path in found.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    causal = embedded(made)[2]
    write(made, "config.json", json.loads((made / "config.json").read_text()) | {"is_causal": False})
    both_ways = embedded(made, **{"retriever.pooling": "mean"})[2]
    assert np.abs(both_ways - causal).max() > 0.01
    with_modules(made)
    reader = sentence_transformers.SentenceTransformer(str(made), device="cpu")
    reader.tokenizer.pad_token = reader.tokenizer.eos_token
    theirs = reader.encode(TEXTS)
    np.testing.assert_allclose(both_ways, theirs / np.linalg.norm(theirs, axis=1, keepdims=True), atol=2e-6)
    with pytest.raises(UserError, match="is_causal=false: it was made an encoder, which cannot generate"):
        hf.open_model(str(made), "generator.path", "generator")


def test_an_export_forgets_what_is_no_longer_true(folder, tmp_path):
    content = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", content | {"quantization_config": {"load_in_4bit": True}, "pad_token_id": 10**6})
    opened, params, _ = embedded(folder)
    out = tmp_path / "out"
    out.mkdir()
    hf.save_model(opened.sources["retriever"], params["retriever"], out)
    written = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["pad_token_id"] is None


def test_an_added_token_without_an_embedding_is_read_as_text(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))
    found, made = hf.open_model("random:llama", "generator.path", "generator"), tmp_path / "model"
    made.mkdir()
    for path in found.folder.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    content = json.loads((made / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    beyond = {"id": found.model_config.vocab_size, "content": "<more>", "special": True, **flags}
    write(made, "tokenizer.json", content | {"added_tokens": [*content["added_tokens"], beyond]})
    source = hf.open_model(str(made), "generator.path", "generator")
    text = "one <more> two"
    assert source.tokenizer(text).input_ids == found.tokenizer(text).input_ids
    assert source.tokenizer.eos_token_id == found.tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs_are_told(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer, not the file itself; fetch it with `git lfs p"):
        hf.open_model(str(folder), "retriever.path", "retriever")


def test_an_adapter_that_names_no_base_is_refused(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(UserError, match="its adapter_config.json names no base_model_name_or_path; give the base"):
        hf.open_model(str(folder), "retriever.path", "retriever")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    with pytest.raises(UserError, match="is an adapter too; merge that into its own base"):
        hf.open_model(str(folder), "retriever.path", "retriever")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder / "no")}))
    with pytest.raises(UserError, match="no such folder"):
        hf.open_model(str(folder), "retriever.path", "retriever")


# pytorch_model.bin.


def as_torch_file(folder):
    torch = pytest.importorskip("torch")
    import safetensors.torch

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("query.weight"))
    tensors[name] = tensors[name].t().contiguous().t()  # lies the other way
    torch.save(collections.OrderedDict(tensors), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return tensors


def test_weights_of_pytorch_are_read_as_they_are(folder):
    before = embedded(folder)[2]
    tensors = as_torch_file(folder)
    with torch_file.opened(folder / "pytorch_model.bin") as file:
        assert sorted(file.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor.numpy())
            assert file.get_slice(name).get_shape() == list(tensor.shape)
    np.testing.assert_array_equal(embedded(folder)[2], before)


def test_shards_of_pytorch(folder):
    torch = pytest.importorskip("torch")
    before, tensors = embedded(folder)[2], as_torch_file(folder)
    names = sorted(tensors)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, some in parts.items():
        torch.save({name: tensors[name] for name in some}, folder / file)
    (folder / "pytorch_model.bin").unlink()
    write(folder, weights.TORCH_INDEX, {"weight_map": {name: file for file, some in parts.items() for name in some}})
    np.testing.assert_array_equal(embedded(folder)[2], before)


class Payload:
    def __reduce__(self):
        return pathlib.Path("/tmp/rag_jax_was_here").touch, ()


def archive(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("m/data.pkl", content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(pickle.dumps({"a": Payload()})), "the pickle operation|a call of"),
        (archive(pickle.dumps({"a": 1})), "something else than names and tensors"),
        (archive(b"cos\nsystem\n(S'touch /tmp/rag_jax_was_here'\ntR."), "the pickle operation"),
        (archive(b"cos\nsystem\n)R."), "a call of 'os system'"),
        (archive(pickle.dumps({1: "a"})), "a damaged pickle"),
        (archive(b""), "a damaged pickle"),
        (pickle.dumps({"a": Payload()}), "not an archive"),
    ],
)
def test_a_pickle_runs_nothing(folder, content, message):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=f"_model.bin is refused, for it holds ({message}).*; nothing in it was run"):
        hf.open_model(str(folder), "retriever.path", "retriever")
    assert not pathlib.Path("/tmp/rag_jax_was_here").exists()


def test_damaged_files_of_pytorch_are_refused_or_read(folder):
    """Any byte may be another one: a line that says so, or tensors of the same shapes."""
    as_torch_file(folder)
    path, draw = folder / "pytorch_model.bin", random.Random(0)
    whole = path.read_bytes()
    begin = whole.index(b"data.pkl")
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            anywhere = draw.choice([begin + draw.randrange(3000), draw.randrange(len(content))])
            content[anywhere] = draw.randrange(256)
        path.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        try:
            weights.file_dtype(folder, "bert", hf.open_config(str(folder), "x", "retriever").model_config)
        except UserError:
            refused += 1
    assert refused > 200
