"""The launch scripts: processes on this machine for real, Slurm for real where it is installed, clouds by stand-ins."""

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import time

import pytest
import yaml
from command import ROOT, TINY, environment
from test_loop import records

LAUNCH = ROOT / "launch"
ARGS = ("--config=configs/tiny.py", "--workdir=/data/a run", "--config.prompt.query=say \"a\" & 'b' \\n $(c) {{NAME}}")
POD = {"TPU_NAME": "pod", "ZONE": "zone-a", "ACCELERATOR_TYPE": "v6e-16", "RUNTIME_VERSION": "v2", "POLL_S": "0"}
JOBSET = {"NAME": "run", "IMAGE": "repo/rag_jax:1", "ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "4x4", "BUCKET": "rows"}


def call(script, *words, environ=(), cwd=ROOT, path=None):
    """Exit code, stdout and stderr of a launch script, in an environment without what this one may hold."""
    process = subprocess.run(
        [path or LAUNCH / script, *map(str, words)], cwd=cwd, env=clean(environ), capture_output=True, text=True
    )
    return process.returncode, process.stdout, process.stderr


def clean(more=()):
    ours = {*POD, *JOBSET, "SPOT", "SLICES", "PROJECT", "PREPARE", "DRY_RUN", "PYTHON", "RAG_JAX_DISTRIBUTED"}
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("SLURM_", "JAX_COORD"))}
    return kept | dict(more)


def executable(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
    return path


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def alive(pid):
    """Whether it runs; one that has ended and waits for its parent's look does not."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# --- all scripts ---


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh", "gke.sh", "tpu_pod.sh", "tpu_worker.sh"])
def test_help_is_the_scripts_head(script):
    code, out, err = call(script, "--help")
    assert (code, err) == (0, "")
    assert out.count("\n") >= 4 and f"launch/{script}" in out and "#!" not in out and "set -e" not in out


@pytest.mark.parametrize(
    ("words", "environ", "message"),
    [
        (("local.sh",), {}, "nothing to run; give -- --config=FILE.py --workdir=DIR"),
        (("local.sh", "--processes=0", "--", "--config=a"), {}, "--processes=0: must be a whole number of at least 1"),
        (("local.sh", "--config=a"), {}, "--config=a: unknown flag; flags of the training stand after --"),
        (("slurm.sh", "--nodes=2"), {}, "nothing to run"),
        (("slurm.sh", "--workdir=a"), {}, "--workdir=a: flags of the training stand after --"),
        (("slurm.sh", "--nodes", "2"), {}, "2: write options of sbatch as --OPTION=VALUE"),
        (("slurm.sh", "--", "--config=a"), {}, "no --workdir=DIR after --"),
        (("slurm.sh", "--nodes=2", "--", "a"), {"SLURM_JOB_ID": "1"}, "--nodes=2: inside a job the allocation is made"),
        (("gke.sh",), {}, "no command: must be one of apply, render"),
        (("gke.sh", "aply"), {}, "aply: must be one of apply, render"),
        (("gke.sh", "apply", "--", "a"), {"NAME": "x"}, "set IMAGE ACCELERATOR TOPOLOGY BUCKET;"),
        (("gke.sh", "apply"), JOBSET, "nothing to run"),
        (("gke.sh", "apply", "--", "a"), JOBSET | {"TOPOLOGY": "4by4"}, "TOPOLOGY=4by4: must be like 4x4"),
        (("gke.sh", "apply", "--", "a"), JOBSET | {"TOPOLOGY": "3x3"}, "3x3 has 9 chips, which CHIPS_PER_HOST=4"),
        (("gke.sh", "apply", "--", "a"), JOBSET | {"SLICES": "two"}, "SLICES=two: must be a whole number"),
        (("gke.sh", "apply", "--", "a"), JOBSET | {"NAME": "My run"}, "NAME=My run: must be lower-case"),
        (("gke.sh", "apply", "--", "a"), JOBSET | {"BUCKET": "gs://x"}, "give the bucket's name alone, x"),
        (("tpu_pod.sh", "start"), {}, "start: must be one of create, setup, run, resume, stop, status, delete"),
        (("tpu_pod.sh", "create"), {"ZONE": "z"}, "set TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION;"),
        (("tpu_pod.sh", "run", "--", "a"), {}, "set TPU_NAME ZONE;"),
        (("tpu_pod.sh", "run"), POD, "nothing to run"),
        (("tpu_pod.sh", "run", "--config=a"), POD, "--config=a: unknown flag; flags of the training stand after --"),
        (("tpu_worker.sh", "go"), {}, "go: must be one of setup, run, stop"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(words, environ, message):
    code, out, err = call(*words, environ=environ)
    assert (code, out) == (2, "")
    assert err.startswith(f"launch/{words[0]}: error: ") and err.count("\n") == 1 and message in err


# --- processes on this machine ---


def stand_in(tmp_path, body):
    """A program in Python's place; $ID is the process's number, $HERE a folder of the test."""
    head = f"ID=${{JAX_PROCESS_ID:-0}} HERE={shlex.quote(str(tmp_path))}\necho $$ >$HERE/pid-$ID\n"
    return {"PYTHON": str(executable(tmp_path / "bin" / "python", head + body)), "TMPDIR": str(tmp_path)}


def pids(tmp_path):
    return [int(path.read_text()) for path in tmp_path.glob("pid-*")]


@pytest.mark.soak
def test_two_processes_train(tmp_path):
    words = ("--processes=2", "--devices-per-process=2", f"--logs={tmp_path / 'logs'}", "--", f"--config={TINY}")
    words += (f"--workdir={tmp_path / 'run'}", "--config.total_steps=2", "--config.batch_size=16")
    words += ("--config.eval.every_steps=0", "--config.checkpoint.every_steps=0")
    code, out, err = call("local.sh", *words, environ=environment(tmp_path / "cache"))
    log = (tmp_path / "logs" / "process-1.log").read_text()
    assert code == 0, err + log
    assert "devices    4 cpu" in out and "trained to step 2" in out
    assert "trained" not in log, "one process speaks for all"
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2]


def test_what_local_would_run(tmp_path):
    more = stand_in(tmp_path, "") | {"XLA_FLAGS": "--a=1"}
    code, out, _ = call("local.sh", "--dry-run", "--", *ARGS, environ=more)
    assert code == 0 and shlex.split(out) == [more["PYTHON"], "-m", "rag_jax.main", *ARGS]
    words = ("--processes=3", "--devices-per-process=2", "--dry-run", "--", *ARGS)
    code, out, _ = call("local.sh", *words, environ=more)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert code == 0 and len(lines) == 3
    for index, line in enumerate(lines):
        given = dict(word.split("=", 1) for word in line[1:7])
        assert line[0] == "env" and line[7:] == [more["PYTHON"], "-m", "rag_jax.main", *ARGS]
        assert (given["JAX_NUM_PROCESSES"], given["JAX_PROCESS_ID"]) == ("3", str(index))
        assert given["JAX_COORDINATOR_ADDRESS"] == given["JAX_COORDINATOR_BIND_ADDRESS"]
        assert given["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")
        assert given["JAX_COORDINATOR_ADDRESS"] == lines[0][1].split("=")[1]
        assert given["JAX_LOCAL_DEVICE_IDS"] == f"{2 * index},{2 * index + 1}"
        assert given["XLA_FLAGS"] == "--a=1 --xla_force_host_platform_device_count=2"
    assert pids(tmp_path) == []


def test_one_process_is_the_plain_command_and_its_exit_code(tmp_path):
    more = stand_in(tmp_path, 'echo "${JAX_NUM_PROCESSES-none} $*"; exit 7')
    code, out, err = call("local.sh", "--", *ARGS, environ=more)
    assert (code, out, err) == (7, f"none -m rag_jax.main {' '.join(ARGS)}\n", "")


def test_a_process_that_fails_ends_the_others(tmp_path):
    body = """
    if ((ID == 2)); then while [[ ! -f $HERE/pid-0 || ! -f $HERE/pid-1 ]]; do sleep 0.05; done; echo broken; exit 3; fi
    if ((ID == 1)); then trap "" TERM; fi # as one that waits for the others within a step
    for _ in {1..600}; do sleep 0.1; done
    """
    more = stand_in(tmp_path, body)
    began = time.monotonic()
    code, out, err = call("local.sh", "--processes=3", "--grace=1", "--", "a", environ=more)
    assert (code, out) == (3, "") and time.monotonic() - began < 20
    assert "process 2 of 3 ended with exit code 3" in err and "broken" in err
    assert len(pids(tmp_path)) == 3 and not any(map(alive, pids(tmp_path)))
    assert len(list(tmp_path.glob("rag_jax-logs.*/process-*.log"))) == 2, "kept after a failure"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once_and_all_may_save(tmp_path, number):
    body = f"""
    count=0
    trap 'count=$((count + 1))' TERM INT
    echo >$HERE/ready-$ID
    while ((!count)); do sleep 0.05; done
    for _ in {{1..10}}; do sleep 0.1; done
    if ((ID == 1)); then for _ in {{1..10}}; do sleep 0.1; done; fi # one takes longer to save than the other
    echo $count >$HERE/saved-$ID
    exit {128 + number}
    """
    more = stand_in(tmp_path, body)
    words = [LAUNCH / "local.sh", "--processes=2", "--grace=1", "--", "a"]
    # In a session of its own, so that the signal could also reach the processes as a terminal's does. Who started us
    # may ignore SIGINT, as a shell does for what it puts in the background, and a script cannot trap that any more.
    process = subprocess.Popen(
        words,
        env=clean(more),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert [(tmp_path / f"saved-{i}").read_text() for i in range(2)] == ["1\n", "1\n"]
    assert err == "" and not list(tmp_path.glob("rag_jax-logs.*"))


@pytest.mark.soak
def test_two_processes_stop_at_one_step_and_go_on(tmp_path):
    words = ("--processes=2", f"--logs={tmp_path / 'logs'}", "--", f"--config={TINY}", f"--workdir={tmp_path / 'run'}")
    words += ("--config.eval.every_steps=0", "--config.checkpoint.every_steps=2")
    more = environment(tmp_path / "cache")
    command = [LAUNCH / "local.sh", *words, "--config.total_steps=1000"]
    process = subprocess.Popen(command, cwd=ROOT, env=clean(more), stdout=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_for(lambda: process.poll() is not None or any(checkpoints.glob("[0-9]*")), 600)
    process.terminate()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM after step" in out
    step = max(int(path.name) for path in checkpoints.glob("[0-9]*"))
    for said in (f"trained to step {step + 2}", f"is trained to step {step + 2} already"):
        code, out, err = call("local.sh", *words, f"--config.total_steps={step + 2}", environ=more)
        assert code == 0 and said in out, err
        assert [line["step"] for line in records(tmp_path / "run")] == list(range(1, step + 3))


# --- clouds ---

# Notes what it was called with. `describe` and `get` answer the next line of the file `answers`; a training ends with
# the next code of the file `codes`.
CLOUD = """
printf '%s\\0' "${0##*/}" "$@" >>"$RECORD"
printf '\\n' >>"$RECORD"
next() { head -n 1 "$1" && sed -i 1d "$1"; }
case " $* " in
  *" describe "* | *" get jobset "*)
    answer=$(next "$ANSWERS")
    if [[ $answer == *NOT_FOUND* ]]; then echo "ERROR: (gcloud) $answer" >&2; exit 1; fi
    if [[ $answer == denied ]]; then echo "ERROR: denied" >&2; exit 1; fi
    echo "$answer" ;;
  *"tpu_worker.sh run"*) exit "$(next "$CODES")" ;;
  *" apply "*) cat >"$RECORD.stdin" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """A function that runs a script against stand-ins: (answers, codes) -> exit code, output, calls."""
    for name in ("gcloud", "kubectl"):
        executable(tmp_path / "bin" / name, CLOUD)

    def go(*words, answers=(), codes=(), **environ):
        record = tmp_path / "record"
        record.write_text("")
        more = {"RECORD": str(record), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
        for name, lines in {"answers": answers, "codes": codes}.items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
            more[name.upper()] = str(tmp_path / name)
        code, out, err = call(*words, environ=environ | more)
        return code, out + err, [line.split("\0") for line in record.read_text().split("\0\n") if line]

    return go


def verbs(calls):
    """`create`, `scp` ... of calls of gcloud."""
    return [call[4] for call in calls]


def test_a_pod_from_nothing_runs_what_the_dry_run_printed(cloud, tmp_path):
    for spot in ("", "1"):
        ready = "ACTIVE" if spot else "READY"
        answers = ["NOT_FOUND", "CREATING", ready]
        more = POD | {"SPOT": spot, "PROJECT": "mine", "PREPARE": "mount x"}
        code, out, dry = cloud("tpu_pod.sh", "resume", "--dry-run", "--", *ARGS, **more)
        assert code == 0 and dry == []
        printed = [shlex.split(line) for line in out.splitlines()]
        code, out, calls = cloud("tpu_pod.sh", "resume", "--", *ARGS, answers=answers, codes=[0], **more)
        assert code == 0, out
        assert verbs(calls) == ["describe", "create", "describe", "describe", "scp", "ssh", "ssh", "ssh"]
        once = [c for i, c in enumerate(calls) if c not in calls[:i]]
        assert once == [line for line in printed if line[0] == "gcloud"]
        assert all("--zone=zone-a" in c and "--project=mine" in c for c in calls)
        assert ("--spot" in calls[1]) == bool(spot) and calls[1][3] == ("queued-resources" if spot else "tpu-vm")
        command = calls[-1][-1].removeprefix("--command=")
        assert shlex.split(command) == ["rag_jax/launch/tpu_worker.sh", "run", *ARGS] and "--worker=all" in calls[-1]
        names = subprocess.run(["tar", "-tzf", tmp_path / "rag_jax-pod.tgz"], capture_output=True, text=True).stdout
        assert "launch/tpu_worker.sh\n" in names and ".venv/" not in names and ".git/" not in names


def test_create_leaves_what_is_there_and_replaces_what_was_taken(cloud):
    code, _, calls = cloud("tpu_pod.sh", "create", answers=["READY"], **POD)
    assert code == 0 and verbs(calls) == ["describe"]
    answers = ["SUSPENDING", "SUSPENDED", "NOT_FOUND", "ACTIVE"]
    code, _, calls = cloud("tpu_pod.sh", "create", answers=answers, SPOT="1", **POD)
    assert code == 0 and verbs(calls) == ["describe", "describe", "delete", "describe", "create", "describe"]
    assert "--force" in calls[2]
    code, out, calls = cloud("tpu_pod.sh", "create", answers=["FAILED"], SPOT="1", **POD)
    assert code == 2 and "pod could not be had" in out and verbs(calls) == ["describe"]
    code, out, calls = cloud("tpu_pod.sh", "create", answers=["denied"], **POD)
    assert code == 2 and "ERROR: denied" in out and verbs(calls) == ["describe"]


def test_resume_goes_on_after_a_preemption_but_not_after_a_failure(cloud):
    answers = ["ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "NOT_FOUND", "ACTIVE"]
    code, out, calls = cloud("tpu_pod.sh", "resume", "--", "a", answers=answers, codes=[255, 0], SPOT="1", **POD)
    assert code == 0 and "was taken away (SUSPENDED)" in out
    runs = [c[-1] for c in calls if "tpu_worker.sh run" in c[-1]]
    assert len(runs) == 2 and runs[0] == runs[1]
    assert verbs(calls).count("create") == verbs(calls).count("delete") == 1
    code, out, calls = cloud("tpu_pod.sh", "resume", "--", "a", answers=["READY"] * 5, codes=[2], **POD)
    assert code == 2 and len([c for c in calls if "tpu_worker.sh run" in c[-1]]) == 1


def test_other_commands_of_a_pod(cloud):
    for action, verb in {"stop": "ssh", "status": "describe", "delete": "delete"}.items():
        code, out, _ = cloud("tpu_pod.sh", action, "--dry-run", **POD)
        code_of_run, _, calls = cloud("tpu_pod.sh", action, answers=["READY"], **POD)
        assert code == code_of_run == 0 and calls[-1] == shlex.split(out) and verbs(calls)[-1] == verb
    code, _, calls = cloud("tpu_pod.sh", "delete", answers=["NOT_FOUND"], **POD)
    assert code == 0 and verbs(calls) == ["describe"]
    code, _, calls = cloud("tpu_pod.sh", "run", "--", "a", codes=[3], **POD)
    assert code == 3 and len(calls) == 1


def test_a_worker_trains_apart_from_its_connection(tmp_path):
    """`run` again follows what runs; `stop` lets it save; the exit code is the training's."""
    copy = tmp_path / "rag_jax" / "launch"
    shutil.copytree(LAUNCH, copy)
    body = """
    echo "$RAG_JAX_DISTRIBUTED $*"
    [[ $3 != fail ]] || exit 5
    trap 'sleep 0.5; echo saved; exit 143' TERM
    echo >$HERE/ready
    for _ in {1..600}; do sleep 0.1; done
    """
    more = stand_in(tmp_path, body)
    worker = copy / "tpu_worker.sh"
    assert call("", "run", "fail", environ=more, path=worker) == (5, "1 -m rag_jax.main fail\n", "")
    assert call("", "stop", environ=more, path=worker) == (0, "", "")
    (tmp_path / "pid-0").unlink()
    words = {"env": clean(more), "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    first = subprocess.Popen([worker, "run", "a b"], **words)
    wait_for((tmp_path / "ready").exists)
    os.killpg(first.pid, signal.SIGKILL)  # the connection is lost
    first.communicate()
    second = subprocess.Popen([worker, "run", "a b"], **words)
    said = [second.stdout.readline(), second.stdout.readline()]
    assert call("", "stop", environ=more, path=worker)[0] == 0
    out, _ = second.communicate(timeout=30)
    said.append(out)
    assert second.returncode == 143
    assert said == ["launch/tpu_worker.sh: runs already; this is its output\n", "1 -m rag_jax.main a b\n", "saved\n"]
    assert not any(map(alive, pids(tmp_path)))


def test_the_jobset(cloud):
    code, text, _ = cloud("gke.sh", "render", "--", *ARGS, SLICES="3", **JOBSET)
    assert code == 0 and "{{" not in text.replace("{{NAME}}", "", 1) and "template:\n" in text
    jobset = yaml.safe_load(text)
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "run")
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 3 and jobset["spec"]["failurePolicy"]["maxRestarts"] == 100
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (4, 4, 0)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "rag_jax.main"]
    assert [word.replace("$$(", "$(") for word in container["args"]] == list(ARGS)
    assert {"name": "RAG_JAX_DISTRIBUTED", "value": "1"} in container["env"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4} and container["image"] == "repo/rag_jax:1"
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "rows"
    _, text, _ = cloud("gke.sh", "render", "--", "a", SPOT="1", **JOBSET | {"TOPOLOGY": "1x1"})
    (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and len(pod["tolerations"]) == 2
    assert job["template"]["spec"]["parallelism"] == pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == 1


def test_a_jobset_is_applied_again_only_after_it_has_ended(cloud, tmp_path):
    code, printed, dry = cloud("gke.sh", "apply", "--dry-run", "--", *ARGS, **JOBSET)
    assert code == 0 and dry == []
    get, apply, *manifest = printed.splitlines()
    for state, words in {"": ["get", "apply"], "Completed": ["get", "delete", "apply"]}.items():
        code, _, calls = cloud("gke.sh", "apply", "--", *ARGS, answers=[state], **JOBSET)
        assert code == 0 and [call[3] for call in calls] == words
        assert calls[0] == shlex.split(get) and calls[-1] == shlex.split(apply.removesuffix("<<'END'"))
        assert (tmp_path / "record.stdin").read_text().splitlines() == manifest[:-1]
    for action, verb in {"status": "get", "logs": "logs", "delete": "delete"}.items():
        code, out, _ = cloud("gke.sh", action, "--dry-run", **JOBSET)
        _, _, calls = cloud("gke.sh", action, answers=["run"], **JOBSET)
        assert code == 0 and calls == [shlex.split(line) for line in out.splitlines()] and calls[0][3] == verb


# --- Slurm ---


def test_what_slurm_would_run(tmp_path):
    more = stand_in(tmp_path, "")
    words = ("--nodes=2", "--gpus-per-node=8", "--dry-run", "--", *ARGS)
    code, out, _ = call("slurm.sh", *words, environ=more)
    assert code == 0 and shlex.split(out) == [
        "env", f"RAG_JAX_ROOT={ROOT}", "sbatch", "--job-name=rag_jax:/data/a run", "--dependency=singleton",
        "--nodes=2", "--gpus-per-node=8", str(LAUNCH / "slurm.sh"), "--", *ARGS,
    ]  # fmt: skip
    job = more | {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "6"}
    code, out, _ = call("slurm.sh", "--dry-run", "--", *ARGS, environ=job)
    line = shlex.split(out)
    assert code == 0 and line[:5] == [
        "env", "RAG_JAX_DISTRIBUTED=1", "srun", "--kill-on-bad-exit=1", "--cpus-per-task=6"
    ]  # fmt: skip
    assert line[-3 - len(ARGS) :] == [more["PYTHON"], "-m", "rag_jax.main", *ARGS]
    assert pids(tmp_path) == []


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm of two nodes of two pretended GPUs each, all of it on this machine; the variables that lead to it."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "srun", "sbatch") if not shutil.which(name)]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)} (Debian: apt-get install slurm-wlm)")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts only as root")
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().split(".")[0]
    controller, *nodes = free_ports(3)
    names = [host, f"{host}-b"]  # the first must be a name that resolves: jax meets there
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    (folder / "state").mkdir()
    for index in range(2):
        (folder / f"gpu{index}").write_text("")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/socket
CommunicationParameters=NoInAddrAny
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
GresTypes=gpu
NodeName={",".join(names)} NodeHostname={host} NodeAddr=127.0.0.1 Port={nodes[0]},{nodes[1]} CPUs=2 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/socket", f"--key-file={folder}/key"]
    munge += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    daemons = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in names)]
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}
    started = []

    def slurm(*words):
        return subprocess.run(words, env=clean(variables), capture_output=True, text=True).stdout

    try:
        for index, words in enumerate(daemons):
            with (folder / f"daemon-{index}.log").open("w") as log:
                started.append(subprocess.Popen(words, env=clean(variables), stdout=log, stderr=log))
            if index == 0:
                wait_for((folder / "socket").exists)
        wait_for(lambda: slurm("sinfo", "--noheader", "--format=%t %D").strip() == "idle 2")
        yield slurm, variables
        slurm("scancel", "--me")
        wait_for(lambda: not slurm("squeue", "--noheader"))
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=30)


def submit(cluster, cwd, *words, environ):
    code, out, err = call("slurm.sh", *words, environ=environ | cluster[1], cwd=cwd)
    assert code == 0, err
    return out.split()[-1]


@pytest.mark.soak
def test_slurm_trains_on_two_nodes(cluster, tmp_path):
    flags = (f"--config={TINY}", f"--workdir={tmp_path / 'run'}", f"--config.data.train={ROOT}/tests/data/rows.csv")
    flags += ("--config.total_steps=2", "--config.data.eval=None", "--config.eval.every_steps=0")
    job = submit(cluster, tmp_path, "--nodes=2", "--wait", "--", *flags, environ=environment(tmp_path / "cache"))
    printed = (tmp_path / f"rag_jax-{job}.log").read_text()
    assert "devices    2 cpu" in printed and "trained to step 2" in printed, printed
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_slurm_gives_a_process_its_nodes_gpus_and_queues_again_what_saved(cluster, tmp_path):
    body = """
    echo $SLURM_PROCID of $SLURM_NTASKS: ${JAX_LOCAL_DEVICE_IDS-none} $RAG_JAX_DISTRIBUTED $*
    trap 'sleep 0.5; echo saved; exit 143' TERM
    for _ in {1..1200}; do sleep 0.1; done
    """
    slurm, _ = cluster
    more = stand_in(tmp_path, body)
    words = ("--nodes=2", "--gpus-per-node=2", "--", "--config=a", "--workdir=b")
    job = submit(cluster, tmp_path, *words, environ=more)
    twice = submit(cluster, tmp_path, *words, environ=more)
    log = tmp_path / f"rag_jax-{job}.log"
    wait_for(lambda: log.exists() and log.read_text().count("\n") == 2)
    expected = [f"{i} of 2: 0,1 1 -m rag_jax.main --config=a --workdir=b" for i in range(2)]
    assert sorted(log.read_text().splitlines()) == expected
    assert slurm("squeue", "--noheader", f"--job={twice}", "--format=%r").strip() == "Dependency"
    slurm("scancel", twice)
    slurm("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    wait_for(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job))
    assert log.read_text().count("saved\n") == 2 and f"queuing job {job} again" in log.read_text()
    slurm("scancel", job)
    # One process a GPU, if asked for: then jax's own choice is right. And scancel ends for good.
    job = submit(cluster, tmp_path, "--ntasks-per-node=2", *words, environ=more)
    log = tmp_path / f"rag_jax-{job}.log"
    wait_for(lambda: log.exists() and log.read_text().count("\n") == 4)
    assert log.read_text().count(" of 4: none 1 ") == 4
    slurm("scancel", job)
    wait_for(lambda: log.read_text().count("saved\n") == 4)
    wait_for(lambda: "JobState=CANCELLED" in slurm("scontrol", "show", "job", job))
    assert "Restarts=0" in slurm("scontrol", "show", "job", job)
