"""Indexes as files: what other programs read of them, what is asked from them, and bad input."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from command import ROOT, call, run_here

import rag_jax
from rag_jax.inference import disk_index

QUESTIONS = ["How deep is the village well?", "Who owns the orchard?", "What does the harbour lamp burn?"]


@pytest.fixture(scope="module")
def indexes(tiny_run, tmp_path_factory):
    """`{dtype: folder}`, each by the command."""
    workdir, _, cache = tiny_run
    folder = tmp_path_factory.mktemp("indexes")
    for dtype in ("float32", "bfloat16", "int8", "binary"):
        printed = run_here(cache, "index", f"--workdir={workdir}", f"--out={folder / dtype}", f"--dtype={dtype}")
        assert f"23 passages, {dtype}" in printed
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def pair(tiny_run):
    workdir, _, cache = tiny_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_JAX_CACHE", str(cache))
        yield rag_jax.load(workdir)


@pytest.fixture(scope="module")
def passages():
    with open(ROOT / "tests" / "data" / "rows.csv", newline="", encoding="utf-8") as file:
        return list(dict.fromkeys(row["Abstract"] for row in csv.DictReader(file)))


def copied(tiny_run, index, out, form):
    run_here(tiny_run[2], "index", f"--index={index}", f"--out={out}", f"--format={form}")


def test_parquet_holds_texts_and_embeddings(indexes, pair, passages, tiny_run, tmp_path):
    emb = pair.embed_passages(passages)
    for dtype, error in {"float32": 1e-6, "bfloat16": 2**-8, "int8": 0.6 / 127, "binary": 0.6 / 127}.items():
        copied(tiny_run, indexes[dtype], tmp_path / dtype, "parquet")
        table = pq.read_table(tmp_path / dtype / "passages.parquet")
        assert table.column("passage").to_pylist() == passages
        values = np.array(table.column("embedding").to_pylist(), np.float32)
        if dtype in ("int8", "binary"):
            values *= np.array(table.column("scale"), np.float32)[:, None]
        np.testing.assert_allclose(values, emb, atol=error)
        if dtype == "binary":
            bits = np.frombuffer(b"".join(table.column("bits").to_pylist()), np.uint8).reshape(len(emb), -1)
            np.testing.assert_array_equal(np.unpackbits(bits, axis=1)[:, : emb.shape[1]], emb > 0)


def test_faiss_finds_the_same(indexes, pair, tiny_run, tmp_path):
    faiss = pytest.importorskip("faiss")
    queries = pair.embed_queries(QUESTIONS)
    for dtype in ("float32", "int8", "binary"):
        copied(tiny_run, indexes[dtype], tmp_path / dtype, "faiss")
        path = str(tmp_path / dtype / "index.faiss")
        index = disk_index.opened(indexes[dtype])
        assert pq.read_table(tmp_path / dtype / "passages.parquet").num_rows == 23
        if dtype == "binary":
            _, found = faiss.read_index_binary(path).search(disk_index.signs(queries), 5)
            distance = np.bitwise_count(disk_index.signs(queries)[:, None] ^ index.bits).sum(-1)
            np.testing.assert_array_equal(
                np.sort(np.take_along_axis(distance, found, axis=1)), np.sort(distance, axis=1)[:, :5]
            )
            ours = disk_index.fewest_bits(disk_index.as_words(disk_index.signs(queries)), index.words, 5)
            np.testing.assert_array_equal(
                np.sort(np.take_along_axis(distance, ours, axis=1)), np.sort(distance, axis=1)[:, :5]
            )
        else:
            score, found = faiss.read_index(path).search(queries, 5)
            ours, place = disk_index.top_k(queries, index, 5)
            np.testing.assert_allclose(score, ours, atol=1e-5 if dtype == "float32" else 0.02)
            assert (found == place).mean() == 1 if dtype == "float32" else (found == place).mean() > 0.6


def test_asked_from_an_index(indexes, pair, passages, tiny_run, tmp_path):
    """The same passages and answers as from embeddings in memory; of int8 and signs nearly."""
    workdir, _, cache = tiny_run
    flags = (f"--workdir={workdir}", "--max-tokens=8", "--json", QUESTIONS[0])
    by_memory = json.loads(run_here(cache, "ask", *flags).splitlines()[-1])
    for dtype, folder in indexes.items():
        found = json.loads(run_here(cache, "ask", f"--index={folder}", *flags).splitlines()[-1])
        assert found["counts"] == by_memory["counts"]
        names = [[row["passage"] for row in record["passages"]] for record in (by_memory, found)]
        assert names[0][0] == names[1][0]
        if dtype == "float32":
            assert found == by_memory
        np.testing.assert_allclose(
            [row["cosine"] for row in found["passages"]], [row["cosine"] for row in by_memory["passages"]], atol=0.02
        )


def test_signs_find_nearly_all_and_what_they_find_is_scored_as_it_is(tmp_path):
    rng = np.random.default_rng(1)
    corpus = (rng.normal(size=(2000, 12)) @ rng.normal(size=(12, 96))).astype(np.float32)  # few directions, as texts'
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    queries = corpus[:50] + 0.2 * rng.normal(size=(50, 96)).astype(np.float32) / 96**0.5
    facts = {"dtype": "binary", "number of passages": 2000, "rows of a shard": 512}
    (tmp_path / "index.json").write_text(json.dumps(facts))
    for shard in range(4):
        part = corpus[shard * 512 :][:512]
        values, scale = disk_index.compress(part, "binary")
        np.save(tmp_path / f"shard_{shard:05}.npy", values)
        np.save(tmp_path / f"scale_{shard:05}.npy", scale)
        np.save(tmp_path / f"bits_{shard:05}.npy", disk_index.signs(part))
    index = disk_index.opened(tmp_path)
    scores, found = disk_index.top_k(queries, index, 10)
    expected = np.argsort(-(queries @ corpus.T), axis=1, kind="stable")[:, :10]
    assert (found[:, 0] == np.arange(50)).all()
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    assert np.mean(shared) > 0.8
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ corpus.T, found, axis=1), atol=0.02)
    assert (np.diff(scores) <= 0).all()
    every = disk_index.top_k(queries, index, 3000)[1]
    assert every.shape == (50, 2000) and (np.sort(every, axis=1) == np.arange(2000)).all()


def test_bad_input(indexes, tiny_run, tmp_path):
    workdir, _, cache = tiny_run
    stopped = tmp_path / "stopped"
    shutil.copytree(indexes["int8"], stopped)
    (stopped / "scale_00000.npy").unlink()
    textless = tmp_path / "textless"
    shutil.copytree(indexes["int8"], textless)
    (textless / "passages.parquet").write_bytes(b"no Parquet")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    run_flag, index = f"--workdir={workdir}", indexes["float32"]
    for module, flags, message in [
        ("index", (run_flag, f"--out={tmp_path / 'photos'}"), "holds something that is not an index"),
        ("index", (run_flag, f"--out={index}", "--dtype=int8"), "its dtype is float32, not int8"),
        ("index", (f"--index={index}", f"--out={tmp_path / 'a'}"), "go together"),
        ("index", (run_flag, f"--out={tmp_path / 'a'}", "--format=faiss"), "go together"),
        ("index", (f"--index={index}", "--format=faiss", f"--out={tmp_path / 'photos'}"), "is not empty"),
        ("index", (f"--index={index}", "--format=faiss", run_flag, f"--out={tmp_path / 'a'}"), "--workdir: says what"),
        ("index", (f"--index={tmp_path / 'photos'}", "--format=faiss", f"--out={tmp_path / 'a'}"), "holds no index"),
        ("index", (f"--index={stopped}", "--format=parquet", f"--out={tmp_path / 'a'}"), "part 1"),
        ("ask", (run_flag, f"--index={stopped}", "who?"), "is not complete or damaged"),
        ("ask", (run_flag, f"--index={textless}", "who?"), "passages.parquet is damaged"),
        ("ask", (run_flag, f"--index={index}", "--passages=x.csv", "who?"), "leave out --passages"),
        ("ask", (run_flag, f"--index={index}", "--compare", "who?"), "leave out --compare"),
        ("ask", (run_flag, "--step=5", f"--index={index}", "who?"), "was made by another retriever"),
    ]:
        code, out, err = call(cache, module, *flags)
        assert (code, message in err, len(err.splitlines())) == (2, True, 1), (flags, err)
    assert not (tmp_path / "a").exists()
