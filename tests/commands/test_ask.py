"""Asking a tiny run: against PyTorch on whole strings, the record's contract, what is kept, and bad input."""

import csv
import json
import subprocess

import numpy as np
import pytest
from command import ROOT, TINY, TINY_STEPS, TINY_VALUES, call, environment, words

from rag_jax.hf import tiny
from rag_jax.inference import search

QUESTION = "How deep is the village well?"
NUM_TOKENS = 8
ASKED = {"objective__marginal_temperature": TINY_VALUES["objective__marginal_temperature"]}
UNTRAINED = ASKED | {"retriever__query_prefix": TINY_VALUES["retriever__query_prefix"]}  # the models of `trained`


@pytest.fixture(scope="module")
def cache(tiny_run):
    return tiny_run[2]


@pytest.fixture(scope="module")
def trained(tiny_run):
    return tiny_run[0]


@pytest.fixture
def said(monkeypatch, cache):
    """`said(*flags, stdin=, key=value)`: the exit code and what was printed, by the command run in this process."""

    def say(*flags, **options):
        short = [] if any(str(flag).startswith("--max-tokens") for flag in flags) else [f"--max-tokens={NUM_TOKENS}"]
        return call(None, "ask", *flags, *short, **options)

    monkeypatch.setenv("RAG_JAX_CACHE", str(cache))
    return say


@pytest.fixture
def record(said):
    """The JSON object of the last line."""

    def ask_for(*flags, **options):
        code, out, err = said(*flags, "--json", **options)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    return ask_for


def passages_of_rows():
    with open(ROOT / "tests" / "data" / "rows.csv", newline="", encoding="utf-8") as file:
        return list(dict.fromkeys(row["Abstract"] for row in csv.DictReader(file)))


def check_shares(passages):
    for name in ("probability", "evidence"):
        assert sum(row[name] for row in passages) == pytest.approx(1, abs=1e-5)
        assert all(0 <= row[name] <= 1 for row in passages)
    cosines = [row["cosine"] for row in passages]
    assert cosines == sorted(cosines, reverse=True)


def by_torch(folders, lengths, num_tokens):
    """Answer, likelihood and passages from whole strings: no cache, no shared prefix, no code of ours."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    passage_len, prompt_passage_len = lengths
    bert, gpt2 = (transformers.AutoTokenizer.from_pretrained(folders[name]) for name in ("bert", "gpt2"))
    encoder = transformers.AutoModel.from_pretrained(folders["bert"]).eval()
    generator = transformers.AutoModelForCausalLM.from_pretrained(folders["gpt2"]).eval()

    def embed(text):
        hidden = encoder(torch.tensor([bert(text)["input_ids"][: passage_len - 1] + [bert.sep_token_id]]))
        return torch.nn.functional.normalize(hidden.last_hidden_state[0].mean(dim=0), dim=0)

    with torch.no_grad():
        passages = passages_of_rows()
        question = encoder(torch.tensor([bert(QUESTION)["input_ids"]])).last_hidden_state[0].mean(dim=0)
        cosine = torch.stack([embed(p) for p in passages]) @ torch.nn.functional.normalize(question, dim=0)
        cosine, top = torch.topk(cosine, 3)
        prior = torch.softmax(cosine / ASKED["objective__marginal_temperature"], dim=0)
        heads = [gpt2(passages[i])["input_ids"][: prompt_passage_len - 1] for i in top]
        tail = gpt2(f"\n\nQuestion: {QUESTION}\nAnswer:")["input_ids"]
        answer, shares, log_prob = [], [], 0.0
        while len(answer) < num_tokens and gpt2.eos_token_id not in answer:
            strings = [torch.tensor([[gpt2.bos_token_id, *head, *tail, *answer]]) for head in heads]
            joint = prior[:, None] * torch.stack([torch.softmax(generator(s).logits[0, -1], -1) for s in strings])
            answer.append(int(joint.sum(dim=0).argmax()))
            total = joint[:, answer[-1]].sum()
            shares.append(joint[:, answer[-1]] / total)
            log_prob += float(total.log())
    evidence = torch.stack(shares).mean(dim=0).tolist()
    text = gpt2.decode(answer, skip_special_tokens=True).strip()
    return text, log_prob, [passages[i] for i in top], cosine.tolist(), prior.tolist(), evidence


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_an_answer_is_that_of_whole_strings_in_pytorch(record, tmp_path, devices):
    folders = {name: tmp_path / name for name in ("bert", "gpt2")}
    for name, folder in folders.items():
        folder.mkdir()
        tiny.build(name, folder)
    models = {"retriever__path": folders["bert"], "generator__path": folders["gpt2"]}
    found = record(f"--config={TINY}", QUESTION, **models, **ASKED, devices=devices)
    text, log_prob, passages, cosine, prior, evidence = by_torch(folders, (64, 64), NUM_TOKENS)
    rows = found["passages"]
    assert (found["question"], found["answer"], found["step"]) == (QUESTION, text, 0)
    assert [row["passage"] for row in rows] == passages
    assert found["log_prob"] == pytest.approx(log_prob, abs=1e-3)
    for name, expected in (("cosine", cosine), ("probability", prior), ("evidence", evidence)):
        np.testing.assert_allclose([row[name] for row in rows], expected, atol=1e-4)
    assert max(evidence) - min(evidence) > 1e-3 and max(abs(np.subtract(evidence, prior))) > 1e-4


def test_the_record_of_a_run(record, trained):
    for decoding in ("token", "sequence", "top1"):
        found = record(f"--workdir={trained}", f"--decoding={decoding}", QUESTION)
        assert {"question", "answer", "log_prob", "tokens", "passages", "step", "decoding", "counts"} <= found.keys()
        assert (found["step"], found["decoding"]["name"]) == (TINY_STEPS, decoding)
        assert found["counts"] == {"passages": 23, "candidates": 1 if decoding == "top1" else 3}
        assert len(found["passages"]) == found["counts"]["candidates"]
        check_shares(found["passages"])
        assert found["log_prob"] < 0 < found["tokens"] <= NUM_TOKENS


def test_a_second_start_embeds_nothing_and_other_weights_do(record, said, trained, monkeypatch, tmp_path):
    embedded = []

    def embed(*args, label, **options):
        embedded.extend([label] if label == "passages" else [])
        return original(*args, label=label, **options)

    original = search.embed
    monkeypatch.setattr(search, "embed", embed)
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path))
    first, second = (said(f"--workdir={trained}", QUESTION) for _ in range(2))
    assert len(embedded) == 1
    assert "23 passages embedded in" in first[1] and "embedded in" not in second[1]
    assert second[1] == first[1].split("\n", 1)[1]
    said(f"--config={TINY}", QUESTION, **UNTRAINED)
    assert len(embedded) == 2, "another retriever"
    said(f"--workdir={trained}", QUESTION, data__passage_len=48)
    assert len(embedded) == 3, "read to another length"
    before = record(f"--workdir={trained}", QUESTION)
    (damaged,) = [path for path in tmp_path.glob("*.npz") if path.stat().st_mtime_ns == max(
        p.stat().st_mtime_ns for p in tmp_path.glob("*.npz"))]  # fmt: skip
    damaged.write_bytes(damaged.read_bytes()[:-30])
    said(f"--workdir={trained}", QUESTION, data__passage_len=48)
    assert len(embedded) == 4, "a damaged file is made again"
    assert record(f"--workdir={trained}", QUESTION) == before


def test_lines_of_a_pipe_are_questions(said, record, trained):
    code, out, err = said(f"--workdir={trained}", stdin=f"{QUESTION}\n\n   \nWho owns the orchard?\n")
    assert (code, err) == (0, "")
    assert out.count("p(k|q)") == 2 and f"> {QUESTION}\n" in out and "> Who owns the orchard?\n" in out
    found = record(f"--workdir={trained}", stdin=f"{QUESTION}\nWho owns the orchard?")
    assert [row["question"] for row in found["answers"]] == [QUESTION, "Who owns the orchard?"]
    alone = record(f"--workdir={trained}", QUESTION)
    assert found["answers"][0] == {name: alone[name] for name in found["answers"][0]}


@pytest.mark.slow
def test_a_real_pipe(cache, trained):
    process = subprocess.run(
        words("ask", f"--workdir={trained}", "--json", f"--max-tokens={NUM_TOKENS}"),
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        input=f"{QUESTION}\n",
    )
    assert process.returncode == 0, process.stderr
    assert len(json.loads(process.stdout.splitlines()[-1])["answers"]) == 1
    assert "Warning" not in process.stderr and "Traceback" not in process.stderr


def test_files_of_questions_and_batches(record, trained, tmp_path):
    questions = [QUESTION, "Who owns the orchard?", QUESTION]
    (tmp_path / "asked.txt").write_text("\n".join(["", *questions, " "]))
    (tmp_path / "asked.csv").write_text("\n".join(["Question,Other", *(f"{q},x" for q in questions)]))
    hot = ["--temperature=1.5", "--seed=3"]
    lines = record(f"--workdir={trained}", f"--questions={tmp_path / 'asked.txt'}", *hot)["answers"]
    rows = record(f"--workdir={trained}", f"--questions={tmp_path / 'asked.csv'}", *hot)["answers"]
    assert lines == rows and [row["question"] for row in lines] == questions
    assert lines[0] == lines[2]
    alone = record(f"--workdir={trained}", QUESTION, *hot)
    assert lines[0]["answer"] == alone["answer"]
    assert lines[0]["log_prob"] == pytest.approx(alone["log_prob"], abs=1e-3)
    assert record(f"--workdir={trained}", QUESTION, hot[0])["answer"] != alone["answer"], "another seed"


def test_untrained_and_trained_side_by_side(said, record, trained):
    found = record(f"--workdir={trained}", "--compare", QUESTION)
    trained_alone = record(f"--workdir={trained}", QUESTION)
    untrained_alone = record(f"--config={TINY}", QUESTION, **UNTRAINED)
    for name, alone in (("untrained", untrained_alone), ("trained", trained_alone)):
        assert found[name] == {key: alone[key] for key in found[name]}
        check_shares(found[name]["passages"])
    assert found["untrained"]["passages"] != found["trained"]["passages"]
    _, out, _ = said(f"--workdir={trained}", "--compare", QUESTION)
    (head,) = [line for line in out.splitlines() if "untrained" in line]
    assert head.split() == ["untrained", "|", "trained"]
    assert any(line.count("passage") == 2 for line in out.splitlines())


def test_passages_of_a_file_and_more_candidates_than_there_are(said, record, trained, tmp_path):
    (tmp_path / "mine.csv").write_text("Abstract\nthe well is dry\nthe moon is far\nthe well is dry\n")
    flags = f"--workdir={trained}", f"--passages={tmp_path / 'mine.csv'}", "--candidates=5"
    found = record(*flags, QUESTION)
    assert {row["passage"] for row in found["passages"]} == {"the well is dry", "the moon is far"}
    assert found["counts"] == {"passages": 2, "candidates": 2}
    assert "K = 5 is cut to the 2 passages there are" in said(*flags, QUESTION)[1]


BAD = {
    "an empty question": ([" "], ["the question is empty; ask something"]),
    "no question": ([], ["no question: give one, --questions=FILE, or lines on stdin"]),
    "missing passages": (["--passages=none.csv", "q"], ["--passages='none.csv': no such file or folder"]),
    "passages of another column": (["--passages=README.md", "q"], ["--passages='README.md' is of an unknown kind"]),
    "missing questions": (["--questions=none.txt"], ["--questions=none.txt: no such file"]),
    "two kinds of questions": (["--questions=none.txt", "q"], ["either a question or --questions=FILE, not both"]),
    "a step that is not there": (["--step=7", "q"], ["--step=7: not in", f"which holds 5, {TINY_STEPS}"]),
    "no candidates": (["--candidates=0", "q"], ["--candidates=0: must be at least 1"]),
    "half a candidate": (["--candidates=1.5", "q"], ["argument --candidates: invalid int value: '1.5'"]),
    "no beam": (["--beams=0", "q"], ["--beams=0: must be at least 1"]),
    "cold": (["--temperature=-1", "q"], ["--temperature=-1.0: must be a number from 0 on"]),
    "no heat": (["--temperature=nan", "q"], ["--temperature=nan: must be a number from 0 on"]),
    "too much of the nucleus": (
        ["--temperature=1", "--top-p=1.5", "q"],
        ["--top-p=1.5: must be above 0 and at most 1"],
    ),
    "a nucleus without heat": (["--top-p=0.5", "q"], ["--top-p=0.5: goes with --temperature above 0"]),
    "sampled beams": (["--beams=2", "--temperature=1", "q"], ["beams are not sampled; give one of them"]),
    "an unknown decoding": (["--decoding=best", "q"], ["argument --decoding: invalid choice: 'best'"]),
    "more tokens than positions": (
        ["--max-tokens=500", "q"],
        ["--max-tokens=500: behind a prompt of 128 tokens", "384"],
    ),
    "a workdir and a config": ([f"--config={TINY}", "q"], ["give either --workdir=DIR (a run) or --config=FILE.py"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(said, trained, case):
    flags, parts = BAD[case]
    code, _, err = said(f"--workdir={trained}", *flags)
    assert code == 2 and err.startswith("rag_jax: error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_what_takes_a_run_or_both_models(said, tmp_path):
    for flags, message in (
        (
            [f"--config={TINY}", "--compare", "q"],
            "--compare: goes with --workdir; the models of --config are untrained",
        ),
        ([f"--config={TINY}", "--step=3", "q"], "--step=3: goes with --workdir"),
        (["q"], "give either --workdir=DIR"),
        ([f"--workdir={tmp_path}", "q"], "no config.json there; give the folder of a run"),
    ):
        code, _, err = said(*flags)
        assert code == 2 and message in err
    without = {"generator__path": None, "objective__name": "none"}
    code, _, err = said(f"--config={TINY}", "q", **without)
    assert code == 2 and "generator.path=None: asking takes a retriever and a generator" in err
    nothing = {"data__train": None, "data__eval": None}
    code, _, err = said(f"--config={TINY}", "q", **nothing)
    assert code == 2 and "there are no passages: --passages=FILE is not given" in err
    (tmp_path / "empty.txt").write_text("\n \n")
    code, _, err = said(f"--config={TINY}", f"--questions={tmp_path / 'empty.txt'}")
    assert code == 2 and "holds no question" in err
