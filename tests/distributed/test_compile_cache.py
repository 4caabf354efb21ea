"""The folder of compiled programs does not grow for ever."""

import os

from rag_jax.distributed import compile_cache


def test_the_least_recently_used_go_first(tmp_path):
    for number, (name, used) in enumerate({"b": 30, "a": 10, "d": 40, "c": 20}.items()):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (used, number))
    compile_cache.make_room(tmp_path, 400)
    assert len(list(tmp_path.iterdir())) == 4
    compile_cache.make_room(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "d"]
    (tmp_path / "autotuned").mkdir()  # XLA keeps a folder there on GPUs
    compile_cache.make_room(tmp_path, 0)
    compile_cache.make_room(tmp_path / "nowhere", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["autotuned"]
