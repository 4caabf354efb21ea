"""Exported folders, read by the libraries they are for, and by ourselves."""

import json
import re

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
from command import TINY, TINY_STEPS, TINY_VALUES, run, run_here

import rag_jax
from rag_jax import config, data, export, rag
from rag_jax.data import segments
from rag_jax.errors import UserError
from rag_jax.publishing import cards


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
    for role, path in (("generator", "random:gpt2"), ("retriever", "random:bert")):
        card = (out / role / "README.md").read_text()
        assert f"| steps | {TINY_STEPS} |" in card and f"`{path}`" in card and "| trained on | 29 rows;" in card
        assert "learning rate | 0.003, linear" in card and "log sum_k p(k | q) p(y_t | k, q, y_<t)" in card
    assert "`\\n\\nQuestion: {query}\\nAnswer:`" in (out / "generator" / "README.md").read_text()
    assert "`ask: ` before questions" in (out / "retriever" / "README.md").read_text()


def test_the_heads_of_cards_are_what_the_hub_reads(exported):
    """By the hub's own reader; every metric and interval is that of the evaluation's record."""
    _, workdir, out, _ = exported
    record = json.loads((workdir / "eval" / f"step_{TINY_STEPS}.json").read_text())
    for role, pipeline in (("generator", "text-generation"), ("retriever", "sentence-similarity")):
        data = huggingface_hub.ModelCard.load(out / role / "README.md").data
        assert data.pipeline_tag == pipeline and {"rag_jax", "loss:token", "dataset_size:29"} <= set(data.tags)
        assert data.eval_results and len(data.eval_results) >= 5
        for result in data.eval_results:
            name = f"eval/{result.metric_type}"
            assert result.metric_value == record[name]
            assert result.metric_args == {"interval_95": record["intervals"][name]}
        assert data.base_model is None and data.datasets is None, "a folder and a file of this machine are no names"


def test_what_the_base_s_card_says_is_carried_over(tmp_path, monkeypatch):
    head = "license: apache-2.0\nlanguage:\n- en\n- de\nmodel-index: 3\ntags:\n- x\n"
    (tmp_path / "README.md").write_text(f"---\n{head}---\nText")
    assert cards.folders.card_facts(str(tmp_path))["license"] == "apache-2.0"
    loaded = config.load(TINY, {"data.train": "owner/rows:train[:10]", "retriever.path": "BAAI/bge-small-en-v1.5"})
    facts = cards.Facts(5, {}, {}, {}, 100)
    monkeypatch.setattr(cards.folders, "_cached", lambda name: tmp_path)
    data = huggingface_hub.ModelCard(cards.card(loaded, "retriever", facts, {"retriever": "me/mine"})).data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["en", "de"], "BAAI/bge-small-en-v1.5")
    assert (data.datasets, data.eval_results, data.base_model_relation) == (["owner/rows"], None, "finetune")
    for damaged in ("---\n- a\n---\n", "---\n: {\n---\n", "no head", "---\n!!python/object:os.system {}\n---\n"):
        (tmp_path / "README.md").write_text(damaged)
        assert cards.folders.card_facts(str(tmp_path)) == {}


def blocks(card):
    """The Python of a card but that which it says was not run."""
    found = re.finditer(r"```python\n(.*?)```", card, re.DOTALL)
    return [each[1] for each in found if "not run" not in card[: each.start()].rstrip().rsplit("\n\n", 1)[-1]]


def test_the_snippets_of_cards_run(exported, monkeypatch, capsys):
    _, workdir, out, _ = exported
    pytest.importorskip("torch")
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(out)
    with_its_own, with_transformers = blocks((out / "retriever" / "README.md").read_text())
    found = {}
    exec(compile(with_its_own, "card", "exec"), found)
    pair = rag_jax.load(out)
    question, passage = pair.embed_queries(["a question"]), pair.embed_passages(["a passage"])
    np.testing.assert_allclose(found["scores"], question @ passage.T, atol=1e-5)
    exec(compile(with_transformers, "card", "exec"), found)
    np.testing.assert_allclose(found["emb"], np.concatenate([question, passage]), atol=1e-5)
    (code,) = blocks((out / "generator" / "README.md").read_text())
    found = {}
    exec(compile(code, "card", "exec"), found)
    (passage, _), (query, _) = segments.prompt_segments(pair.opened.prompt, ["a passage"], ["a question"])
    assert found["ids"] == [*passage[0], *query[0]]
    pair.use(["a passage"])
    assert capsys.readouterr().out.rstrip("\n") == pair.answer(["a question"])[0].answer


@pytest.mark.parametrize("kind", ["byte-level", "Metaspace", "Prepend"])
def test_the_prompt_of_a_card_has_the_ids_of_training(kind, tmp_path, monkeypatch):
    """Also of tokenizers that put a blank before a text: the code of the card, with them in the model's folder."""
    loaded = config.load(TINY, {"prompt.passage": "Read: {passage}", "prompt.query": "Who? {query} So:"})
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *"▁ĠReadWho?:Sthequinaprg"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    if kind == "byte-level":
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "Metaspace":
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "generator")
    segments.reading_on(fast).save_pretrained(tmp_path / "generator" / cards.SUBFOLDER)
    card = cards.card(loaded, "generator", cards.Facts(1, {}, {}, {}, 1, reading_on=True), {"generator": "generator"})
    (code,) = blocks(card)
    lines = [line for line in code.splitlines() if not re.match("import torch|model =|found =|print", line)]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile("\n".join(lines), "card", "exec"), found)
    prompt = data.Prompt(fast, "Read: {passage}", "Who? {query} So:", " {answer}", 64, 64, 8)
    (passage, _), (query, _) = segments.prompt_segments(prompt, ["a passage"], ["a question"])
    assert found["ids"] == [*passage[0], *query[0]]
    plain = fast("Who? a question So:", add_special_tokens=False)["input_ids"]
    assert plain != query[0].tolist(), "without the second tokenizer they would differ"


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


def test_the_poolings_of_cards_are_those_of_embeddings():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    hidden, lengths = rng.normal(size=(3, 5, 4)).astype(np.float32), [5, 2, 4]
    mask = (np.arange(5) < np.array(lengths)[:, None]).astype(np.int64)[:, :, None]
    by_hand = {
        "mean": np.stack([states[:n].mean(axis=0) for states, n in zip(hidden, lengths, strict=True)]),
        "cls": hidden[:, 0],
        "last": np.stack([states[n - 1] for states, n in zip(hidden, lengths, strict=True)]),
    }
    assert cards.POOLED.keys() == by_hand.keys() <= set(rag.POOLING)
    names = {"torch": torch, "hidden": torch.tensor(hidden), "mask": torch.tensor(mask)}
    for mode, line in cards.POOLED.items():
        np.testing.assert_allclose(eval(line, names), by_hand[mode], atol=1e-6)
