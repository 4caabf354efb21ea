"""Every shipped config, overrides by kind, all problems in one line, files that cannot be used, JSON."""

import ast
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from rag_jax import config
from rag_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
TINY = ROOT / "configs" / "tiny.py"
GIVEN = {"objective.negatives": "2", "data.columns.negative": "Negatives"}
ALONE = {"group_size": "1"}


def keys_of(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, ConfigDict):
            yield from keys_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def problem(overrides, file=TINY):
    with pytest.raises(UserError) as error:
        config.load(file, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_configs_hold_every_key_and_nothing_else(file):
    loaded = config.load(file)
    assert sorted(keys_of(loaded)) == sorted(config.KEYS)
    assert loaded.is_locked
    assert loaded.optimizer.warmup_steps < loaded.total_steps


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_configs_are_plain(file):
    tree = ast.parse(file.read_text())
    imported = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imported == ["from ml_collections import ConfigDict"]
    assert f"--config=configs/{file.name}" in (ast.get_docstring(tree) or ""), "the header names the command"
    assert "Cost:" in (ast.get_docstring(tree) or "")


def test_the_reference_run_keeps_the_predecessors_numbers():
    run = config.load(ROOT / "configs" / "bge_gpt2.py")
    assert (run.retriever.path, run.generator.path) == ("BAAI/bge-small-en", "gpt2")
    assert (run.batch_size, run.data.query_len, run.data.passage_len) == (32, 50, 128)
    assert run.data.prompt_passage_len + run.data.prompt_query_len + run.data.answer_len == 256
    assert (run.optimizer.learning_rate, run.optimizer.schedule, run.optimizer.warmup_steps) == (1e-4, "linear", 100)
    assert run.objective.temperature == 0.01  # there: scores are 100 times the cosine


def test_overrides_take_the_kind_of_their_key():
    loaded = config.load(
        TINY,
        {
            "total_steps": "7",
            "dropout": "0.25",
            "data.eval": "None",
            "data.train": "None.csv",
            "mesh.data": "-1",
            "objective.marginal_weight": "2",
            "optimizer.clip_norm": "none",
            "generator.remat": "full",
            "retriever.query_prefix": "",
            "prompt.answer": " {answer}=",
            "optimizer.rate_rules": "(('generator/', 0), ('.*', 1))",
            "eval.rows": 5,
        },
    )
    assert loaded.total_steps == 7 and loaded.eval.rows == 5 and loaded.mesh.data == -1
    assert loaded.dropout == 0.25 and loaded.optimizer.clip_norm is None
    assert loaded.data.eval is None and loaded.data.train == "None.csv"
    assert loaded.objective.marginal_weight == 2.0 and isinstance(loaded.objective.marginal_weight, float)
    assert loaded.generator.remat == "full"
    assert loaded.retriever.query_prefix == "" and loaded.prompt.answer == " {answer}="
    assert loaded.optimizer.rate_rules == (("generator/", 0.0), (".*", 1.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"total_step": "3"}, "unknown key total_step; did you mean total_steps?"),
        ({"learning_rate": "1e-3"}, "unknown key learning_rate; did you mean optimizer.learning_rate?"),
        ({"zzz": "3"}, "unknown key zzz"),
        ({"eval": "3"}, "eval is a section; give one of eval.every_steps, eval.rows"),
        ({"total_steps": "many"}, "total_steps=many: must be a whole number"),
        ({"total_steps": "1.5"}, "total_steps=1.5: must be a whole number"),
        ({"total_steps": "0"}, "total_steps=0: must be at least 1"),
        ({"total_steps": "None"}, "total_steps=None: must be a whole number"),
        ({"total_steps": True}, "total_steps=True: must be a whole number"),
        ({"dropout": "high"}, "dropout=high: must be a number or None"),
        ({"dropout": "1.0"}, "dropout=1.0: must be at least 0 and less than 1"),
        ({"optimizer.learning_rate": "nan"}, "optimizer.learning_rate=nan: must be a number"),
        ({"objective.temperature": "0"}, "objective.temperature=0.0: must be greater than 0"),
        ({"generator.remat": "dot"}, "generator.remat='dot': must be one of none, dots, full; did you mean dots?"),
        ({"dtype": "float16"}, "dtype='float16': must be one of float32, bfloat16"),
        (
            {"objective.name": "tokn"},
            "must be one of token, sequence, pdist, replug, emdr2, distill, dalm, none; did you mean token?",
        ),
        ({"retriever.pooling": "avg"}, "retriever.pooling='avg': must be one of auto, cls, mean, last"),
        ({"optimizer.schedule": "cosin"}, "did you mean cosine?"),
        ({"prompt.passage": "text"}, "prompt.passage='text': must contain {passage} once"),
        ({"mesh.data": "0"}, "mesh.data=0: must be -1 (the devices that the other axes leave) or at least 1"),
        ({"mesh.model": "-1"}, "only one axis may be -1"),
        ({"optimizer.rate_rules": "(('a', 1)"}, "must be pairs such as"),
        ({"optimizer.rate_rules": "('a', 1)"}, "must be pairs such as"),
        ({"optimizer.rate_rules": "(('(', 1),)"}, "'(' is not a regular expression"),
        ({"optimizer.decay_rules": "(('a', -1),)"}, "the multiplier of 'a' must be at least 0"),
        (
            {"objective.candidates": "5"},
            "objective.candidates=5, group_size=4, objective.negatives=0: a query's candidates",
        ),
        ({"group_size": "3"}, "group_size=3, batch_size=8: the group does not divide the batch"),
        ({"generator.path": "None"}, "generator.path=None, objective.name='token'"),
        ({"retriever.path": "None"}, "this objective needs a retriever"),
        ({"objective.name": "none", "objective.contrastive_weight": "0"}, "nothing to train"),
        ({"objective.negatives": "-1"}, "objective.negatives=-1: must be at least 0"),
        (
            {"objective.negatives": "2"},
            "objective.negatives=2, data.columns.negative=None, mining.every_steps=0: nothing says which passages",
        ),
        (
            {"data.columns.negative": "N"},
            "objective.negatives=0, data.columns.negative='N': no query brings a negative",
        ),
        ({"data.columns.negative": "Abstract"}, "every passage would be its own negative; name two columns"),
        (GIVEN | {"objective.name": "dalm"}, "objective.negatives=2, objective.name='dalm': this objective has no"),
        (
            GIVEN | {"objective.candidates": "13"},
            "objective.candidates=13, group_size=4, objective.negatives=2: a query's candidates come from its group",
        ),
        (
            GIVEN | {"objective.candidates": "1", "objective.contrastive_weight": "0"},
            "objective.negatives=2, objective.candidates=1, objective.contrastive_weight=0.0: nothing reads what",
        ),
        (GIVEN | ALONE | {"mining.every_steps": "5"}, "mining fills groups with what a retriever considers near"),
        ({"objective.evidence": "question"}, "this objective reads the answer's likelihood alone"),
        ({"objective.label_share": "0.5"}, "this objective has no such target"),
        ({"objective.name": "pdist", "objective.candidates": "1"}, "this objective compares candidates by"),
        ({"objective.name": "emdr2", "objective.evidence_weight": "0"}, "this objective compares candidates by"),
    ],
)
def test_a_bad_override_is_named_with_its_fix(overrides, message):
    assert message in problem(overrides)


def test_all_problems_are_shown_at_once():
    text = problem({"total_steps": "x", "lerning_rate": "3", "group_size": "3", "objective.name": "rag"})
    for part in ("total_steps=x", "lerning_rate", "group_size=3", "objective.name='rag'"):
        assert part in text
    assert text.count("; ") >= 3


def test_negatives_come_from_a_column_or_from_mining():
    assert config.load(TINY, GIVEN | {"objective.candidates": "12"}).objective.candidates == 12
    mined = {"objective.negatives": "1", "mining.every_steps": "5", "objective.candidates": "8"}
    assert config.load(TINY, mined).objective.negatives == 1
    assert config.load(TINY, mined | ALONE | {"objective.candidates": "2"}).group_size == 1
    assert config.load(TINY, GIVEN | {"batch_size": "1"} | ALONE | {"objective.name": "none"}).batch_size == 1


def test_one_model_alone_is_a_config():
    alone = {"objective.name": "none", "generator.path": "None"}
    assert config.load(TINY, alone).generator.path is None
    generator_only = {"retriever.path": "None", "objective.candidates": "1", "objective.contrastive_weight": "0"}
    assert config.load(TINY, generator_only).retriever.path is None
    assert "needs a retriever" in problem({**generator_only, "objective.name": "dalm"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no such file; configs/ holds examples"),
        ("def get_config(:\n", "line 1: "),
        ("x = 1\n", r"defines no function get_config()"),
        ("def get_config():\n    raise KeyError('a\\nb')\n", "raises KeyError: "),
        ("import nothing_of_this_name\n", "raises ModuleNotFoundError: No module named"),
        ("def get_config():\n    return None\n", "returns NoneType, not a ConfigDict"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, source, message):
    file = tmp_path / "mine.py"
    if source is not None:
        file.write_text(source)
    text = problem({}, file)
    assert text.startswith(f"--config={file}: ") and message in text


def test_a_file_from_before_a_key_was_there_means_what_it_meant(tmp_path):
    later = {name: key.before for name, key in config.KEYS.items() if key.before is not config.REQUIRED}
    assert later["retriever.matryoshka_dims"] == () and later["log.trackers"] == ()
    values = config.flat(config.load(TINY))
    assert config.build({name: value for name, value in values.items() if name not in later}) == config.load(TINY)


def test_a_file_with_keys_missing_wrong_or_unknown_lists_them(tmp_path):
    source = TINY.read_text()
    source = source.replace("    config.seed = 0\n", "").replace("config.total_steps = 20", "config.total_steps = '20'")
    source = source.replace("    return config", "    config.optimizer.momentum = 0.9\n    return config")
    (tmp_path / "mine.py").write_text(source)
    text = problem({}, tmp_path / "mine.py")
    for part in ("seed is missing: ", "total_steps='20': must be a whole number", "unknown key optimizer.momentum"):
        assert part in text
    assert not list(tmp_path.glob("__pycache__")), "nothing is left beside the user's file"


def test_json_round_trip_with_overrides(tmp_path):
    loaded = config.load(TINY, {"data.eval": "None", "prompt.query": "é {query}"})
    text = config.to_json(loaded)
    assert json.loads(text)["optimizer"]["decay_rules"] == [["(bias|scale)$", 0.0], [".*", 1.0]]
    assert next(iter(json.loads(text))) == "seed", "in the order of the table"
    again = config.from_json(text)
    assert again == loaded and again.is_locked
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert config.load_workdir(tmp_path, {"eval.rows": "9"}).eval.rows == 9
    with pytest.raises(UserError, match=r"unknown key eval\.row; did you mean eval\.rows\?"):
        config.load_workdir(tmp_path, {"eval.row": "9"})


def test_a_workdir_without_a_config_or_with_a_broken_one(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json there; give the folder of a run"):
        config.load_workdir(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        config.load_workdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="seed is missing"):
        config.load_workdir(tmp_path)


def test_check_sees_what_was_changed_after_loading():
    loaded = config.load(TINY)
    config.check(loaded)
    loaded.objective.candidates = 5
    with pytest.raises(UserError, match="candidates come from its group"):
        config.check(loaded)


def test_a_key_that_a_command_needs_is_asked_for_by_name():
    loaded = config.load(TINY, {"data.train": "None"})
    with pytest.raises(UserError, match=r"data\.train=None: give it a value, --config\.data\.train=\.\.\.; rows"):
        config.require(loaded, "data.train")
    assert config.require(loaded, "data.eval") == "tests/data/rows.csv"


def test_changes_are_what_a_config_has_otherwise_than_its_file():
    for file in sorted((ROOT / "configs").glob("*.py")):
        values = {"data.train": "rows.csv", "total_steps": "7"}
        before = config.changes(file, config.load(file, values))
        assert before.keys() == values.keys() and before["total_steps"][1] == 7, file.name
