"""Spoilt input of every kind: each is read or refused by one line, soon, and in little memory.

    python -m pytest tests/test_fuzz.py                          # some thousand inputs, the same ones every time
    RAG_JAX_FUZZ=40 python -m pytest tests/test_fuzz.py -n 0     # so many times as many, others every time

Nearly all inputs are changed copies of whole files: random bytes end at the first check.
"""

import copy
import csv
import faulthandler
import functools
import io
import json
import os
import pathlib
import resource
import shutil
import struct
import sys
import tempfile
import time

import datasets
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from rag_jax import cli, config, evaluate, export, files, hf, main, models, plan, quickstart
from rag_jax.data import rows as row_files
from rag_jax.distributed import compile_cache, processes
from rag_jax.errors import UserError
from rag_jax.hf import config as configs
from rag_jax.hf import tiny, weights
from rag_jax.hf.families import FAMILIES
from rag_jax.planning import chips

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.py"
TIMES = int(os.environ.get("RAG_JAX_FUZZ", "1"))
# Inputs are at most some hundred thousand bytes. None may take more of the processor, or raise the peak of the process
# by more.
MOST_SECONDS, MOST_BYTES = 20.0, 512 * 2**20
HANGS_SECONDS = 300


def fuzz(examples, **arguments):
    """`given`, for so many examples in the suite."""
    chosen = settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: chosen(given(**arguments)(test))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attempt(read, *arguments):
    """What `read` gives, or None where it refuses; all else that can happen fails."""
    faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True)
    before, began = peak(), time.process_time()
    try:
        result = read(*arguments)
        event("read")
    except UserError as error:
        result = None
        event("refused")
        assert str(error).strip() and len(str(error)) < 20_000, "says what is wrong"
        str(error).encode("utf-8", "surrogatepass")
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.process_time() - began < MOST_SECONDS
    assert peak() - before < MOST_BYTES
    return result


@st.composite
def spoilt(draw, seeds, tokens):
    """The bytes of one of the seeds, changed in some places."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.sampled_from([1, 2, 8, 64, 10_000])))
        kind = draw(st.sampled_from(["flip", "remove", "token", "token", "bytes", "repeat", "cut", "splice"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "remove":
            del data[at:end]
        elif kind == "token":
            data[at : draw(st.sampled_from([at, end]))] = draw(st.sampled_from(tokens))
        elif kind == "bytes":
            data[at:at] = draw(st.binary(max_size=9))
        elif kind == "repeat":
            data[at:at] = bytes(data[at:end]) * draw(st.integers(1, 3))
        elif kind == "cut":
            del data[at:]
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            data[at:] = other[draw(st.integers(0, len(other))) :]
    return bytes(data)


NASTY = (
    [None, True, False, 0, 1, -1, 2, 7, 0.5, 1e308, 1e-320, float("inf"), float("-inf"), float("nan"), 2**31, 2**63]
    + [10**9, 10**30, -(10**12), "", " ", "x", "0", "1", "None", "nan", "\0", "\ud800", "é\u202e", "a\nb", "`|\\<b>"]
    + ["../..", "/etc/passwd", "~nobody-of-this-name/x", "x" * 5000, "{" * 500, "[" * 3000]
    + [[], {}, [[]], [1, "a"], {"a": {}}, [None] * 3, {"factor": "x"}, ["a", "b"], [["a", 1]]]
)
nasty = st.sampled_from(NASTY) | st.text(max_size=8) | st.integers() | st.floats()


@st.composite
def changed(draw, content):
    """A copy of a JSON value in which some values, at any depth, are nasty, missing, renamed or doubled."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 4))):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            kind = draw(st.sampled_from(["nasty", "nasty", "nasty", "remove", "rename"]))
            if kind == "nasty":
                node[key] = copy.deepcopy(draw(nasty))
            elif kind == "remove":
                del node[key]
            elif isinstance(node, dict):
                node[draw(st.text(max_size=6)) or "a"] = node.pop(key)
            break
    return content


# Rows.

TABLE = {
    "Question": ["Who?", "Wo, bitte?", '"When"'],
    "Abstract": ["Two\nlines", "Über den Bergen", "a\tb"],
    "Answer": ["she", "42", "null"],
}
COLUMNS = {"query": "Question", "passage": "Abstract", "answer": "Answer"}
CELLS = st.text(max_size=12) | st.sampled_from(['"', '""', "\n", "\r\n", "\r", ",", "\t", "é", "\u2028", " "])


def written(write):
    """The bytes that `write(path)` leaves there."""
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder) / "file")
        return (pathlib.Path(folder) / "file").read_bytes()


def as_csv(separator, quoting=csv.QUOTE_MINIMAL, end="\r\n"):
    text = io.StringIO(newline="")
    lines = [list(TABLE), *zip(*TABLE.values(), strict=True)]
    csv.writer(text, delimiter=separator, quoting=quoting, lineterminator=end).writerows(lines)
    return text.getvalue().encode()


def as_ipc(new, **options):
    table, sink = pyarrow.table(TABLE), pyarrow.BufferOutputStream()
    with new(sink, table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


RECORDS = [dict(zip(TABLE, row, strict=True)) for row in zip(*TABLE.values(), strict=True)]
WRITTEN = {
    ".csv": [as_csv(","), as_csv(",", csv.QUOTE_ALL, "\n"), "\ufeff".encode() + as_csv(",", csv.QUOTE_ALL, "\r")],
    ".tsv": [as_csv("\t"), as_csv("\t", csv.QUOTE_ALL)],
    ".jsonl": ["\n".join(map(json.dumps, RECORDS)).encode()],
    ".json": [json.dumps(RECORDS).encode(), json.dumps(RECORDS, indent=1, ensure_ascii=False).encode()],
    ".parquet": [
        written(lambda path, c=c: pyarrow.parquet.write_table(pyarrow.table(TABLE), path, compression=c))
        for c in ("none", "snappy")
    ],
    ".arrow": [
        as_ipc(pyarrow.ipc.new_file),
        as_ipc(pyarrow.ipc.new_stream),
        as_ipc(pyarrow.ipc.new_file, compression="zstd"),
    ],
}
TOKENS = [
    b'"',
    b'""',
    b",",
    b"\n",
    b"\r",
    b"\t",
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xef\xbb\xbf",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
]
TOKENS += [
    b"\\ud800",
    b"\\u0000",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"[" * 2000,
    b"\xff" * 4,
    b"\x7f" * 4,
    b"\0" * 8,
    b"null",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def in_rows():
    """The rows of TABLE as they are read."""
    queries, passages, answers = TABLE.values()
    return row_files.Rows(queries, [[text] for text in passages], answers)


def check_rows(rows):
    if rows is not None:
        columns = (rows.queries, rows.passages, rows.answers)
        assert len({len(column) for column in columns}) == 1 and len(rows) > 0
        lists = (*rows.passages, *(rows.negatives or []))
        for text in (text for column in (rows.queries, rows.answers, *lists) for text in column):
            assert isinstance(text, str) and "\0" not in text
            text.encode()


@pytest.mark.parametrize("suffix", WRITTEN)
def test_files_of_rows(folder, suffix):
    path = folder / f"rows{suffix}"
    whole = []
    for content in WRITTEN[suffix]:
        path.write_bytes(content)
        whole.append(row_files.read_rows(str(path), "data.train", COLUMNS))
    assert all(rows == in_rows() for rows in whole), "the seeds are whole"

    @fuzz(150, content=spoilt(WRITTEN[suffix], TOKENS))
    def test(content):
        path.write_bytes(content)
        check_rows(attempt(row_files.read_rows, str(path), "data.train", COLUMNS))

    test()


@fuzz(
    150,
    cells=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=4),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_cells_of_any_text_are_read_as_they_are_or_refused(folder, cells, end):
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator=end).writerows([COLUMNS.values(), *cells])
    (folder / "cells.csv").write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
    rows = attempt(row_files.read_rows, str(folder / "cells.csv"), "data.train", COLUMNS)
    broken = any(
        "\0" in cell or not cell.isascii() and "\ud800" <= max(cell) <= "\udfff" for row in cells for cell in row
    )
    if rows is None:
        assert broken or any(any("\ud800" <= c <= "\udfff" for c in cell) for row in cells for cell in row)
    else:
        queries, passages, answers = zip(*cells, strict=True)
        own, said = [[p] if p.strip() else [] for p in passages], [a if a.strip() else "" for a in answers]
        assert rows == row_files.Rows(list(queries), own, said)


@fuzz(100, records=changed(RECORDS), lines=st.booleans())
def test_records_of_any_json(folder, records, lines):
    whole = isinstance(records, list) and lines
    text = "\n".join(map(json.dumps, records)) if whole else json.dumps(records)
    (folder / "records.jsonl").write_text(text)
    check_rows(attempt(row_files.read_rows, str(folder / "records.jsonl"), "data.train", COLUMNS))
    with_negatives = functools.partial(row_files.read_rows, with_answers=False, with_negatives=True)
    columns = COLUMNS | {"negative": COLUMNS["answer"]}
    check_rows(attempt(with_negatives, str(folder / "records.jsonl"), "data.train", columns))


@pytest.fixture(scope="module")
def saved(folder):
    """The files of a save_to_disk folder of two splits, by name."""
    data = datasets.Dataset.from_dict(TABLE)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(folder / "saved"))
    return {path: path.read_bytes() for path in sorted((folder / "saved").rglob("*")) if path.is_file()}


def test_folders_of_rows(folder, saved):
    assert row_files.read_rows(str(folder / "saved"), "data.train", COLUMNS) == in_rows()
    names = [path for path in saved if path.parent.name != "test"]

    @fuzz(60, data=st.data(), which=st.sampled_from(names), structured=st.booleans())
    def test(data, which, structured):
        content = data.draw(spoilt([saved[which]], TOKENS))
        if structured and which.suffix == ".json":
            content = json.dumps(data.draw(changed(json.loads(saved[which])))).encode()
        which.write_bytes(content)
        try:
            check_rows(attempt(row_files.read_rows, str(folder / "saved"), "data.train", COLUMNS))
        finally:
            which.write_bytes(saved[which])

    test()


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))
    files.cached("key", lambda: {"a": np.arange(9, dtype=np.int32), "b": np.array([True])})
    return tmp_path / "cache" / "key.npz"


def test_tokenised_rows_on_disk(kept, caplog):
    seed = kept.read_bytes()

    @fuzz(100, content=spoilt([seed], [*TOKENS, b"PK\x03\x04", b"\x93NUMPY", b"|O", b"(10**12,)", b"<i8"]))
    def test(content):
        kept.write_bytes(content)
        arrays, _ = attempt(files.cached, "key", lambda: {"a": np.arange(9, dtype=np.int32)})
        assert all(array.dtype != object for array in arrays.values())
        caplog.clear()

    test()


# Models.

SMALL = {
    "bert": models.BertConfig(259, 2, 2, 8, 16, 16, 2, 1e-12, "gelu", 0.1, 0.1),
    "gpt2": models.Gpt2Config(257, 2, 2, 8, 16, 16, 1e-5, "gelu_tanh", 0.1, 0.1, 0.1),
    "llama": models.LlamaConfig(**{**vars(tiny.MODELS["llama"]), "width": 8, "head_dim": 4, "mlp_width": 8}),
    "qwen3": models.LlamaConfig(**{**vars(tiny.MODELS["qwen3"]), "width": 8, "head_dim": 4, "mlp_width": 8}),
}
ROPES = [
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
    | {"original_max_position_embeddings": 16},
]


@pytest.fixture(autouse=True)
def shapes_are_kept(monkeypatch):
    """Of a model's parameters: they cost more than all the rest."""
    monkeypatch.setattr(models, "abstract", functools.lru_cache(10_000)(models.abstract))


@pytest.fixture(scope="module")
def model(folder):
    """`model(name)`: a new folder of a very small model with all the files that one can have."""

    def make(name):
        made = folder / name
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        tiny.build(name, made, SMALL[name])
        hf.write_pooling(made, hf.Pooling("mean", "query: ", "passage: ", 16), 8)
        return made

    return make


def theirs(name):
    """config.json of every kind that a family has."""
    content = configs.to_hf(SMALL[name], name)
    more = [content | {"rope_parameters": rope} for rope in ROPES] if name in ("llama", "qwen3") else []
    more += [content | {"model_type": "mistral", "sliding_window": 4}] if name == "llama" else []
    return [content, *more]


@pytest.mark.parametrize("name", SMALL)
def test_configs_of_models(model, name):
    made, kinds = model(name), theirs(name)
    shared = {"auto_map": {"AutoConfig": "x.Y"}, "num_labels": 2, "layer_types": ["full_attention"] * 2, "id2label": {}}
    extra = st.dictionaries(
        st.sampled_from([*shared, "pad_token_id", "use_cache", "torch_dtype", "pruned_heads"]), nasty
    )

    @fuzz(80, content=st.sampled_from(kinds).flatmap(changed), more=st.just({}) | extra)
    def structured(content, more):
        content = content | more if isinstance(content, dict) else content
        (made / "config.json").write_text(json.dumps(content))
        accepted = attempt(configs.read_config, made, "retriever.path='x'")
        if accepted is not None:
            assert type(accepted[1]) is FAMILIES[accepted[0]].config
            assert attempt(models.abstract, accepted[1]) is not None, "its shapes can be told"
            hash(accepted[1])

    structured()

    @fuzz(40, content=spoilt([json.dumps(kind).encode() for kind in kinds], TOKENS))
    def bytewise(content):
        (made / "config.json").write_bytes(content)
        attempt(configs.read_config, made, "retriever.path='x'")

    bytewise()


def with_header(data, change):
    """A safetensors file whose header is another one, its length told right."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


LENGTHS = [struct.pack("<Q", n) for n in (0, 1, 7, 2**31, 2**62, 2**63, 2**64 - 1)]


@pytest.mark.parametrize("name", SMALL)
def test_weights(model, name):
    made = model(name)
    seed, wanted = (made / weights.SINGLE).read_bytes(), hf.load_params(made, name, SMALL[name])
    header = json.loads(seed[8 : 8 + struct.unpack("<Q", seed[:8])[0]])

    def check(content):
        (made / weights.SINGLE).write_bytes(content)
        params = attempt(hf.load_params, made, name, SMALL[name])
        if params is not None:
            assert [a.shape for a in leaves(params)] == [a.shape for a in leaves(wanted)]
            assert all(a.dtype == np.float32 and np.isfinite(a).all() for a in leaves(params))

    def leaves(tree):
        return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]

    @fuzz(80, changes=changed(header))
    def structured(changes):
        check(with_header(seed, lambda _: changes))

    @fuzz(
        60,
        content=spoilt([seed], [*TOKENS, *LENGTHS, b"F64", b"BF16", b"[0,0]", b"\xff\xff\x80\x7f"]),
        length=st.sampled_from([b"", *LENGTHS]),
    )
    def bytewise(content, length):
        check(length + content[len(length) :])

    structured()
    bytewise()


def test_indices_of_weights(model):
    made = model("llama")
    (made / weights.SINGLE).unlink()
    weights.save_params(models_params("llama"), made, "llama", SMALL["llama"], np.float32, shard_bytes=20_000)
    seed = json.loads((made / weights.INDEX).read_text())
    names = [
        *set(seed["weight_map"].values()),
        "..",
        ".",
        "",
        "../model.safetensors",
        "/etc/passwd",
        "config.json",
        "a\0b",
    ]

    @fuzz(
        80,
        content=changed(seed),
        swaps=st.dictionaries(st.sampled_from(list(seed["weight_map"])), st.sampled_from(names)),
    )
    def structured(content, swaps):
        if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
            content["weight_map"] |= swaps
        check(json.dumps(content).encode())

    @fuzz(40, content=spoilt([json.dumps(seed).encode()], TOKENS))
    def bytewise(content):
        check(content)

    def check(content):
        """Whatever the index says, what is read is the whole model."""
        (made / weights.INDEX).write_bytes(content)
        params = attempt(hf.load_params, made, "llama", SMALL["llama"])
        if params is not None:
            jax.tree.map(np.testing.assert_array_equal, params, models_params("llama"))

    structured()
    bytewise()


def models_params(name):
    rng = np.random.default_rng(0)

    def draw(tree):
        return {
            k: draw(v) if isinstance(v, dict) else rng.standard_normal(v.shape).astype("f") for k, v in tree.items()
        }

    return draw(models.abstract(SMALL[name])[1])


FILES = ["tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json"]
FILES += ["config_sentence_transformers.json", "sentence_bert_config.json"]


@pytest.mark.parametrize("file", FILES)
def test_other_files_of_models(model, file):
    made = model("bert")
    seed = (made / file).read_text()

    def read():
        source = hf.open_model(str(made), "retriever.path", "retriever")
        ids = source.tokenizer("some text", truncation=True, max_length=9).input_ids
        assert max(ids, default=0) < source.model_config.vocab_size
        return source

    @fuzz(25, content=changed(json.loads(seed)))
    def structured(content):
        (made / file).write_text(json.dumps(content))
        attempt(read)

    @fuzz(15, content=spoilt([seed.encode()], TOKENS))
    def bytewise(content):
        (made / file).write_bytes(content)
        attempt(read)

    structured()
    bytewise()


# Configs.

VALUES = config.flat(config.load(TINY))
NAMES = st.sampled_from([*config.KEYS, "data", "mesh", "optimiser.clip_norm", "learning_rate", "", ".", "a.b.c", "é"])
typed = st.sampled_from(
    [
        "1",
        "-1",
        "0",
        "3",
        "1e9",
        "1e-9",
        "nan",
        "inf",
        "None",
        "True",
        "()",
        "((",
        "(('a', 1),)",
        "(('(', 1),)",
        "{[]: 1}",
    ]
    + ["(('a{4294967296}', 1),)", "9" * 5000, "{passage}", "{query}{", "random:bert", "hf_" + "a" * 30, "\udc80", "\0"]
    + [
        "https://user:pass@host/x",
        "[" * 3000,
        "token",
        "dalm",
        "none",
        "last",
        "linear",
        "bfloat16",
        "1_000",
        " 5 ",
        "٣",
    ]
) | st.text(max_size=12)


def check_config(loaded):
    if loaded is not None:
        assert config.from_json(config.to_json(loaded)) == loaded
        config.to_json(loaded).encode()


@fuzz(400, overrides=st.dictionaries(NAMES, typed, max_size=4), values=st.dictionaries(NAMES, nasty, max_size=3))
def test_values_of_configs(overrides, values):
    check_config(attempt(config.build, VALUES | values, overrides))


@fuzz(
    200,
    content=changed(json.loads(config.to_json(config.load(TINY)))),
    overrides=st.dictionaries(NAMES, typed, max_size=2),
)
def test_saved_configs(folder, content, overrides):
    (folder / "config.json").write_text(json.dumps(content))
    check_config(attempt(config.load_workdir, folder, overrides))


@fuzz(150, content=spoilt([config.to_json(config.load(TINY)).encode()], TOKENS))
def test_saved_configs_byte_by_byte(folder, content):
    (folder / "config.json").write_bytes(content)
    check_config(attempt(config.load_workdir, folder))


# Commands.

COMMANDS = {module.__name__.split(".")[-1]: module.main for module in (main, evaluate, export, plan, quickstart)}


class Begun(Exception):
    """All flags and keys were accepted: what comes next would take long."""


def begin(*_, **__):
    raise Begun


def words(folder):
    """Words of command lines: the flags of all commands, with right and wrong values."""
    flags = [
        "config",
        "workdir",
        "out",
        "step",
        "json",
        "dtype",
        "topology",
        "sweep",
        "most",
        "dir",
        "help",
        "x",
        "confg",
    ]
    values = [
        str(TINY),
        str(folder / "run"),
        str(folder / "new"),
        "latest",
        "7",
        "-2",
        "²",
        "9" * 5000,
        "float32",
        "h100:8",
    ]
    values += [
        "v5e:4x4",
        "v5e:0x4",
        "h100:" + "9" * 400,
        "gs://bucket/x",
        "",
        "~nobody-of-this-name/x",
        "x" * 300,
        "\udcff",
    ]
    value = st.sampled_from(values) | typed
    flag = st.sampled_from(flags)
    return st.lists(
        st.builds("--{}={}".format, flag, value)
        | st.builds("--{}".format, flag)
        | st.builds("--config.{}={}".format, NAMES, typed)
        | st.builds("--config.{}".format, NAMES)
        | value,
        max_size=5,
    )


NEEDED = {
    "main": ["--config={tiny}", "--workdir={folder}/new"],
    "evaluate": ["--workdir={folder}/run"],
    "export": ["--workdir={folder}/run", "--out={folder}/new"],
    "plan": ["--config={tiny}", "--topology=h100:8"],
    "quickstart": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines(tmp_path, monkeypatch, capsys, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.to_json(config.load(TINY)))
    monkeypatch.chdir(tmp_path)
    for place, name in (
        (processes, "start"),
        (compile_cache, "keep_compiled"),
        (export, "export"),
        (plan, "check_compiler"),
    ):
        monkeypatch.setattr(place, name, begin)
    monkeypatch.setattr(plan, "compile_step", begin)
    monkeypatch.setattr(quickstart, "quickstart", begin)
    needed = [word.format(tiny=TINY, folder=tmp_path) for word in NEEDED[command]]

    @fuzz(100, given_words=words(tmp_path), kept=st.integers(0, len(needed)))
    def test(given_words, kept):
        monkeypatch.setattr(sys, "argv", [command, *needed[:kept], *given_words])
        began = time.process_time()
        try:
            cli.run(COMMANDS[command])
        except Begun:
            event("begun")
        except SystemExit as end:
            err = capsys.readouterr().err
            event(f"ends with {end.code}")
            assert end.code in (0, 2), err
            if end.code == 2:
                assert err.startswith("rag_jax: error: ") and err.count("\n") == 1 and err.strip().isprintable()
        assert time.process_time() - began < MOST_SECONDS
        capsys.readouterr()

    test()
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing is written"


@fuzz(200, text=st.text(max_size=12) | st.from_regex(r"(v4|v5e|v5p|h100|b200):\d{1,9}(x\d{1,9}){0,3}", fullmatch=True))
def test_topologies(text):
    found = attempt(chips.topology, text)
    assert found is None or found.devices > 0
