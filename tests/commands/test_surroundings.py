"""Machines as people have them: no home, no locks, proxies, platforms that are not there, rows that have moved."""

import errno
import fcntl
import os
import pathlib
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile

import pytest
from command import ROOT, TINY, TINY_VALUES, run_here

from rag_jax import cli, files
from rag_jax.distributed import processes
from rag_jax.errors import UserError
from rag_jax.workdir import lock


def test_a_flag_may_begin_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.path("~/run") == tmp_path / "run"
    assert cli.path("a~b") == pathlib.Path("a~b")
    with pytest.raises(UserError, match="~nobody_here/run: there is no such user's folder; write the full path"):
        cli.path("~nobody_here/run")


def test_all_flags_that_are_paths_are_read_so():
    sources = [path.read_text() for path in (ROOT / "rag_jax").glob("*.py")]
    assert sum(source.count("type=cli.path") + source.count("type=path") for source in sources) >= 8
    assert not any("type=pathlib.Path" in source for source in sources)


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    def nobody(_):
        raise KeyError

    for name in ("HOME", "RAG_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"rag_jax-{os.getuid()}"


def test_who_has_no_home_keeps_things_among_temporary_files(homeless):
    assert files.folder() == homeless
    assert stat.S_IMODE(homeless.stat().st_mode) == 0o700
    assert files.folder() == homeless


def test_a_folder_of_somebody_else_is_not_trusted(homeless, tmp_path):
    homeless.symlink_to(tmp_path)  # as somebody else may have laid it there
    with pytest.raises(UserError, match="is not yours, and this user has no home; set RAG_JAX_CACHE to a folder"):
        files.folder()


def test_a_file_system_without_locks_costs_a_warning(monkeypatch, tmp_path, caplog):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.only_writer(tmp_path / "run"):
        assert (tmp_path / "run" / lock.NAME).read_text().startswith(f"process {os.getpid()}")
    assert "its file system has no locks (Function not implemented), so nothing keeps a second" in caplog.text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "10.0.0.1"),
        ({"no_proxy": "localhost,.corp"}, "localhost,.corp,10.0.0.1"),
        ({"NO_PROXY": ".corp"}, ".corp,10.0.0.1"),
        ({"no_grpc_proxy": "x", "no_proxy": "y"}, "x,10.0.0.1"),
    ],
)
def test_processes_call_each_other_past_proxies(monkeypatch, given, expected):
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_grpc_proxy", given.get("no_grpc_proxy", ""))  # what is set in the test ends with it
    processes.past_proxies("10.0.0.1:8476")
    assert os.environ["no_grpc_proxy"] == expected


def test_a_platform_that_is_not_there(tmp_path):
    words = ["-m", "rag_jax.main", f"--config={TINY}", f"--workdir={tmp_path / 'run'}"]
    answer = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cuda"}, capture_output=True, text=True
    )
    assert answer.returncode == 2
    (line,) = answer.stderr.splitlines()
    assert line.startswith("rag_jax: error: JAX_PLATFORMS=cuda: no such device can be used (")
    assert "pip install -e '.[cuda]'" in line and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_rows_and_models_may_have_moved_when_a_run_goes_on(tmp_path):
    """The run knows them by what they hold, and other ones for others."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copy(ROOT / "tests" / "data" / "rows.csv", old / "rows.csv")
    values = TINY_VALUES | {"eval__every_steps": 0, "checkpoint__every_steps": 1}
    flags = (f"--config={TINY}", f"--workdir={tmp_path / 'run'}")
    run_here(tmp_path / "cache", "main", *flags, **values | {"total_steps": 1, "data__train": old / "rows.csv"})
    old.rename(new)
    further = values | {"total_steps": 2, "data__train": new / "rows.csv"}
    assert "from step 1 of 2" in run_here(tmp_path / "cache", "main", *flags, **further)
    text = (new / "rows.csv").read_text()
    (new / "rows.csv").write_text(text[: text.rindex("\n", 0, -1) + 1])
    with pytest.raises(AssertionError, match="holds a run of other rows or models: data.train="):
        run_here(tmp_path / "cache", "main", *flags, **further | {"total_steps": 3})
