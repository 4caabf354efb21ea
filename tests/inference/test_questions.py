"""Questions that a generator writes from passages: how they are asked for and read, and which of them hold."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from command import call

from rag_jax import config, pair
from rag_jax.data import rows as row_files
from rag_jax.distributed import sharding
from rag_jax.documents import build
from rag_jax.errors import UserError
from rag_jax.inference import decoding, questions
from rag_jax.inference.questions import Question, Writing
from rag_jax.inference.trained import Trained

PASSAGES = [f"the mill of number {i} stands at river {i * 7} and grinds <|end|> corn" for i in range(11)]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        opened = pair.open_pair(config.load("configs/tiny.py", {"eval.batch_size": 16}))
        yield Trained(opened, pair.pretrained_params(opened, sharding.make_mesh(1, 1, 1, jax.devices()[:1])), 0)


@pytest.mark.parametrize(
    ("text", "question", "answer"),
    [
        ("What does the mill grind?\nAnswer: Corn.", "What does the mill grind?", "Corn."),
        ("Question: What  does it grind?\n\nShort answer:  corn \nQuestion: And who?", "What does it grind?", "corn"),
        ("Why does it stand there? ANSWER: The river", "Why does it stand there?", "The river"),
        ("Why does it stand there?\nAnswer: Answer: the river", "Why does it stand there?", "the river"),
        ("Why does it stand there?", None, None),
        ("Why does it stand there?\nAnswer: ...", None, None),
        ("Why does it stand there?\nAnswer: [somebody who has not read it]", None, None),
        ("Why does it stand there?\nAnswer:", None, None),
        ("Why does it stand there?\nAnswer: Why does it stand there?", None, None),
        ("The mill stands there.\nAnswer: yes", None, None),
        ("Why though?\nAnswer: it is so", None, None),  # of too few words
        ("", None, None),
    ],
)
def test_what_is_written_is_read(text, question, answer):
    found = questions.parsed(3, "Why", text)
    assert found.passage == 3 and found.opening == "Why"
    if question is None:
        assert found.dropped == "not of the form"
    else:
        assert (found.question, found.answer, found.dropped) == (question, answer, "")


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_passage_stands_in_the_instruction_and_that_in_the_chat_template(trained, template, monkeypatch):
    prompt = trained.opened.prompt
    monkeypatch.setattr(prompt.tokenizer, "chat_template", template)
    made = questions.writing_prompt(
        trained, Writing(1, instruction="Read {{this}}: {passage} Ask!", openings=("Why", "Who"))
    )
    whole = made.passage.format(passage="A MILL") + made.query.format(query="Why")
    asked = "Read {{this}}: A MILL Ask!"
    assert whole == (f"{asked}\n\nQuestion: Why" if template is None else f"<user>{asked}</><a>Question: Why")
    assert made.passage_len > prompt.passage_len or template is None
    free = questions.writing_prompt(trained, Writing(1, instruction="{passage}", openings=("",)))
    assert "Question:" not in free.query
    with pytest.raises(UserError, match=r"must hold \{passage\} once"):
        questions.writing_prompt(trained, Writing(1, instruction="Ask!"))
    with pytest.raises(UserError, match="more than the 512 positions"):
        questions.writing_prompt(trained, Writing(1, instruction="{passage}" + " on and on" * 99))


def test_questions_are_a_function_of_seed_text_and_place_and_are_kept(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "BLOCKS", 1)
    monkeypatch.setattr(questions, "parsed", lambda passage, opening, text: Question(passage, opening, text))
    writing = Writing(2, "{passage} Ask!", seed=3, openings=("What", "Why", "Who"))
    found = questions.write(trained, PASSAGES, writing, tmp_path / "one")
    assert [one.passage for one in found] == np.repeat(np.arange(11), 2).tolist()
    assert [one.opening for one in found[:4]] == ["What", "Why", "Why", "Who"]
    assert all(one.question.startswith(one.opening) for one in found) and len({one.question for one in found}) > 15
    again = questions.write(trained, PASSAGES, writing, tmp_path / "two")
    other = questions.write(trained, PASSAGES, dataclasses.replace(writing, seed=4), tmp_path / "three")
    assert again == found != other
    # A part that was lost is written anew, the other one is not touched.
    parts = sorted((tmp_path / "one").iterdir())
    assert len(parts) == 2
    lost, kept = parts
    before = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert questions.write(trained, PASSAGES, writing, tmp_path / "one") == found
    assert (kept.stat().st_mtime_ns, lost.read_bytes()) == before
    monkeypatch.setattr(decoding, "answer_ids", None)
    assert questions.write(trained, PASSAGES, writing, tmp_path / "one") == found


def test_devices_write_what_one_does(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "BLOCKS", 1)
    writing = Writing(2, "{passage} Ask!", temperature=0.8, top_p=0.9)
    alone = questions.write(trained, PASSAGES[:5], writing, tmp_path / "alone")
    mesh = sharding.make_mesh(1, 4, 2)
    places = {role: sharding.param_shardings(mesh, {role: of_role})[role] for role, of_role in trained.params.items()}
    shared = Trained(trained.opened, jax.device_put(trained.params, places), 0)
    assert questions.write(shared, PASSAGES[:5], writing, tmp_path / "shared") == alone


def test_what_anybody_has_written_is_no_special_token(trained):
    tokenizer = trained.opened.prompt.tokenizer
    eos = tokenizer.eos_token
    assert questions._without_special(tokenizer, f"a{eos}b") == "a b"


def test_questions_go_round_or_are_dropped(trained, monkeypatch):
    """Ranks by the question's own words; gains against whole sequences, one forward pass each."""
    asked = [
        Question(4, "What", PASSAGES[4].replace("mill", "mill"), "corn"),
        Question(5, "What", "which of them is far from everything that is?", "nothing at all"),
        Question(4, "What", PASSAGES[4], "corn"),
        Question(6, "What", PASSAGES[6], "corn " * 200),
        Question(7, "What", "x", dropped="not of the form"),
        *(Question(i, "What", PASSAGES[i], f"river {i * 7}") for i in (0, 1, 2, 3, 8, 9, 10)),
    ]
    found = questions.checked(trained, PASSAGES, asked, found_within=3)
    assert [one.dropped for one in found[2:5]] == [
        "nearly an earlier one",
        "with too long an answer",
        "not of the form",
    ]
    opened, nearest = trained.opened, trained.retrieve([one.question for one in asked], 3)
    for one, near in zip(found, nearest, strict=True):
        if one.dropped in ("nearly an earlier one", "with too long an answer", "not of the form"):
            assert (one.rank, one.gain) == (0, 0.0)
            continue
        texts = [each.passage for each in near]
        assert one.rank == (texts.index(PASSAGES[one.passage]) + 1 if PASSAGES[one.passage] in texts else 0)
        behind, without = (whole_log_prob(opened, trained.params, text, one) for text in (PASSAGES[one.passage], ""))
        np.testing.assert_allclose(one.gain, behind - without, atol=1e-4)
        expected = "" if one.gain > 0 else "whose answer is no likelier behind the passage than behind none"
        assert one.dropped == (expected if one.rank else "whose passage is not among the 3 nearest")
    reasons = {one.dropped for one in found}
    assert "" in reasons and any(one.rank == 1 for one in found)
    assert questions.checked(trained, PASSAGES, asked[4:5], 3) == asked[4:5]


def whole_log_prob(opened, params, passage, one):
    """Mean log p of the answer's tokens in one sequence of passage, question and answer."""
    from rag_jax import data

    (prefix, _), (query, _) = data.prompt_segments(opened.prompt, [passage], [one.question])
    answer = data.answer_segments(opened.prompt, [one.answer])[0]
    ids = np.concatenate([prefix[0], query[0], answer])
    generator = opened.model.model("generator", params)
    hidden = generator(jnp.asarray(ids[None]), jnp.ones((1, len(ids)), bool))
    logits = np.asarray(hidden[0] @ generator.head_kernel().T, np.float64)
    log_probs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    places = np.arange(len(ids) - len(answer), len(ids))
    return log_probs[places - 1, ids[places]].mean()


def test_rows_are_read_as_a_run_reads_them(tmp_path):
    passages = [
        {"passage": text, "title": "Mills", "section": "Corn", "document": "mills.md", "position": i, "tokens": 9}
        for i, text in enumerate(PASSAGES)
    ]
    every = [Question(2, "Why", "Why is it there?", "The river.", 1, 0.5), Question(3, "Why", "x", dropped="bad")]
    build.write_rows(tmp_path, passages, [dataclasses.asdict(one) for one in every])
    whole = pyarrow.parquet.read_table(tmp_path / build.QUESTIONS).to_pylist()
    assert [row["dropped"] for row in whole] == ["", "bad"] and whole[0]["document"] == "mills.md"
    columns = {"query": "Question", "passage": "Abstract", "answer": "Answer"}
    rows = row_files.read_rows(str(tmp_path / build.ROWS), "data.train", columns)
    assert (list(rows.queries), list(rows.answers)) == (["Why is it there?"], ["The river."])
    sources = row_files.read_sources(str(tmp_path / build.ROWS), columns, "data.train")
    assert sources == {PASSAGES[2]: "mills.md > Corn"}
    numbered = tmp_path / "numbered.parquet"
    table = pyarrow.table({"passage": ["some text", "other text"], "document": pyarrow.array([7, None])})
    pyarrow.parquet.write_table(table, numbered)
    assert row_files.read_sources(str(numbered), {"passage": "passage"}, "--passages") == {"some text": "7"}
    build.write_rows(tmp_path, passages, [dataclasses.asdict(every[1])])
    assert not (tmp_path / build.ROWS).exists(), "rows of an earlier command"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--questions=-1"], "--questions=-1: must be at least 0"),
        (["--questions=1"], "--questions=1: takes --config=FILE.py, whose generator writes them"),
        (["--questions=1", "--config=configs/tiny.py", "--top-p=0"], "--top-p=0.0: must be above 0 and at most 1"),
        (["--questions=1", "--config=configs/tiny.py", "--temperature=-1"], "--temperature=-1.0: must be a number"),
        (["--questions=1", "--config=configs/tiny.py", "--config.generator.path=None"], "generator.path"),
        (["--questions=1", "--config=configs/tiny.py", "--instruction=nowhere"], "--instruction=nowhere: no such file"),
        (["--questions=1", "--config=configs/tiny.py", "--instruction=README.md"], "must hold {passage} once"),
        (["--questions=1", "--config=configs/tiny.py", "--found-within=0"], "--found-within=0: must be at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, flags, message):
    code, _, err = call(tmp_path / "cache", "prepare", "--documents=docs", f"--out={tmp_path / 'out'}", *flags)
    assert code == 2 and err.startswith("rag_jax: error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_documents_to_rows_that_train(real_models, tmp_path):
    """A real instruction model; the rows are trained on and the answer names its document."""
    folder, out, run = tmp_path / "docs", tmp_path / "out", tmp_path / "run"
    folder.mkdir()
    for name, fact in (
        ("mill", "grinds rye at night"),
        ("ferry", "crosses only on Mondays"),
        ("bell", "is cast of tin"),
    ):
        text = f"The old {name} of Lund {fact}. Nobody in the village remembers who built the {name}, or when. "
        (folder / f"{name}.md").write_text(f"# The {name}\n\n## Its habits\n\n{text * 3}")
    values = {
        "retriever__path": real_models / "minilm", "generator__path": real_models / "smollm2-135m",
        "batch_size": 2, "group_size": 2, "objective__candidates": 2, "total_steps": 1, "eval__every_steps": 0,
        "data__eval": None,
    }  # fmt: skip
    flags = (f"--documents={folder}", f"--out={out}", "--config=configs/minilm_smollm2.py", "--processes=1")
    code, printed, err = call(tmp_path / "cache", "prepare", *flags, "--questions=4", **values)
    assert code == 0, err
    assert "4 questions of each of 3 passages: 12 written" in printed and "kept" in printed
    rows = pyarrow.parquet.read_table(out / build.ROWS).to_pylist()
    assert len(rows) >= 2 and all(row["gain"] > 0 and row["rank"] >= 1 for row in rows)
    values |= {"data__train": out / build.ROWS, "data__passages": out / build.PASSAGES}
    code, printed, err = call(
        tmp_path / "cache", "main", "--config=configs/minilm_smollm2.py", f"--workdir={run}", **values
    )
    assert code == 0 and "recognised as prepared questions" in printed, err
    code, printed, err = call(tmp_path / "cache", "ask", f"--workdir={run}", "--json", "Who built the ferry?")
    assert code == 0, err
    passage = json.loads(printed.splitlines()[-1])["passages"][0]
    assert passage["source"].startswith("ferry.md"), passage
