"""Exported folders, read by the libraries they are for, and by ourselves."""

import json

import numpy as np
import pytest
import safetensors.numpy
from command import TINY, TINY_STEPS, TINY_VALUES, run, run_here

from rag_jax import export
from rag_jax.errors import UserError


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    workdir, _, cache = tiny_run
    out = tmp_path_factory.mktemp("out") / "deep" / "export"
    printed = run_here(cache, "export", f"--workdir={workdir}", f"--out={out}")
    return cache, workdir, out, printed


@pytest.mark.slow
def test_it_evaluates_as_the_checkpoint_does(exported):
    cache, workdir, out, printed = exported
    names = ", ".join(str(out / name) for name in ("config.json", "generator", "retriever"))
    assert printed == f"step {TINY_STEPS} of {workdir}: {names}\n"
    there_too = {"objective__marginal_temperature": TINY_VALUES["objective__marginal_temperature"]}
    content = run(cache, "evaluate", f"--config={TINY}", f"--models={out}", "--json", **there_too)
    here = json.loads(content.splitlines()[-1])
    there = json.loads((workdir / "eval" / f"step_{TINY_STEPS}.json").read_text())
    assert here.pop("step") == 0 and there.pop("step") == TINY_STEPS
    assert here == there  # to the last bit, the prefix being read from the folder


def test_it_loads_where_it_should(exported):
    _, _, out, _ = exported
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(out / "generator", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "generator")
    assert model.generate(**tokenizer("a b", return_tensors="pt"), max_new_tokens=2).shape == (1, 5)
    plain = transformers.AutoModel.from_pretrained(out / "retriever")
    embedder = sentence_transformers.SentenceTransformer(str(out / "retriever"), device="cpu")
    assert embedder.max_seq_length == 64
    embedded = embedder.encode(["hello"], prompt_name="query")
    inputs = transformers.AutoTokenizer.from_pretrained(out / "retriever")("ask: hello", return_tensors="pt")
    with torch.no_grad():
        mean = plain(**inputs).last_hidden_state.mean(1)
    np.testing.assert_allclose(embedded, torch.nn.functional.normalize(mean).numpy(), atol=1e-6)


def test_cards_are_plain_text_about_the_run(exported):
    _, _, out, _ = exported
    card = (out / "generator" / "README.md").read_text()
    assert (
        f"Trained for {TINY_STEPS} steps" in card
        and "`random:gpt2`" in card
        and "`\\n\\nQuestion: {query}\\nAnswer:`" in card
    )
    assert "learning rate | 0.003, linear" in (out / "retriever" / "README.md").read_text()


def test_dtype_and_step(exported, tmp_path):
    cache, workdir, out, _ = exported
    half = tmp_path / "half"
    half.mkdir()  # empty, so it may be there
    run_here(cache, "export", f"--workdir={workdir}", f"--out={half}", "--step=best", "--dtype=bfloat16")
    full = safetensors.numpy.load_file(out / "generator" / "model.safetensors")
    short = safetensors.numpy.load_file(half / "generator" / "model.safetensors")
    assert full.keys() == short.keys()
    for name in full:
        assert short[name].dtype.name == "bfloat16"
        np.testing.assert_array_equal(short[name], full[name].astype(short[name].dtype))
    assert json.loads((half / "generator" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_failed_export_leaves_nothing(exported, tmp_path, monkeypatch):
    cache, workdir, _, _ = exported
    monkeypatch.setenv("RAG_JAX_CACHE", str(cache))
    from rag_jax import config, hf

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(hf.weights, "_write", broken)
    with pytest.raises(UserError, match=r"--out=.*/out: cannot be written \(disk full\); nothing of it is left there"):
        export.export(config.load_workdir(workdir), workdir, tmp_path / "out", None, "float32")
    assert not list(tmp_path.iterdir())
