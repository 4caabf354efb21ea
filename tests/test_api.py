"""The Python interface: against PyTorch, numpy and the commands, on a tiny run; and what it refuses."""

import contextlib
import csv
import io
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from command import ROOT, TINY, words

import rag_jax
from rag_jax import ask, cli, config, export
from rag_jax.distributed import sharding
from rag_jax.inference import trained as api
from rag_jax.training import loop

QUESTIONS = ["How deep is the village well?", "Who owns the orchard?", "What does the harbour lamp burn?"]
ROWS = ROOT / "tests" / "data" / "rows.csv"
# At five times this rate the retriever collapses in two steps, and which passages are nearest is a matter of rounding.
CHANGES = {
    "total_steps": 2, "eval.every_steps": 2, "eval.answers": 0, "eval.rows": 8, "optimizer.learning_rate": 0.01,
    "objective.marginal_temperature": 0.05, "retriever.query_prefix": "ask: ",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_device(tmp_path_factory):
    """Programs for one of the tests' eight devices are compiled in less time; and a cache of its own."""
    make_mesh, devices, compiled = sharding.make_mesh, jax.devices()[:1], jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *_, **__: make_mesh(1, 1, 1, devices))
        patch.setenv("RAG_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(ROOT)
        yield
    jax.config.update("jax_compilation_cache_dir", compiled)


@pytest.fixture(scope="module")
def example(one_device, tmp_path_factory):
    """A folder in which the example of docs/python.md has run as it stands, on tiny models; and what it printed."""
    folder, printed = tmp_path_factory.mktemp("example"), io.StringIO()
    for name in ("rows.csv", "held_out.csv"):
        shutil.copy(ROWS, folder / name)
    (folder / "configs").mkdir()
    tiny = f"import runpy\ndef get_config():\n    config = runpy.run_path({TINY!r})['get_config']()\n"
    changes = "".join(f"    config.{name} = {value!r}\n" for name, value in CHANGES.items())
    (folder / "configs" / "minilm_smollm2.py").write_text(f"{tiny}{changes}    return config\n")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        exec(compile(code, "docs/python.md", "exec"), {})
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def workdir(example):
    return example[0] / "my_run"


@pytest.fixture(scope="module")
def passages():
    with open(ROWS, newline="", encoding="utf-8") as file:
        return list(dict.fromkeys(row["Abstract"] for row in csv.DictReader(file)))


@pytest.fixture(scope="module")
def pair(workdir, passages):
    found = rag_jax.load(workdir)
    found.use(passages)
    return found


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "export"
    export.export(config.load_workdir(workdir), workdir, out, None, "float32")
    return out


def asked(workdir, monkeypatch, capsys, *flags):
    """What the command `ask` answers."""
    monkeypatch.setattr(sys, "argv", words("ask", f"--workdir={workdir}", "--json", f"--passages={ROWS}", *flags)[2:])
    with pytest.raises(SystemExit) as end:
        cli.run(ask.main)
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return json.loads(out.splitlines()[-1])


def by_torch(folder, texts, prefix):
    """Mean-pooled, normalised embeddings by `transformers`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def embed(text):
        ids = tokenizer(prefix + text, truncation=True, max_length=64, return_tensors="pt")
        return torch.nn.functional.normalize(model(**ids).last_hidden_state[0].mean(dim=0), dim=0)

    with torch.no_grad():
        return torch.stack([embed(text) for text in texts]).numpy()


def test_importing_loads_nothing_else():
    code = "import sys, rag_jax; print([m for m in sys.modules if m.startswith(('jax', 'rag_jax.', 'numpy'))])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert rag_jax.UserError is config.UserError
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = rag_jax.nothing


@pytest.mark.slow
def test_the_example_of_the_docs_prints_what_it_says(example):
    lines = example[1].splitlines()
    assert "nats per token" in lines[-1] and float(lines[-1].split()[0]) > 0
    shares = [line.split()[:2] for line in lines if re.match(r"[\d.]+%  [\d.]+%  ", line)]
    assert len(shares) == 3
    for column in zip(*shares, strict=True):
        assert sum(float(share.rstrip("%")) for share in column) == pytest.approx(100, abs=0.2)


def test_embeddings_are_those_of_pytorch(pair, exported, passages):
    short = [text for text in passages if len(text) < 60] + ["a well", "bread"]
    for embed, texts, prefix in (
        (pair.embed_queries, [question[:24] for question in QUESTIONS], "ask: "),
        (pair.embed_passages, short, ""),
    ):
        found = embed(texts)
        assert found.dtype == np.float32 and found.shape == (len(texts), 64)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(found, by_torch(exported / "retriever", texts, prefix), atol=1e-5)
        np.testing.assert_allclose(embed(texts[1:2])[0], found[1], atol=1e-6)  # whatever stands beside it


def test_the_nearest_are_those_of_numpy(pair, passages):
    cosine = pair.embed_queries(QUESTIONS) @ pair.embed_passages(passages).T
    found = pair.retrieve(QUESTIONS, k=4)
    for row, scores in zip(found, cosine, strict=True):
        # Of passages that lie closer than rounding, either may come first.
        own = [scores[passages.index(one.passage)] for one in row]
        np.testing.assert_allclose(own, -np.sort(-scores)[:4], atol=1e-6)
        np.testing.assert_allclose([one.score for one in row], own, atol=1e-5)
        assert len({one.passage for one in row}) == 4
    assert len(pair.retrieve(QUESTIONS[:1], k=len(passages))[0]) == len(passages)
    assert len(pair.retrieve(QUESTIONS[:1])[0]) == 5


def test_answers_are_those_of_the_command(pair, workdir, tmp_path, monkeypatch, capsys):
    (tmp_path / "asked.txt").write_text("\n".join(QUESTIONS))
    record = asked(workdir, monkeypatch, capsys, f"--questions={tmp_path / 'asked.txt'}")
    for question, found, expected in zip(QUESTIONS, pair.answer(QUESTIONS), record["answers"], strict=True):
        assert expected["question"] == question
        assert (found.answer, found.num_tokens) == (expected["answer"], expected["tokens"])
        assert list(found.passages) == [row["passage"] for row in expected["passages"]]
        for ours, name in ((found.doc_probs, "probability"), (found.evidence, "evidence")):
            np.testing.assert_allclose(ours, [row[name] for row in expected["passages"]], atol=1e-4)
            assert ours.sum() == pytest.approx(1, abs=1e-5)
        assert found.log_prob == pytest.approx(expected["log_prob"], abs=1e-3)


def test_given_answers_are_scored_as_by_hand(pair, exported):
    """RAG-Token by one full sequence a (question, passage) pair through PyTorch."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    answers = ["rape oil", "nobody", "a long answer of words"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported / "generator")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported / "generator").eval()

    def token_log_probs(passage, question, answer):
        head = [tokenizer.bos_token_id, *tokenizer(passage)["input_ids"][:63]]
        head += tokenizer(f"\n\nQuestion: {question}\nAnswer:")["input_ids"]
        tail = [*tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0]
        log_probs = torch.log_softmax(logits, dim=-1)[len(head) - 1 : -1]
        return log_probs[torch.arange(len(tail)), torch.tensor(tail)].numpy()

    for question, answer, found in zip(QUESTIONS, answers, pair.score(QUESTIONS, answers), strict=True):
        (read,) = pair.retrieve([question], k=3)
        weights = np.exp(np.array([one.score for one in read]) / CHANGES["objective.marginal_temperature"])
        each = np.stack([token_log_probs(one.passage, question, answer) for one in read])
        expected = np.log(weights / weights.sum() @ np.exp(each)).sum()
        assert found.num_tokens == each.shape[1]
        assert found.log_prob == pytest.approx(expected, abs=1e-3)


def test_steps_and_exports(workdir, exported, pair, tmp_path):
    assert pair.step == rag_jax.load(workdir, step=2).step == 2
    own = rag_jax.load_config(TINY, CHANGES)
    again = rag_jax.load(exported, config=own)
    np.testing.assert_allclose(again.embed_queries(QUESTIONS), pair.embed_queries(QUESTIONS), atol=1e-6)
    again.use(list(pair.retrieve(QUESTIONS[:1], 3)[0][i].passage for i in range(3)))
    assert again.answer(QUESTIONS[:1])[0].answer == pair.answer(QUESTIONS[:1])[0].answer
    moved = shutil.copytree(exported, tmp_path / "moved")
    np.testing.assert_array_equal(rag_jax.load(moved).embed_queries(QUESTIONS), again.embed_queries(QUESTIONS))
    for ours in (ROWS, exported.parent, workdir.parent):  # it says nothing of this machine
        assert str(ours) not in (moved / "config.json").read_text()
    (moved / "config.json").unlink()
    with pytest.raises(rag_jax.UserError, match="holds no config.json; give config=, the config of its run"):
        rag_jax.load(moved)
    with pytest.raises(rag_jax.UserError, match="step=2: an export has no steps"):
        rag_jax.load(exported, step=2, config=own)
    with pytest.raises(rag_jax.UserError, match="is a run, which has a config of its own"):
        rag_jax.load(workdir, config=own)
    with pytest.raises(rag_jax.UserError, match="holds neither a run nor an export"):
        rag_jax.load(tmp_path)
    with pytest.raises(rag_jax.UserError, match="step=7: not in .*, which holds 2"):
        rag_jax.load(workdir, step=7)


MISTAKES = {
    "no question": (lambda pair: pair.retrieve([]), "questions: the list is empty; give at least one text"),
    "one text": (lambda pair: pair.answer("a question"), "questions: give a list of texts, not one text"),
    "a blank one": (lambda pair: pair.embed_queries(["a", " "]), "questions: ' ' (number 1) is not a text"),
    "a number": (lambda _: api._checked([3], "passages"), "passages: 3 (number 0) is not a text"),
    "half a character": (lambda pair: pair.embed_passages(["\ud800"]), "(number 0) is not a text"),
    "no passages": (lambda pair: pair.use([]), "passages: the list is empty"),
    "one passage as text": (lambda pair: pair.use("a passage"), "passages: give a list of texts, not one text"),
    "k above the corpus": (lambda pair: pair.retrieve(["a"], k=24), "k=24: must be from 1 to the number of passages"),
    "no k": (lambda pair: pair.retrieve(["a"], k=0), "k=0: must be from 1 to"),
    "answers missing": (lambda pair: pair.score(["a", "b"], ["c"]), "2 questions and 1 answers"),
    "an answer too long": (lambda pair: pair.score(["a"], ["b" * 99]), "more than data.answer_len=64"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(pair, case):
    call, message = MISTAKES[case]
    with pytest.raises(rag_jax.UserError) as error:
        call(pair)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_nothing_in_use_and_models_that_are_missing(pair):
    fresh = api.Trained(pair.opened, pair.params, 0)
    for call in (fresh.retrieve, fresh.answer):
        with pytest.raises(rag_jax.UserError, match=r"no passages in use; call use\(passages\) first"):
            call(QUESTIONS)
    without = {"generator.path": None, "objective.name": "none"}
    from rag_jax import pair as pairs

    alone = pairs.open_pair(rag_jax.load_config(TINY, without))
    retriever = api.Trained(alone, {"retriever": pair.params["retriever"]}, 0)
    retriever.use(["a well", "an orchard"])
    assert len(retriever.retrieve(QUESTIONS, k=2)) == 3
    for call in (retriever.answer, lambda questions: retriever.score(questions, questions)):
        with pytest.raises(rag_jax.UserError, match=r"there is no generator \(generator.path=None\)"):
            call(QUESTIONS)
    without = {"retriever.path": None, "objective.contrastive_weight": 0.0, "objective.candidates": 1}
    generator = api.Trained(pairs.open_pair(rag_jax.load_config(TINY, without)), pair.params, 0)
    for call in (generator.retrieve, generator.use, generator.embed_queries):
        with pytest.raises(rag_jax.UserError, match=r"there is no retriever \(retriever.path=None\)"):
            call(QUESTIONS)


def test_training_refuses_and_stops_as_the_command_does(tmp_path, monkeypatch):
    with pytest.raises(rag_jax.UserError, match="unknown key objective.nam"):
        rag_jax.load_config(TINY, {"objective.nam": "token"})
    with pytest.raises(rag_jax.UserError, match="data.train=None: give it a value"):
        rag_jax.train(rag_jax.load_config(TINY, {"data.train": None}), tmp_path / "run")
    changed = rag_jax.load_config(TINY)
    changed.batch_size = 7
    with pytest.raises(rag_jax.UserError, match="the group does not divide the batch"):
        rag_jax.train(changed, tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(rag_jax.UserError, match="is a file; give a folder"):
        rag_jax.train(rag_jax.load_config(TINY), tmp_path / "file")
    for number, expected in ((2, KeyboardInterrupt), (15, SystemExit)):
        monkeypatch.setattr(loop, "train", lambda *_, number=number: number)
        with pytest.raises(expected):
            rag_jax.train(rag_jax.load_config(TINY), tmp_path / "run")
