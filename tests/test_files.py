"""Tokenised rows on disk: found again, never half written, made again when anything that they depend on changed."""

import json
import logging
import os
import pathlib

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


def test_files_appear_complete_and_replace_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    files.write_whole(path, "old ß")
    assert path.read_bytes() == "old ß".encode()
    before = os.umask(0o022)
    try:
        files.write_whole(path, b"new", sync=True)
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o644
    seen = []
    monkeypatch.setattr(os, "replace", lambda partial, target: seen.append(pathlib.Path(partial).read_bytes()))
    files.write_whole(path, b"newer")
    assert seen == [b"newer"] and path.read_bytes() == b"new", "all is written before it takes its place"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    files.write_whole(path, "old")
    with pytest.raises(type(error)), files.file_at_once(path) as file:
        file.write(b"half")
        raise error
    with pytest.raises(UnicodeEncodeError):
        files.write_whole(path, "half \ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    files.write_whole(path, "half \ud800", errors="replace")
    assert path.read_text() == "half ?"


@pytest.mark.parametrize("value", [{"ß": ["文", 1.5, None]}, {"name": "\udcff", "ß": 1}])
def test_json_comes_back_as_it_was_whatever_its_texts(tmp_path, value):
    files.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


def test_a_folder_appears_complete_over_nothing_but_an_empty_one(tmp_path):
    with pytest.raises(OSError, match="disk full"), files.folder_at_once(tmp_path / "deep" / "folder") as made:
        (made / "half").write_text("half")
        raise OSError("disk full")
    assert list((tmp_path / "deep").iterdir()) == []
    for _ in range(2):
        with files.folder_at_once(tmp_path / "folder") as made:
            assert made.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777
        assert (tmp_path / "folder").is_dir()
    (tmp_path / "folder" / "mine").write_text("mine")
    with pytest.raises(OSError, match="not empty"), files.folder_at_once(tmp_path / "folder") as made:
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "folder", "mine"]
