"""Several real processes on loopback: they find each other, agree, train as one, and end together."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from command import ROOT, TINY, environment, run_here, words
from quick_compiling import FLAGS
from test_loop import records

from rag_jax.distributed import processes, rendezvous
from rag_jax.errors import UserError
from rag_jax.workdir import checkpoint

STEPS = 4
# Shuffling, several groups a device; no bfloat16, as the comparison is to 1e-4. No dropout, whose random numbers are a
# third of what is compiled: other tests say that it does not depend on devices.
VALUES = dict(
    total_steps=STEPS, batch_size=16, group_size=2, objective__candidates=2, dropout=0.0,
    optimizer__schedule="constant", eval__every_steps=STEPS, eval__answers=0,  # decoding takes long to compile
)  # fmt: skip
# The same without what takes long to compile, anew in each of the processes.
RETRIEVER_ONLY = VALUES | {"objective__name": "none", "generator__path": None, "eval__every_steps": 0}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment_of(index, count, devices, cache, port, **more):
    """One of `count` processes with `devices` fake devices each."""
    there = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FLAGS}",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "RAG_JAX_START_TIMEOUT_S": "60",
        # Of the world outside; nobody listens there.
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    return environment(cache) | there | more


@contextlib.contextmanager
def started(count, devices, cache, commands):
    """The processes of one run; none is left behind."""
    port = free_port()
    running = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment_of(index, count, devices, cache, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, command in enumerate(commands)
    ]
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()


def run_together(count, devices, cache, *flags, **values):
    """(exit code, stdout, stderr) of every process."""
    with started(count, devices, cache, [words("main", *flags, **values)] * count) as running:
        outputs = [process.communicate(timeout=900) for process in running]
        return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """The same run in one process on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run_here(cache, "main", f"--config={TINY}", f"--workdir={workdir}", **VALUES)
    return workdir


def assert_same_record(workdir, expected):
    ours, theirs = records(workdir), records(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for name in ("loss/total", "loss/contrastive", "loss/marginal"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=1e-4)
    ours, theirs = records(workdir, "eval/"), records(expected, "eval/")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [0, STEPS]
    for name in ("eval/recall@10", "eval/mrr@10", "eval/answer_nll"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"), [(2, 2, (1, 4, 1)), pytest.param(4, 2, (2, 2, 2), marks=pytest.mark.soak)]
)
def test_they_train_as_one_device_does_and_one_goes_on(count, devices, mesh, alone, cache, tmp_path):
    workdir = tmp_path / "run"
    flags = (f"--config={TINY}", f"--workdir={workdir}")
    axes = dict(zip(("mesh__replica", "mesh__data", "mesh__model"), mesh, strict=True))
    answers = {"eval__answers": 0 if count == 2 else 4}
    ended = run_together(count, devices, cache, *flags, **VALUES | axes | answers)
    assert [code for code, _, _ in ended] == [0] * count, ended
    assert f"devices    {count * devices} cpu" in ended[0][1]
    for _, out, _ in ended[1:]:  # one writer; what gloo prints is not ours
        assert "devices " not in out and "step " not in out
    assert_same_record(workdir, alone)
    # What they saved together one process reads on its own, and trains further.
    printed = run_here(cache, "evaluate", f"--workdir={workdir}", "--json")
    again = json.loads(printed.splitlines()[-1])
    saved = json.loads((workdir / "eval" / f"step_{STEPS}.json").read_text())
    assert again["eval/answer_nll"] == pytest.approx(saved["eval/answer_nll"], rel=1e-4)
    further = VALUES | {"total_steps": STEPS + 1, "eval__every_steps": 0}
    assert f"from step {STEPS}" in run_here(cache, "main", *flags, **further)
    assert [line["step"] for line in records(workdir)] == list(range(1, STEPS + 2))


@pytest.mark.slow
def test_adapters_on_a_small_base_train_as_on_one_device(cache, tmp_path):
    """Each process reads and quantises the whole base; what it trains is split."""
    ranks = {f"{role}__lora__rank": 2 for role in ("retriever", "generator")}
    values = VALUES | ranks | {"generator__base_dtype": "int8", "eval__answers": 0}
    run_here(cache, "main", f"--config={TINY}", f"--workdir={tmp_path / 'alone'}", **values)
    flags = (f"--config={TINY}", f"--workdir={tmp_path / 'run'}")
    ended = run_together(2, 1, cache, *flags, **values | {"mesh__data": 2})
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert_same_record(tmp_path / "run", tmp_path / "alone")


COMPILES_FOR_LONG = """
import time
from rag_jax import cli, main
from rag_jax.training import step as train_step

compiled = train_step.compile_step
train_step.compile_step = lambda *words: time.sleep(40) or compiled(*words)
cli.run(main.main)
"""


@pytest.mark.soak
def test_one_may_compile_for_longer_than_gloo_waits_for_it(cache, tmp_path):
    # Without evaluations, so that the step is where the devices first meet; the same step whatever total_steps is.
    values = VALUES | {"eval__every_steps": 0, "mesh__data": 4}
    command = words("main", f"--config={TINY}", f"--workdir={tmp_path}", **values)
    late = [sys.executable, "-c", COMPILES_FOR_LONG, *command[3:]]
    with started(2, 2, cache, [command, late]) as running:
        outputs = [process.communicate(timeout=600) for process in running]
        assert [process.returncode for process in running] == [0, 0], outputs
    assert [line["step"] for line in records(tmp_path)] == list(range(1, STEPS + 1))
    # And on they go, though the first has met the same programs before.
    values |= {"total_steps": STEPS + 1}
    ended = run_together(2, 2, cache, f"--config={TINY}", f"--workdir={tmp_path}", **values)
    assert [code for code, _, _ in ended] == [0, 0], ended


SAVES_KNOWN_NUMBERS = """
import pathlib, sys
import jax, numpy as np
from rag_jax.distributed import processes, sharding
from rag_jax.workdir import checkpoint

processes.start()
split = jax.sharding.NamedSharding(sharding.make_mesh(1, -1, 1), jax.sharding.PartitionSpec("data"))
known = np.random.default_rng(5).normal(size=(8, 3)).astype(np.float32)
shared = jax.make_array_from_callback(known.shape, split, lambda index: known[index])
with checkpoint.Checkpoints(pathlib.Path(sys.argv[1]), keep=1) as checkpoints:
    checkpoints.save(1, {"params": {"kernel": shared}, "opt_state": {"mu": {"kernel": shared}}})
"""


@pytest.mark.slow
def test_what_two_processes_save_one_restores_bit_for_bit(cache, tmp_path):
    command = [sys.executable, "-c", SAVES_KNOWN_NUMBERS, str(tmp_path)]
    with started(2, 2, cache, [command] * 2) as running:
        outputs = [process.communicate(timeout=600) for process in running]
        assert [process.returncode for process in running] == [0, 0], outputs
    known = np.random.default_rng(5).normal(size=(8, 3)).astype(np.float32)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"kernel": jax.ShapeDtypeStruct((8, 3), np.float32, sharding=one)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore({"params": wanted, "opt_state": {"mu": wanted}}, 1)
    for tree in (restored["params"], restored["opt_state"]["mu"]):
        np.testing.assert_array_equal(tree["kernel"], known)


KEEPS_THE_BEST = """
import json, pathlib, sys
import jax, numpy as np
from rag_jax.distributed import processes, sharding
from rag_jax.workdir import checkpoint

processes.start()
on_all = jax.sharding.NamedSharding(sharding.make_mesh(1, -1, 1), jax.sharding.PartitionSpec())
zeros = jax.make_array_from_callback((3,), on_all, lambda index: np.zeros(3, np.float32))
if jax.process_index() == 1:
    checkpoint.scores = lambda *_: {}  # its view of the shared folder is late
with checkpoint.Checkpoints(pathlib.Path(sys.argv[1]), keep=1) as checkpoints:
    for step in range(1, 5):
        checkpoints.save(step, {"params": {"kernel": zeros}, "opt_state": {"mu": zeros}})
    print("KEPT", checkpoints.steps())
"""


@pytest.mark.slow
def test_processes_agree_on_what_is_kept_though_one_sees_evaluations_late(cache, tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "step_2.json").write_text(json.dumps({"eval/mrr@10": 0.5}))
    command = [sys.executable, "-c", KEEPS_THE_BEST, str(tmp_path)]
    with started(2, 1, cache, [command] * 2) as running:
        outputs = [process.communicate(timeout=600) for process in running]
    assert ["KEPT [2, 4]" in out for out, _ in outputs] == [True, True], outputs
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


@pytest.mark.slow
def test_a_signal_to_one_ends_all_with_one_checkpoint(cache, tmp_path):
    workdir = tmp_path / "run"
    command = words("main", f"--config={TINY}", f"--workdir={workdir}", **RETRIEVER_ONLY | {"total_steps": 10_000})
    with started(2, 1, cache, [command] * 2) as running:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not (workdir / "metrics.jsonl").exists():
            time.sleep(0.2)
        while len((workdir / "metrics.jsonl").read_text().splitlines()) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
        running[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=600) for process in running]
        assert [process.returncode for process in running] == [128 + signal.SIGTERM] * 2, outputs
    steps = [line["step"] for line in records(workdir)]
    assert steps == list(range(1, steps[-1] + 1))
    assert re.search(rf"stopped by SIGTERM after step {steps[-1]}: saved", outputs[0][0])
    assert (workdir / "checkpoints" / str(steps[-1])).is_dir()


@pytest.mark.slow
def test_processes_that_disagree_say_in_what(cache, tmp_path):
    flags = (f"--config={TINY}", f"--workdir={tmp_path / 'run'}")
    commands = [words("main", *flags, **RETRIEVER_ONLY), words("main", *flags, **RETRIEVER_ONLY | {"dropout": 0.2})]
    with started(2, 1, cache, commands) as running:
        outputs = [process.communicate(timeout=600) for process in running]
        assert [process.returncode for process in running] == [2, 2], outputs
    assert "the processes of this run disagree: in process 0 config.dropout is 0.0" in outputs[0][1]
    assert "the processes of this run disagree: in process 1 config.dropout is 0.2" in outputs[1][1]


def test_the_code_that_processes_compare_is_all_of_the_package():
    sources = sorted((ROOT / "rag_jax").rglob("*.py"))
    assert len({path.parent for path in sources}) > 5
    content = b"".join(path.read_bytes() for path in sources)
    assert processes._code() == hashlib.blake2b(content, digest_size=processes.DIGEST_BYTES).hexdigest()


@pytest.mark.slow
def test_where_one_cannot_start_none_does(cache, tmp_path):
    flags = (f"--config={TINY}", f"--workdir={tmp_path / 'run'}")
    commands = [
        words("main", *flags, **RETRIEVER_ONLY),
        words("main", *flags, **RETRIEVER_ONLY | {"data.train": "nothing.csv"}),
    ]
    with started(2, 1, cache, commands) as running:
        outputs = [process.communicate(timeout=600) for process in running]
        assert [process.returncode for process in running] == [2, 2], outputs
    assert "process 1 cannot start; its own message says why" in outputs[0][1]
    assert "nothing.csv" in outputs[1][1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


FAILS_IN_ONE = """
import sys, time
from rag_jax import cli
def main():
    import jax
    from jax.experimental import multihost_utils
    from rag_jax.distributed import processes
    processes.start()
    multihost_utils.sync_global_devices("all are there")
    with processes.GUARD():
        if jax.process_index() == 1:
            raise KeyError("no such shape")
        if "GUARD" == "ends_at_once":  # as in the middle of training
            multihost_utils.sync_global_devices("next")
cli.run(main)
"""


@pytest.mark.parametrize(
    ("guard", "told"),
    [
        ("all_or_none", "process 1 cannot start; its own message says why"),
        ("ends_at_once", "another process of this run has ended"),
    ],
)
def test_any_exception_in_one_ends_all(cache, guard, told):
    """Long before they would miss its heartbeat: the other one learns of it by its word, or by its end."""
    began = time.monotonic()
    with started(2, 1, cache, [[sys.executable, "-c", FAILS_IN_ONE.replace("GUARD", guard)]] * 2) as running:
        outputs = [process.communicate(timeout=100) for process in running]
        codes = [process.returncode for process in running]
    assert time.monotonic() - began < processes.HEARTBEAT_S + 60
    assert "KeyError: 'no such shape'" in outputs[1][1] and codes[1] == 1, outputs
    assert codes[0] != 0 and told in outputs[0][1], outputs


def meet_all(indices, count, timeout_s=2.0, port=None):
    """What each of the processes gets to hear: None or the error."""
    port = port or free_port()
    heard = {}

    def come(index):
        try:
            rendezvous.meet(f"127.0.0.1:{port}", count, index, timeout_s)
            heard[index] = None
        except UserError as error:
            heard[index] = str(error)

    threads = [threading.Thread(target=come, args=(index,)) for index in indices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return heard


def test_all_meet_and_the_port_is_free_again():
    assert meet_all([2, 1, 0], 3, timeout_s=20.0) == {0: None, 1: None, 2: None}


def test_the_missing_are_named_to_all():
    heard = meet_all([0, 2], 4)
    assert "processes 1, 3 of 4 did not come" in heard[0] and "processes 1, 3 of 4 did not come" in heard[2]


def test_without_process_0_there_is_nobody_to_ask():
    heard = meet_all([1], 2, timeout_s=0.5)
    assert re.match(r"process 1 of 2: process 0 was not to be reached at 127\.0\.0\.1:\d+ within 0\.5 s", heard[1])


def test_strangers_at_the_door_do_no_harm():
    port = free_port()
    stranger = threading.Thread(target=_shout, args=(port,))
    stranger.start()
    assert meet_all([0, 1], 2, timeout_s=20.0, port=port) == {0: None, 1: None}
    stranger.join()


def _shout(port):
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[1]\n", b"x" * 10_000):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as door:
            door.sendall(noise)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["x:1"], "is set, but not JAX_NUM_PROCESSES, JAX_PROCESS_ID; set all three or none"),
        (["x:1", "2", "one"], "JAX_PROCESS_ID=one: must be a whole number"),
        (["x:1", "2", "2"], "JAX_PROCESS_ID=2: must be below"),
        (["x", "2", "1"], "JAX_COORDINATOR_ADDRESS=x: must be HOST:PORT"),
    ],
)
def test_contradicting_variables(monkeypatch, given, message):
    for name in (*processes.VARIABLES, processes.ASKED):
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(processes.VARIABLES, given, strict=False):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(message)):
        processes.start()


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        ({}, False),
        ({"RAG_JAX_DISTRIBUTED": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2", "RAG_JAX_DISTRIBUTED": "0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ],
)
def test_clusters_are_recognised(monkeypatch, given, joined):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *where, **_: calls.append(where))
    for name in (*processes.VARIABLES, processes.ASKED, "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    processes.start()
    assert calls == ([()] if joined else [])


def test_a_late_start_ends_with_a_line_of_ours():
    """In a cluster that jax knows nobody can say who is missing, but that somebody is."""
    program = (
        "import time\nfrom rag_jax.distributed import processes\nprocesses.EXIT_S = 0.5\n"
        "with processes._giving_up_after(1):\n    time.sleep(30)\n"
    )
    there = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=there, timeout=20)
    assert ended.returncode == 2
    assert ended.stderr.startswith("rag_jax: error: the other processes of this run did not come within 1 s")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("no room"), "rag_jax: error: no room\n"),
        (
            jax.errors.JaxRuntimeError("Gloo AllGather failed"),
            "rag_jax: error: another process of this run has ended (Gloo",
        ),
        (ValueError("Gloo AllGather failed"), "rag_jax: error: another process of this run has ended (Gloo"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), None),
        (KeyError("a fault of ours"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_an_error_of_one_of_several_ends_it_at_once(monkeypatch, capsys, error, told):
    ended = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(type(error)), processes.ends_at_once():
        raise error
    assert ended == [2 if told else 1]
    assert capsys.readouterr().err.startswith(told or "Traceback (most recent call last):")
