"""Flags and overrides as typed, one line and exit 2 for what the user can mend, no noise."""

import os
import pathlib
import subprocess
import sys

import pytest

from rag_jax import cli, config, main
from rag_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def command(*words, module="rag_jax.main"):
    process = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


def parse(*words):
    flags = cli.parser("main", "doc")
    flags.add_argument("--config")
    flags.add_argument("--step")
    return cli.parse(flags, words)


def test_overrides_with_an_equals_sign_or_apart_the_last_wins():
    args, overrides = parse(
        "--config.mesh.data", "-1", "--config=a.py", "--config.prompt.query=a=b {query}", "--step", "3",
        "--config.seed=1", "--config.seed=2", "--config.retriever.query_prefix=",
    )  # fmt: skip
    assert (args.config, args.step) == ("a.py", "3")
    assert overrides == {
        "mesh.data": "-1",
        "prompt.query": "a=b {query}",
        "seed": "2",
        "retriever.query_prefix": "",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.seed"], "--config.seed: needs a value, --config.seed=VALUE"),
        (["--config.seed", "--step=3"], "--config.seed: needs a value"),
        (["--stp=3"], "unrecognized arguments: --stp=3; see python -m rag_jax.main --help"),
        (["--step"], "argument --step: expected one argument"),
    ],
)
def test_mistyped_flags_are_our_errors(words, message):
    with pytest.raises(UserError) as error:
        parse(*words)
    assert message in str(error.value)


def exit_of(body, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(body)
    return end.value.code, capsys.readouterr().err


def test_how_a_command_ends(capsys, monkeypatch):
    def user_error():
        raise UserError("a:\n  b")

    def interrupted():
        raise KeyboardInterrupt

    def bug():
        raise ZeroDivisionError

    assert exit_of(lambda: None, capsys) == (0, "")
    assert exit_of(user_error, capsys) == (2, "rag_jax: error: a: b\n")
    assert exit_of(interrupted, capsys) == (130, "rag_jax: interrupted\n")
    with pytest.raises(ZeroDivisionError):
        cli.run(bug)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --config"),
        (["--config=none.py", "--workdir=x"], "--config=none.py: no such file"),
        (["--config=configs/tiny.py", "--workdir=x", "--config.sead=1"], "unknown key sead; did you mean seed?"),
        (["--config=configs/bge_gpt2.py", "--workdir=x"], "data.train=None: give it a value"),
        (["--config=configs/tiny.py", "--workdir=setup.py"], "--workdir=setup.py: is a file; give a folder"),
    ],
)
def test_training_answers_mistakes_with_one_line_and_exit_2(words, message):
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err.startswith("rag_jax: error: ") and err.count("\n") == 1 and message in err


def test_help_lists_flags_and_config_keys():
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert "--workdir DIR" in out and "objective.candidates" in out and "optimizer.rate_rules" in out


def test_a_folder_with_a_strangers_records_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    main.check_workdir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"holds metrics\.jsonl but no config\.json of a run; give a new folder"):
        main.check_workdir(tmp_path)
    (tmp_path / "config.json").write_text(config.to_json(config.load(ROOT / "configs" / "tiny.py")))
    main.check_workdir(tmp_path)


@pytest.mark.parametrize("content", [b'{"model_type": "bert"}', b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_config_of_something_else_is_not_overwritten(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"holds a config\.json of something else, not of a run; give a new folder"):
        main.check_workdir(tmp_path)


@pytest.mark.parametrize("name", ["a*b", "what?", "[1]"])
def test_a_folder_that_orbax_would_take_for_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="which Orbax takes for a wildcard; give another folder"):
        main.check_workdir(tmp_path / name / "run")


def test_third_parties_are_quiet_and_warnings_can_be_asked_for():
    program = (
        "from rag_jax import cli\n"
        "import warnings, logging\n"
        "def main():\n"
        "    import absl.logging, transformers\n"
        "    warnings.warn('a hint for developers')\n"
        "    logging.getLogger('absl').warning('a note')\n"
        "    logging.getLogger('absl').error('a fault')\n"
        "cli.run(main)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "TRANSFORMERS"))}
    environment["PYTHONPATH"] = str(ROOT)

    def said(*options):
        words = [sys.executable, *options, "-c", program]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment).stderr

    quiet = said()
    assert "a fault" in quiet and "a note" not in quiet and "a hint" not in quiet
    assert "a hint" in said("-W", "default")


MANY_PROGRAMS = """
from rag_jax import cli
cli.prepare_environment()
import jax, numpy as np
from rag_jax.distributed import sharding

mesh = sharding.make_mesh(1, 8, 1)
split = jax.sharding.PartitionSpec("data")
total = jax.shard_map(lambda a: jax.lax.psum(a, "data"), mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
ones = jax.device_put(np.ones((8, 64), np.float32), jax.sharding.NamedSharding(mesh, split))
many = [jax.jit(total)(ones) for _ in range(400)]
print(float(many[-1].sum()))
"""


def test_hundreds_of_programs_under_way_on_fake_devices_do_not_wait_for_each_other_for_ever():
    here = {name: value for name, value in os.environ.items() if name != "NPROC"}
    here |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", MANY_PROGRAMS], env=here, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, f"{8 * 8 * 64.0}\n"), ended.stderr


def test_threads_for_devices():
    assert cli.threads_for("--xla_force_host_platform_device_count=8 --other=1") == "32"
    assert cli.threads_for("--xla_force_host_platform_device_count=1") is None and cli.threads_for("") is None
