"""Evidence that is kept: its sums against every string alone, what is computed again, and for whom it is kept."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax import config, data, files, models, pair, progress, rag
from rag_jax.distributed import fingerprint, sharding
from rag_jax.inference import evidence

TINY = "configs/tiny.py"
ROWS = """Question,Abstract,Answer
who?,the dog,he
why not?,a cat and a dog,
w,the dog,so it is
who?,nothing,she does
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "rows.csv").write_text(ROWS)
    values = {"data.train": str(folder / "rows.csv"), "objective.name": "pdist", "objective.evidence": "both"}
    return pair.open_pair(config.load(TINY, values | {"prompt.query": "{query}"}))


@pytest.fixture
def examples(opened, tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))
    loaded, _ = data.load_examples(
        opened.config.data.train, key="data.train", columns=opened.config.data.columns.to_dict(), bad_rows="refuse",
        retriever=None, prompt=opened.prompt, gaps=data.Gaps(answer=True),
    )  # fmt: skip
    return loaded


@pytest.fixture(scope="module")
def params(opened):
    generator = models.abstract(opened.sources["generator"].model_config)[1]
    rng = np.random.default_rng(0)
    return {"generator": jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype), generator)}


def asking(opened, which) -> rag.Rag:
    return dataclasses.replace(opened.model, objective=dataclasses.replace(opened.model.objective, evidence=which))


def alone(opened, params, examples, row, passage):
    """log p of every token of the row's question and answer behind a passage, by one string and the plain forward."""
    generator = opened.model.model("generator", params)
    parts = (examples.prefixes[passage], examples.prompt_queries[examples.query_key[row]], examples.answers[row])
    ids = np.zeros(64, np.int32)
    ids[: sum(map(len, parts))] = np.concatenate(parts)
    mask = np.arange(64) < sum(map(len, parts))
    log_probs = jax.nn.log_softmax(generator.logits(generator(jnp.asarray(ids[None]), jnp.asarray(mask[None]))[0]))
    own = np.asarray(log_probs)[np.arange(63), ids[1:]]
    begin, end = len(parts[0]), len(parts[0]) + len(parts[1])
    return own[end - 1 : mask.sum() - 1].sum(), own[begin : end - 1].sum()


def test_sums_are_those_of_every_string_alone(opened, params, examples, tmp_path):
    """A query of one token has no question to sum, an empty answer none either."""
    rows, passages = map(np.ravel, np.indices((4, 3)))
    found, _ = evidence.sums(asking(opened, "both"), params, examples, rows, passages, tmp_path / "kept", 8)
    expected = [alone(opened, params, examples, row, passage) for row, passage in zip(rows, passages, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    lengths = evidence.part_lengths(examples, rows)
    assert (found == 0).tolist() == (lengths == 0).tolist() and (lengths == 0).any(axis=0).all()
    for part, which in enumerate(evidence.PARTS):
        read, _ = evidence.sums(asking(opened, which), params, examples, rows, passages, tmp_path / which, 8)
        np.testing.assert_allclose(read[:, part], found[:, part], rtol=1e-5, atol=1e-5)
        assert np.isnan(read[:, 1 - part]).all()


def test_a_log_is_told_how_many_pairs_are_computed(opened, params, examples, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
    monkeypatch.setattr(evidence, "BLOCK", 5)
    rows, passages = map(np.ravel, np.indices((4, 3)))
    evidence.sums(asking(opened, "both"), params, examples, rows[:2], passages[:2], tmp_path, 8)
    capsys.readouterr()
    evidence.sums(asking(opened, "both"), params, examples, rows, passages, tmp_path, 8)
    told = re.compile(r"pairs of evidence: (\d+) of 10, 0:\d\d left")
    counts = [int(told.fullmatch(line)[1]) for line in capsys.readouterr().err.splitlines()]
    assert counts == sorted(set(counts)) and 5 in counts and counts[-1] < 10


def test_passages_are_reranked_by_the_question(opened, params, examples):
    retrieved = np.array([[2, 0, 1], [0, 1, 2], [1, 2, 0], [0, 2, 1]])
    questions = examples.prompt_queries.take(examples.query_key)
    order = evidence.by_question(asking(opened, "answer"), params, examples.prefixes, questions, retrieved, 8)
    for row in range(4):
        found = [alone(opened, params, examples, row, passage)[1] for passage in retrieved[row]]
        # A question of one token has nothing to say: its passages stay as they are.
        assert order[row].tolist() == sorted(range(3), key=lambda k: -found[k])
    assert order[2].tolist() == [0, 1, 2] and (order != [0, 1, 2]).any()


def test_what_is_kept_is_not_computed_again(opened, params, examples, tmp_path, monkeypatch, caplog):
    """Also for another part, from a run that was cut off, and beside a damaged file, which is told."""
    rows, passages, asked = np.array([0, 1, 2, 3]), np.array([0, 1, 0, 2]), []
    compute = evidence.computed

    def counted(model, params, examples, rows, *rest):
        asked.append(rows.tolist())
        return compute(model, params, examples, rows, *rest)

    monkeypatch.setattr(evidence, "computed", counted)
    both = [asking(opened, "both"), params, examples]
    first, _ = evidence.sums(*both, rows[:3], passages[:3], tmp_path / "kept", 8)
    again, _ = evidence.sums(*both, rows[::-1], passages[::-1], tmp_path / "kept", 8)
    np.testing.assert_array_equal(again[::-1][:3], first)
    assert asked == [[0, 2, 1], [3]]
    alone, _ = evidence.sums(asking(opened, "question"), params, examples, rows, passages, tmp_path / "kept", 8)
    np.testing.assert_array_equal(alone[:, 1], again[::-1][:, 1])
    assert len(asked) == 2
    written = min((tmp_path / "kept").glob("*.npz"), key=lambda path: len(files.read(path)["name"]))
    written.write_bytes(written.read_bytes()[:-30])
    found, computed = evidence.sums(*both, rows, passages, tmp_path / "kept", 8)
    np.testing.assert_array_equal(found, again[::-1])
    assert computed == 1
    assert asked == [[0, 2, 1], [3], [3]] and "is damaged" in caplog.text
    # The texts say which pair it is, not their places in a file.
    few = data.take(examples, np.array([2, 3]))
    moved, _ = evidence.sums(both[0], params, few, np.array([1, 0]), np.array([1, 0]), tmp_path / "kept", 8)
    np.testing.assert_array_equal(moved, again[::-1][[3, 2]])
    assert len(asked) == 3


@pytest.mark.parametrize(
    "change",
    [{"prompt.query": "Q {query}"}, {"data.answer_len": 20}, {"dtype": "bfloat16"}, {"matmul_precision": "high"}],
)
def test_another_way_of_reading_has_a_folder_of_its_own(opened, params, change):
    same = pair.open_pair(opened.config)
    folder = evidence.folder_of(opened, params)
    assert evidence.folder_of(same, params) == folder
    other = pair.open_pair(config.build(config.flat(opened.config) | change))
    assert evidence.folder_of(other, params) != folder


def test_a_field_that_a_later_version_adds_changes_no_folder(opened, params):
    source = opened.sources["generator"]
    theirs = source.model_config
    field = ("later", int, dataclasses.field(default=0))
    later = dataclasses.make_dataclass("Later", [field], bases=(type(theirs),), frozen=True)
    values = {each.name: getattr(theirs, each.name) for each in dataclasses.fields(theirs)}
    for said, same in ({}, True), ({"later": 1}, False):
        newer = dataclasses.replace(source, model_config=later(**values, **said))
        other = dataclasses.replace(opened, sources=opened.sources | {"generator": newer})
        assert (evidence.folder_of(other, params) == evidence.folder_of(opened, params)) is same


def test_another_generator_has_a_folder_of_its_own(opened, params):
    """The lowest bit of one number, or two numbers that change places, make another one; where it lies does not."""
    folder = evidence.folder_of(opened, params)
    leaves, structure = jax.tree.flatten(params)
    for i in range(0, len(leaves), 5):
        bits = np.array(leaves[i]).view(np.uint32)
        one, swapped = bits.copy().ravel(), bits.copy().ravel()
        one[-1] ^= 1
        swapped[[0, -1]] = swapped[[-1, 0]]
        for changed in (one, swapped):
            others = [*leaves[:i], jnp.asarray(changed.view(np.float32).reshape(bits.shape)), *leaves[i + 1 :]]
            assert evidence.folder_of(opened, jax.tree.unflatten(structure, others)) != folder
    places = sharding.param_shardings(sharding.make_mesh(1, 4, 2), params)
    assert fingerprint.of_params(jax.device_put(params, places)) == fingerprint.of_params(params)
