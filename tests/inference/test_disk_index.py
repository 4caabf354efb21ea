"""An index on disk against embeddings in memory: the same neighbours, gone on with, refused where it is another's."""

import json
import sys

import jax
import numpy as np
import pytest
from test_processes import started
from test_search import by_numpy, tiny_retriever, whole_numbers

from rag_jax.data import segments
from rag_jax.distributed import sharding
from rag_jax.errors import UserError
from rag_jax.inference import disk_index, search

OPTIONS = {"batch_size": 6, "shard_rows": 16}


@pytest.fixture(scope="module")
def retriever():
    return tiny_retriever()


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(3)
    return segments.Ragged.of([rng.integers(1, 61, length) for length in rng.integers(1, 30, 45)])


@pytest.fixture(scope="module")
def emb(retriever, tokens):
    _, model, params = retriever
    return search.embed(model, params, tokens, batch_size=6, label="passages")


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 2**-8), ("int8", 0.6 / 127)])
def test_streamed_from_disk_the_neighbours_are_those_in_memory(
    retriever, tokens, emb, tmp_path, monkeypatch, dtype, error
):
    monkeypatch.setattr(search, "BLOCK_SCORES", 60)  # 12 of 45 passages at a time on a device
    monkeypatch.setattr(search, "QUERIES_AT_A_TIME", 5)
    some = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: some)
    _, model, params = retriever
    built = disk_index.build(tmp_path / "index", model, params, tokens, dtype=dtype, **OPTIONS)
    assert len(list((tmp_path / "index").glob("shard_*.npy"))) == 3
    values, scale = built.block(10, 40)  # from all three shards
    assert (scale is None) == (dtype != "int8")
    scale = np.ones(30) if scale is None else scale
    np.testing.assert_allclose(values.astype(np.float32) * scale[:, None], emb[10:40], atol=error)
    whole, scale = built.block(0, 45)
    scale = np.ones(45) if scale is None else scale
    queries = emb[::7]
    score, found = search.top_k(queries, built, 9)
    expected = (queries @ whole.astype(np.float32).T) * scale
    order = np.argsort(-expected, axis=1, kind="stable")[:, :9]
    np.testing.assert_allclose(score, np.take_along_axis(expected, order, axis=1), atol=1e-5)
    assert (found[:, 0] == order[:, 0]).all() and np.mean(found == order) > 0.95  # but for scores of one rounding
    assert (found[:, 0] == np.arange(45)[::7]).all()


def test_a_stopped_one_goes_on_and_what_is_there_stays(retriever, tokens, emb, tmp_path, monkeypatch):
    _, model, params = retriever
    embed, made = search.embed, []

    def interrupted(model, params, part, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(len(part))
        return embed(model, params, part, **options)

    monkeypatch.setattr(search, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        disk_index.build(tmp_path, model, params, tokens, **OPTIONS)
    damaged = tmp_path / "shard_00001.npy"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    made[:] = []
    built = disk_index.build(tmp_path, model, params, tokens, **OPTIONS)
    assert made == [16, 13]  # the damaged one and the missing one
    made[:] = [0, 0]
    disk_index.build(tmp_path, model, params, tokens, **OPTIONS)  # would be interrupted if anything were made
    np.testing.assert_allclose(built.block(0, 45)[0], emb, atol=1e-6)


@pytest.mark.parametrize("kind", ["shard", "scale"])
@pytest.mark.parametrize("damage", [lambda a: a[..., :-1], lambda a: a.astype(np.float16), lambda a: a[None]])
def test_a_shard_of_another_width_or_type_is_made_again(retriever, tokens, tmp_path, kind, damage):
    """Each has as many rows as before, but for the last one."""
    _, model, params = retriever
    built = disk_index.build(tmp_path, model, params, tokens, dtype="int8", **OPTIONS)
    expected = built.block(0, 45)
    path = tmp_path / f"{kind}_00001.npy"
    np.save(path, damage(np.load(path)))
    built = disk_index.build(tmp_path, model, params, tokens, dtype="int8", **OPTIONS)
    for found, wanted in zip(built.block(0, 45), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_another_index_is_refused_and_stays(retriever, tokens, tmp_path):
    _, model, params = retriever
    disk_index.build(tmp_path / "index", model, params, tokens, **OPTIONS)
    before = {path: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    # The last bit of one number.
    flat, structure = jax.tree.flatten(params["retriever"])
    changed = np.array(flat[-1])
    changed.flat[-1] = np.nextafter(changed.flat[-1], np.float32(9))
    other = {"retriever": jax.tree.unflatten(structure, [*flat[:-1], changed])}
    with pytest.raises(UserError, match="holds another index: its retriever is [0-9a-f]+, not [0-9a-f]+; give another"):
        disk_index.build(tmp_path / "index", model, other, tokens, **OPTIONS)
    with pytest.raises(UserError, match="its passages is .*; its number of passages is 45, not 44"):
        disk_index.build(tmp_path / "index", model, params, tokens.take(np.arange(44)), **OPTIONS)
    with pytest.raises(UserError, match="its dtype is float32, not int8"):
        disk_index.build(tmp_path / "index", model, params, tokens, dtype="int8", **OPTIONS)
    assert {path: path.read_bytes() for path in (tmp_path / "index").iterdir()} == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(UserError, match="holds something that is not an index"):
        disk_index.build(tmp_path / "photos", model, params, tokens, **OPTIONS)
    with pytest.raises(UserError, match="no passages to put"):
        disk_index.build(tmp_path / "empty", model, params, tokens.take(np.arange(0)), **OPTIONS)


def test_the_key_of_a_retriever_knows_values_and_places_but_no_mesh(retriever):
    _, model, params = retriever
    key = disk_index.retriever_key(model, params)
    mesh = sharding.make_mesh(2, 2, 2)
    assert disk_index.retriever_key(model, jax.device_put(params, sharding.param_shardings(mesh, params))) == key
    reversed_rows = jax.tree.map(lambda a: a[::-1], params)  # the same numbers elsewhere
    assert disk_index.retriever_key(model, reversed_rows) != key


TWO = """
import sys, numpy as np
from rag_jax.distributed import processes
from rag_jax.inference import search
processes.start()
import jax
sys.path[:0] = ["tests", "tests/inference"]
from test_search import whole_numbers
search.BLOCK_SCORES, search.QUERIES_AT_A_TIME = 120, 3
score, index = search.top_k(whole_numbers(1, 10, 4), whole_numbers(2, 103, 4), 12)
assert jax.process_count() == 2 and jax.device_count() == 4
print("FOUND", repr((score.tolist(), index.tolist())))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    with started(2, 2, tmp_path, [[sys.executable, "-c", TWO]] * 2) as running:
        outputs = [process.communicate(timeout=200) for process in running]
    expected = by_numpy(whole_numbers(1, 10, 4), whole_numbers(2, 103, 4), 12)
    for out, complaint in outputs:
        assert "FOUND" in out, complaint
        score, index = json.loads(out.split("FOUND ")[1].replace("(", "[").replace(")", "]"))
        np.testing.assert_array_equal(score, expected[0])
        np.testing.assert_array_equal(index, expected[1])
