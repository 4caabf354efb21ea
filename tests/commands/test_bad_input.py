"""What a user can mend: one line that names the value and the fix, exit 2, and a workdir left as it was."""

import functools
import json
import pathlib
import shutil
import subprocess

import pytest
from command import ROOT, SECRET, TINY, TINY_STEPS, TINY_VALUES, call, environment, words

from rag_jax.hf import tiny, weights

HEADER = "Question,Abstract,Answer\n"
# The two groups of a batch of configs/tiny.py on the eight devices of these tests.
MESH = {"mesh__data": 2, "mesh__model": 4}


@pytest.fixture(scope="module")
def cache(tiny_run):
    return tiny_run[2]


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """The workdir of a run without evaluations, to be copied rather than changed."""
    workdir, printed, _ = tiny_run
    assert SECRET not in printed
    shutil.rmtree(workdir / "eval")
    return workdir


@pytest.fixture
def said(cache):
    """`said("main", *flags, key=value)`: the exit code and what was printed, by the command run in this process."""
    return functools.partial(call, cache, devices=8)


def check(answer, *parts):
    code, out, err = answer
    assert code == 2, err
    assert err.startswith("rag_jax: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in out + err
    for part in parts:
        assert str(part) in err


def contents(folder):
    """Every path below, with the bytes and the time of each file."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


def real(cache, module, *flags, **values):
    process = subprocess.run(
        words(module, *flags, **values), cwd=ROOT, env=environment(cache), capture_output=True, text=True
    )
    return process.returncode, process.stdout, process.stderr


# Values of keys: what is given -> what the line says.
VALUES = {
    "missing data file": (
        {"data__train": "none.csv"},
        ["data.train='none.csv'", "no such file or folder; fix the path (it is relative to"],
    ),
    "unknown key": ({"objective__temprature": 1}, ["unknown key objective.temprature; did you mean objective.temp"]),
    "key without its section": ({"learning_rate": 1}, ["unknown key learning_rate; did you mean optimizer.learning_r"]),
    "misspelt objective": (
        {"objective__name": "sequnce"},
        [
            "objective.name='sequnce': must be one of token, sequence, pdist, replug, emdr2, distill, dalm, none; ",
            "did you mean sequence?",
        ],
    ),
    "more candidates than the group has": (
        {"objective__candidates": 5},
        ["group_size=4, objective.negatives=0: a query's candidates come from its group; lower the first or raise"],
    ),
    "group and batch": (
        {"group_size": 3},
        ["group_size=3, batch_size=8: the group does not divide the batch; choose one that does"],
    ),
    "batch and mesh": (
        {"batch_size": 12, "mesh__data": 8, "mesh__model": 1},
        [
            "batch_size=12, group_size=4: 3 groups cannot be split over the 8 devices",
            "make batch_size a multiple of 32",
        ],
    ),
    "mesh and devices": (
        {"mesh__data": 3, "mesh__model": 1},
        ["mesh.replica=1, mesh.data=3, mesh.model=1: does not fit 8 devices; their product must be 8"],
    ),
    "two axes of what is left": (
        {"mesh__replica": -1, "mesh__data": -1},
        ["mesh.replica=-1, mesh.data=-1, mesh.model=4: only one axis may be -1; give the others a number"],
    ),
    "encoder as generator": (
        {"generator__path": "random:bert"},
        ["generator.path='random:bert': a bert model cannot generate; give one of type gpt2, llama"],
    ),
    "encoder without generator": (
        {"generator__path": None},
        ["generator.path=None, objective.name='token'", "this objective needs a generator; give its path"],
    ),
    "retriever's positions": (
        {"data__passage_len": 600},
        ["data.passage_len=600: retriever.path='random:bert' has 512 positions; lower what is too long"],
    ),
    "generator's positions": (
        {"data__prompt_query_len": 400},
        ["data.prompt_query_len + data.answer_len=528: generator.path='random:gpt2' has 512 positions; lower what"],
    ),
    "no such folder": (
        {"generator__path": "./no/model"},
        ["generator.path='./no/model': no such folder; give one, or"],
    ),
    "no such user": (
        {"generator__path": "~no-such-user-here/m"},
        ["generator.path='~no-such-user-here/m': there is no such user's folder; write the full path"],
    ),
    "a token": (
        {"data__train": "hf_" + "a" * 30},
        ["data.train='***': holds a password or a token, which would be saved"],
    ),
    "no steps": ({"total_steps": 0}, ["total_steps=0: must be at least 1"]),
    "text for a whole number": ({"batch_size": "eight"}, ["batch_size=eight: must be a whole number"]),
    "text for a number": ({"optimizer__learning_rate": "fast"}, ["optimizer.learning_rate=fast: must be a number"]),
    "a seed too large": ({"seed": 2**64}, ["seed=18446744073709551616: must be at least 0 and less than 2**32"]),
    "lone brace in a prompt": ({"prompt__answer": "{answer}{"}, ["prompt '{answer}{': Single '{'", "write {{ and }}"]),
    "several at once": (
        {"seed": "one", "dtype": "float8", "data__answer_len": 0, "sead": 1},
        [
            "seed=one: must be a whole number; ",
            "dtype='float8': must be one of float32, bfloat16; ",
            "data.answer_len=0: must be at least 2",
            "unknown key sead; did you mean seed?",
        ],
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_of_keys(said, tmp_path, case):
    values, parts = VALUES[case]
    check(said("main", f"--config={TINY}", f"--workdir={tmp_path / 'run'}", **{**MESH, **values}), *parts)
    assert not (tmp_path / "run").exists()


# Files of rows: name, content -> what the line says.
ROWS = {
    "empty": ("rows.csv", "", ["is an empty file"]),
    "no rows": ("rows.csv", HEADER, ["has no rows: give it at least a header line and rows below it"]),
    "missing column": (
        "rows.csv",
        "Question,Passage,Answer\nq,p,a\n",
        ["has no column 'Abstract' (data.columns.passage); it has: Question, Passage, Answer"],
    ),
    "column twice": (
        "rows.csv",
        "Question,Abstract,Answer,Answer\nq,p,a,b\n",
        ["has column 'Answer' more than once; rename all but one"],
    ),
    "one row": (
        "rows.csv",
        HEADER + "q,p,a\n",
        ["has 1 usable row, fewer than a batch of 8: give more rows or lower batch_size"],
    ),
    "fewer than a batch": (
        "rows.csv",
        HEADER + "".join(f"q{i},p{i},a{i}\n" for i in range(7)),
        ["has 7 usable rows, fewer than a batch of 8: give more rows or lower batch_size"],
    ),
    "half a character": (
        "rows.jsonl",
        '{"Question": "\\ud800", "Abstract": "p", "Answer": "a"}\n' * 8,
        ["column 'Question' holds half a character (a lone surrogate) in row 1: fix its encoding"],
    ),
    "brackets without end": ("rows.json", "[" * 10**5, ["cannot be read as json: "]),
    "one passage": (
        "rows.csv",
        HEADER + "".join(f"q{i},p,a{i}\n" for i in range(8)),
        ["has one distinct passage in 8 rows, and a retriever learns by telling passages apart: give rows of others"],
    ),
    "a quote that swallows the rest": (
        "rows.csv",
        HEADER + 'q,p,a\nq,"p,a\n' * 8,
        ["line 5 (of a row that begins in line 3): text follows a closing quote: double the quotes inside of a field"],
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_files_of_rows(said, tmp_path, case):
    name, content, parts = ROWS[case]
    file = tmp_path / name
    file.write_text(content)
    answer = said("main", f"--config={TINY}", f"--workdir={tmp_path / 'run'}", data__train=file, **MESH)
    check(answer, f"data.train='{file}'", *parts)
    assert not (tmp_path / "run").exists()


def changed_config(**changes):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return change


def cut_weights(keep):
    """The file of weights without its end; `keep` gives how many bytes are left from the size of header and whole."""

    def cut(folder):
        whole = (folder / weights.SINGLE).read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        (folder / weights.SINGLE).write_bytes(whole[: keep(header, len(whole))])

    return cut


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def as_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


NOT_WHOLE = ["model.safetensors is not a complete safetensors file", "fetch it again"]
# How a folder of a small GPT-2 is spoilt -> what the line says.
MODELS = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        ["no config.json in", "give the folder of a Hugging"],
    ),
    "config is not JSON": (
        lambda folder: (folder / "config.json").write_text("{'n_layer': 2}"),
        ["its config.json cannot be read", "not a valid JSON file"],
    ),
    "unsupported architecture": (
        changed_config(model_type="t5"),
        ["model_type='t5' is not supported; supported are bert, roberta, xlm-roberta, mpnet,"],
    ),
    "unheard-of architecture": (
        changed_config(model_type="gpt99"),
        ["model_type='gpt99'", "supported are bert, roberta"],
    ),
    "cut in the header": (cut_weights(lambda header, _: header // 2), NOT_WHOLE),
    "cut in the tensors": (cut_weights(lambda header, whole: (header + whole) // 2), NOT_WHOLE),
    "cut by a byte": (cut_weights(lambda _, whole: whole - 1), NOT_WHOLE),
    "nothing in it": (cut_weights(lambda *_: 0), NOT_WHOLE),
    "no weights": (
        lambda folder: (folder / weights.SINGLE).unlink(),
        ["holds no weights; needed is model.safetensors or model.safetensors.index.json"],
    ),
    "weights of another size": (
        changed_config(n_layer=3),
        ["do not fit its config.json: transformer.h.2.ln_1.weight is missing", "and 4 more"],
    ),
    "no tokenizer": (without_tokenizer, ["no tokenizer in", "save the model's own there, with its tokenizer.json"]),
    "a file": (as_file, ["is a file; give the folder of a Hugging Face model"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_folders_of_models(said, tmp_path, case):
    spoil, parts = MODELS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.build("gpt2", folder)
    spoil(folder)
    answer = said("main", f"--config={TINY}", f"--workdir={tmp_path / 'run'}", generator__path=folder, **MESH)
    check(answer, folder, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", tiny.MODELS)
def test_no_model_is_read_without_its_tokenizer(said, tmp_path, name):
    tiny.build(name, tmp_path)
    without_tokenizer(tmp_path)
    answer = said("main", f"--config={TINY}", f"--workdir={tmp_path / 'run'}", retriever__path=tmp_path, **MESH)
    reason = "its tokenizer cannot be read" if name == "llama" else f"no tokenizer in {tmp_path}; save the model's own"
    check(answer, f"retriever.path='{tmp_path}': {reason}")
    assert not (tmp_path / "run").exists()


# Files of configs: content -> what the line says.
CONFIGS = {
    "missing": (None, ["no such file; configs/ holds examples"]),
    "without get_config": ("config = 1\n", ["defines no function get_config()"]),
    "syntax error": ("def get_config():\n    return (\n", ["line 2: '(' was never closed"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_files_of_configs(said, tmp_path, case):
    content, parts = CONFIGS[case]
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    check(said("main", f"--config={file}", f"--workdir={tmp_path / 'run'}"), f"--config={file}: ", *parts)
    assert not (tmp_path / "run").exists()


def test_the_workdir_is_a_file_or_below_one(said, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    check(said("main", f"--config={TINY}", f"--workdir={file}", **MESH), f"--workdir={file}: is a file; give a folder")
    check(
        said("main", f"--config={TINY}", f"--workdir={file / 'run'}", **MESH),
        f"--workdir={file}/run: {file} is a file; give a f",
    )
    odd = tmp_path / "r\udcff"
    check(said("main", f"--config={TINY}", f"--workdir={odd}", **MESH), "kept under a path that is not UTF-8; give an")
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


def test_a_run_of_another_config_stays_as_it_is(said, trained):
    before = contents(trained)
    answer = said("main", f"--config={TINY}", f"--workdir={trained}", seed=7, **TINY_VALUES, **MESH)
    check(answer, f"--workdir={trained} holds a run of another config: seed was 0 and is 7; ", "or another --workdir")
    assert contents(trained) == before


def test_no_secret_of_the_environment_is_in_a_workdir(trained):
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl"} <= {path.name for path in files}
    assert any(path.parent.name == "tensorboard" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("command", ["evaluate", "export", "ask"])
def test_steps_that_are_not_there(said, trained, tmp_path, command):
    before = contents(trained)
    more = {"export": [f"--out={tmp_path / 'out'}"], "ask": ["a question"]}.get(command, [])
    for step in ("7", "-2", "last", "²"):
        answer = said(command, f"--workdir={trained}", f"--step={step}", *more)
        held = f"{TINY_STEPS - 1}, {TINY_STEPS}"
        check(answer, f"--step={step}: not in {trained}/checkpoints, which holds {held}; give one, latest or best")
    check(said(command, f"--workdir={trained}", "--step=best", *more), "--step=best: no saved step", "--step=latest")
    assert contents(trained) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "export", "ask"])
def test_workdirs_without_a_run_or_a_checkpoint(said, trained, tmp_path, command):
    more = {"export": [f"--out={tmp_path / 'out'}"], "ask": ["a question"]}.get(command, [])
    empty, unsaved = tmp_path / "empty", tmp_path / "unsaved"
    empty.mkdir()
    shutil.copytree(trained, unsaved, ignore=shutil.ignore_patterns("checkpoints"))
    before = contents(tmp_path)
    for folder in (empty, tmp_path / "none"):
        answer = said(command, f"--workdir={folder}", *more)
        check(answer, f"--workdir={folder}: no config.json there; give the folder of a run")
    answer = said(command, f"--workdir={unsaved}", *more)
    check(answer, f"no checkpoint in {unsaved}/checkpoints; train with checkpoint.every_steps above 0 first")
    assert contents(tmp_path) == before


def test_places_that_an_export_does_not_touch(said, trained, tmp_path):
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "file"
    file.write_text("mine")
    for out, message in (
        (tmp_path / "out", f"--out={tmp_path / 'out'}: is not empty; give a new folder"),
        (file, f"--out={file}: is a file; give a new folder"),
        (file / "deep", f"{file}: File exists; give another path"),
        (tmp_path / ("a" * 300), "aaa: File name too long; give another path or fix it"),
    ):
        check(said("export", f"--workdir={trained}", f"--out={out}"), message)
    assert [path for path in pathlib.Path(tmp_path).rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


# The same through real processes, on one device, seconds each: nothing that libraries say by themselves comes along.


@pytest.mark.slow
def test_a_real_run_with_weights_that_are_cut(cache, tmp_path):
    tiny.build("gpt2", tmp_path)
    cut_weights(lambda header, whole: (header + whole) // 2)(tmp_path)
    before = contents(tmp_path)
    answer = real(cache, "main", f"--config={TINY}", f"--workdir={tmp_path / 'run'}", generator__path=tmp_path)
    check(answer, tmp_path, *NOT_WHOLE)
    assert answer[1] == "" and contents(tmp_path) == before


@pytest.mark.slow
def test_a_real_run_with_too_few_rows(cache, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(HEADER + "q,p,a\n")
    answer = real(cache, "main", f"--config={TINY}", f"--workdir={tmp_path / 'run'}", data__train=file)
    check(answer, f"data.train='{file}' has 1 usable row, fewer than a batch of 8")
    assert answer[1] == "" and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_real_evaluation_and_a_real_export(cache, trained, tmp_path):
    before = contents(trained)
    check(
        real(cache, "evaluate", f"--workdir={trained}", "--step=7"),
        "--step=7: not in",
        f"which holds {TINY_STEPS - 1}, {TINY_STEPS}; give one",
    )
    (tmp_path / "mine").write_text("")
    check(real(cache, "export", f"--workdir={trained}", f"--out={tmp_path}"), f"--out={tmp_path}: is not empty; give")
    assert contents(trained) == before
