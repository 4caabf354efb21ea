"""Tokenised rows on disk: found again, never half written, made again when anything that they depend on changed."""

import logging

import numpy as np
import pytest
from data_helpers import byte_tokenizer, word_tokenizer

from rag_jax import files


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def arrays():
    return {"a.tokens": np.arange(1000, dtype=np.int32), "b.cut": np.array([True, False])}


def same(left, right):
    return left.keys() == right.keys() and all((left[n] == right[n]).all() for n in left)


def never():
    pytest.fail("made again")


def test_arrays_are_made_once(folder):
    made, found = files.cached("key", arrays)
    assert same(made, arrays()) and not found
    kept, found = files.cached("key", never)
    assert same(kept, arrays()) and found
    assert [path.name for path in folder.iterdir()] == ["key.npz"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "pickle"])
def test_a_damaged_file_is_made_again(damage, folder, caplog):
    files.cached("key", arrays)
    path = folder / "key.npz"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "pickle":
        np.savez(path, objects=np.array([{}], dtype=object))
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"no archive"}[damage])
    with caplog.at_level(logging.WARNING):
        made, found = files.cached("key", arrays)
    assert same(made, arrays()) and not found
    assert "damaged" in caplog.text
    assert files.cached("key", never)[1]


def test_a_folder_that_cannot_be_written_costs_a_warning(folder, caplog):
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        made, found = files.cached("key", arrays)
    assert same(made, arrays()) and not found
    assert "not kept" in caplog.text


def test_a_failed_write_leaves_nothing(folder, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    assert same(files.cached("key", arrays)[0], arrays())
    assert list(folder.iterdir()) == []


def test_keys_tell_apart_what_differs():
    parts = [(["a", "b"], []), (["a"], ["b"]), (["ab"], []), ({"a": 1}, 2), ({"a": 2}, 1), ("é",), ("\ud800",)]
    assert len({files.content_key(*p) for p in parts}) == len(parts)
    assert files.content_key({"a": 1, "b": 2}) == files.content_key({"b": 2, "a": 1})


def test_the_tokenizer_counts_but_not_its_last_call():
    tokenizer = word_tokenizer(["a", "b"])
    before = files.tokenizer_key(tokenizer)
    tokenizer(["a b a b"], truncation=True, max_length=3)
    assert files.tokenizer_key(tokenizer) == before
    others = [word_tokenizer(["b", "a"]), byte_tokenizer(), byte_tokenizer(bos=False), byte_tokenizer(eos=False)]
    assert len({before, *map(files.tokenizer_key, others)}) == 5
