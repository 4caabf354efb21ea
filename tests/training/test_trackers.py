"""Services that numbers are sent to: what they are told, and that none of them can stop or slow a run."""

import json
import sys
import threading
import time
import types

import pytest

from rag_jax import config
from rag_jax.errors import UserError
from rag_jax.training import trackers
from rag_jax.training.writer import open_writer

CONFIG = {"seed": 0, "data.train": "rows.csv"}


@pytest.fixture
def told(monkeypatch):
    """What stand-ins of the three packages were called with."""
    calls = []

    def recorder(name, result=None):
        def call(*args, **kwargs):
            calls.append((name, args, kwargs))
            return result

        return call

    run = types.SimpleNamespace(log=recorder("wandb.log"), finish=recorder("wandb.finish"))
    mlflow_run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    packages = {
        "wandb": {"Settings": lambda **settings: settings, "init": recorder("wandb.init", run)},
        "mlflow": {
            "set_experiment": recorder("mlflow.set_experiment"),
            "start_run": recorder("mlflow.start_run", mlflow_run),
            "log_params": recorder("mlflow.log_params"),
            "log_metrics": recorder("mlflow.log_metrics"),
            "end_run": recorder("mlflow.end_run"),
        },
        "trackio": {name: recorder(f"trackio.{name}") for name in ("init", "log", "finish")},
    }
    for name, members in packages.items():
        package = types.ModuleType(name)
        vars(package).update(members)
        package.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, package)
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return calls


def of(calls, name):
    return [(args, kwargs) for called, args, kwargs in calls if called == name]


def test_all_three_get_every_number_once_and_the_config(told, tmp_path):
    workdir = tmp_path / "my run"
    with open_writer(workdir, services=config.TRACKERS, config=CONFIG) as writer:
        writer.write(1, {"loss/total": 2.0, "eval/recall@1": 0.5, "eval/em": None})
        writer.write(2, {"loss/total": 1.0})
    assert of(told, "wandb.log") == [
        (({"loss/total": 2.0, "eval/recall@1": 0.5},), {"step": 1}),
        (({"loss/total": 1.0},), {"step": 2}),
    ]
    ((_, begun),) = of(told, "wandb.init")
    assert (begun["project"], begun["name"], begun["id"], begun["resume"]) == ("rag_jax", "my run", "my_run", None)
    assert begun["config"] == CONFIG and begun["settings"]["disable_code"] and begun["settings"]["disable_git"]
    assert of(told, "mlflow.log_metrics")[0] == (({"loss/total": 2.0, "eval/recall_at_1": 0.5},), {"step": 1})
    assert of(told, "mlflow.log_params") == [(({"seed": "0", "data.train": "rows.csv"},), {})]
    assert of(told, "trackio.log") == of(told, "wandb.log")
    assert all(len(of(told, name)) == 1 for name in ("wandb.finish", "mlflow.end_run", "trackio.finish"))
    assert {line["step"] for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())} == {1, 2}


def test_a_run_that_goes_on_is_the_same_run_there(told, tmp_path):
    for start in (0, 3):
        open_writer(tmp_path / "run", start, services=config.TRACKERS, config=CONFIG).close()
    assert [kwargs["resume"] for _, kwargs in of(told, "wandb.init")] == [None, "allow"]
    assert [kwargs["run_id"] for _, kwargs in of(told, "mlflow.start_run")] == [None, "r1"]
    assert [kwargs["resume"] for _, kwargs in of(told, "trackio.init")] == ["never", "allow"]


@pytest.mark.parametrize("when", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), SystemExit(1)], ids=["gone", "ends processes"])
def test_one_that_fails_costs_a_line(told, tmp_path, monkeypatch, capsys, when, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(sys.modules["trackio"], when, fails)
    with open_writer(tmp_path, services=("trackio",), config=CONFIG) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss/total": 1.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("log.trackers: trackio failed (") and "the run goes on" in line
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_one_that_hangs_costs_no_step_and_little_at_the_end(told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.2)
    monkeypatch.setattr(trackers, "MOST_WAITING", 50)
    never = threading.Event()
    monkeypatch.setattr(sys.modules["trackio"], "log", lambda *args, **kwargs: never.wait())
    began = time.monotonic()
    with open_writer(tmp_path, services=("trackio",), config=CONFIG) as writer:
        for step in range(1, 201):
            writer.write(step, {"loss/total": 1.0})
    assert time.monotonic() - began < 10
    (line,) = capsys.readouterr().err.splitlines()
    assert "takes nothing any more" in line
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 200
    never.set()


def test_a_service_that_is_not_installed_is_named():
    with pytest.raises(UserError, match=r"log.trackers=\('wandb',\): wandb is not installed; pip install wandb"):
        trackers.check(("wandb",))
    trackers.check(())
    assert set(trackers.TRACKERS) == set(config.TRACKERS)
