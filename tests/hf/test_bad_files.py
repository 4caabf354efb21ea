"""Bad input by the table: what each kind of fault is called, where it stands, how to mend it; and what is no fault."""

import json
import struct

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
from data_helpers import byte_tokenizer
from jax.sharding import SingleDeviceSharding

from rag_jax import config, data, hf, models
from rag_jax.data import rows as row_files
from rag_jax.data import segments
from rag_jax.errors import UserError
from rag_jax.hf import config as configs
from rag_jax.hf import tiny, weights

COLUMNS = {"query": "Question", "passage": "Abstract", "answer": "Answer"}
HEADER = b"Question,Abstract,Answer\n"
LINE = json.dumps({"Question": "q", "Abstract": "p", "Answer": "a"}).encode() + b"\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))


def refused(read, *arguments):
    """The one line that `read` raises."""
    with pytest.raises(UserError) as error:
        read(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def read(path):
    return row_files.read_rows(str(path), "data.train", COLUMNS)


# Rows: file, content -> what the line says.
ROWS = {
    "invalid UTF-8": (
        "r.csv",
        HEADER + b"q,p,a\n" * 5000 + b"q,caf\xe9,a\n",
        "line 5002 is not UTF-8: byte 0xe9 at position 30030 of the file; save the file as UTF-8",
    ),
    "invalid UTF-8 in JSON": ("r.jsonl", LINE * 2 + b'{"Question": "\xff"}\n', "line 3 is not UTF-8: byte 0xff"),
    "UTF-16": ("r.csv", "Question,Abstract,Answer\n".encode("utf-16"), "line 1 is not UTF-8 (UTF-16?): byte 0xff at"),
    "UTF-16 without its mark": (
        "r.csv",
        "Question,A\n".encode("utf-16-le"),
        "line 1 holds a NUL byte: it is damaged or",
    ),
    "NUL bytes": ("r.csv", HEADER + b"q,p,a\nq,p\0,a\n", "line 3 holds a NUL byte: it is damaged or not UTF-8 text"),
    "NUL escaped": ("r.jsonl", LINE.replace(b'"p"', b'"p\\u0000"'), "column 'Abstract' holds a NUL character in row 1"),
    "a quote that swallows the rest": (
        "r.csv",
        HEADER + b'q,p,a\n"two\nlines",p,a\nq,p,"open\n' + b"q,p,a\n" * 100,
        "a quote opens in line 5 and never closes: close it, or double the quotes inside of a field",
    ),
    "a quote that the next one closes": (
        "r.csv",
        HEADER + b'q,p,"open\nq,p,"a"\n',
        "line 3 (of a row that begins in line 2): text follows a closing quote: double the quotes inside of a field",
    ),
    "quotes not doubled": ("r.csv", HEADER + b'q,p,"say "yes" now"\n', "line 2 (of a row that begins in line 2): text"),
    "a broken line": (
        "r.jsonl",
        LINE * 3 + b'{"Question": "q", "Abstract": "p", "Answer\n' + LINE,
        "line 4 is not a JSON object: Invalid control character at at column 43",
    ),
    "a line without end": ("r.jsonl", LINE + b"[" * 100_000, "line 2 is not a JSON object: maximum recursion depth"),
    "an item that is none": (
        "r.json",
        b'[{"Question": "q"},\n 3]',
        "item 2 is not a JSON object with the columns as keys",
    ),
    "an image": (
        "r.jsonl",
        LINE.replace(b'"p"', b'{"bytes": ""}'),
        "column 'Abstract' holds a dict in row 1: make it one",
    ),
    "a home that is none": ("~no-such-user-here/r.csv", None, "there is no such user's folder; write the full path"),
    "too long a name": ("x" * 300 + ".csv", None, "File name too long; give another path or fix it"),
    "an archive": ("r.zip", b"PK\x03\x04", "of an unknown kind: name it .csv, .tsv, .json, .jsonl, .ndjson, .parq"),
    "a compressed file": ("r.csv.gz", b"\x1f\x8b", "is cut off or damaged (Compressed file ended before"),
    "a compressed picture": ("r.png.gz", b"\x1f\x8b", "is of an unknown kind: name it .csv"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_are_refused(tmp_path, case):
    name, content, message = ROWS[case]
    path = name if name.startswith("~") else tmp_path / name
    if content is not None:
        path.write_bytes(content)
    text = refused(read, path)
    assert text.startswith(f"data.train={str(path)!r}") and message in text


def test_columns_twice_in_any_table(tmp_path):
    table = pyarrow.table([["q"], ["p"], ["p"], ["a"]], names=["Question", "Abstract", "Abstract", "Answer"])
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    with pyarrow.OSFile(str(tmp_path / "r.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("r.parquet", "r.arrow"):
        assert "has column 'Abstract' more than once; rename all but one" in refused(read, tmp_path / name)


@pytest.mark.parametrize(("ends", "message"), [((0, 1, 2), "Invalid UTF8"), ((0, 2**30, 2), ""), ((0, -5, 2), "")])
def test_tables_whose_texts_are_no_utf8_or_lie_outside(tmp_path, ends, message):
    """Arrow's own reader would give what stands in memory there, or end the process."""
    offsets, texts = pyarrow.py_buffer(struct.pack("<3i", *ends)), pyarrow.py_buffer(b"q\xff")
    queries = pyarrow.StringArray.from_buffers(2, offsets, texts)
    table = pyarrow.table([queries, ["p"] * 2, ["a"] * 2], names=list(COLUMNS.values()))
    with pyarrow.OSFile(str(tmp_path / "r.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    text = refused(read, tmp_path / "r.arrow")
    assert "cannot be read as arrow: " in text and message in text


# Rows that are fine: file, content -> queries, passages, answers.
FINE = {
    "mixed newlines": ("r.csv", HEADER + b"a,b,c\r\nd,e,f\rg,h,i\n\nj,k,l", ["adgj", "behk", "cfil"]),
    "mixed newlines in JSON": (
        "r.jsonl",
        LINE.replace(b"\n", b"\r\n") + b"\n" + LINE.replace(b"\n", b"\r") + LINE,
        ["qqq", "ppp", "aaa"],
    ),
    "a mark of the order of bytes": ("r.csv", b"\xef\xbb\xbf" + HEADER + b"q,p,a\n", ["q", "p", "a"]),
    "a mark in JSON": ("r.jsonl", b"\xef\xbb\xbf" + LINE, ["q", "p", "a"]),
    "a column of numbers": ("r.csv", HEADER + b"1,2.50,-3\n", [["1"], ["2.50"], ["-3"]]),
    "line breaks inside of fields": ("r.csv", HEADER + b'"a\r\nb","c\rd","e\nf"\n', [["a\r\nb"], ["c\rd"], ["e\nf"]]),
    "quotes inside of fields": ("r.csv", HEADER + b'q,"""p""",a"b\n', [["q"], ['"p"'], ['a"b']]),
    "duplicates": ("r.csv", HEADER + b"q,p,a\n" * 3, ["qqq", "ppp", "aaa"]),
    "line breaks of other scripts": (
        "r.jsonl",
        LINE.replace(b'"p"', '"a\u2028b\x85c"'.encode()),
        [["q"], ["a\u2028b\x85c"], ["a"]],
    ),
}


@pytest.mark.parametrize("case", FINE)
def test_rows_that_are_fine(tmp_path, case):
    name, content, expected = FINE[case]
    (tmp_path / name).write_bytes(content)
    queries, passages, answers = map(list, expected)
    assert read(tmp_path / name) == row_files.Rows(queries, [[text] for text in passages], answers)


def load(path, *, batch=1, retriever=True, **changes):
    tokenizer = byte_tokenizer()
    return data.load_examples(
        str(path),
        key="data.train",
        columns=COLUMNS,
        bad_rows=changes.pop("bad_rows", "drop"),
        retriever=data.RetrieverText(tokenizer, "", "", 8, 8) if retriever else None,
        prompt=data.Prompt(tokenizer, "{passage}", "{query}", "{answer}", 8, 8, 8),
        min_rows=batch,
    )


def test_what_becomes_of_empty_fields_and_duplicates_is_counted(tmp_path):
    (tmp_path / "r.csv").write_bytes(HEADER + b'q,p,a\nq,p,a\nr,p,a\n"",p,a\nq, ,a\nq,o,""\nq,o,long answer\n')
    examples, report = load(tmp_path / "r.csv")
    assert len(examples) == 3 and examples.passage_key.tolist() == [0, 0, 0]
    assert str(report) == (
        "3 rows, 2 distinct queries, 1 distinct passages; dropped of 7: 1 with an empty query, 1 with an empty "
        "passage, 1 with an empty answer, 1 with an answer longer than data.answer_len=8 tokens"
    )
    assert "has bad rows among 7: 1 with an empty query" in refused(lambda: load(tmp_path / "r.csv", bad_rows="refuse"))


def test_one_passage_teaches_a_retriever_nothing(tmp_path):
    (tmp_path / "r.csv").write_bytes(HEADER + b"q,p,a\nr,p,b\n")
    text = refused(lambda: load(tmp_path / "r.csv", batch=2))
    assert "has one distinct passage in 2 rows, and a retriever learns by telling passages apart: give rows of" in text
    assert len(load(tmp_path / "r.csv", batch=2, retriever=False)[0]) == 2, "a generator alone learns from it"
    assert len(load(tmp_path / "r.csv")[0]) == 2, "and it can be evaluated on"
    (tmp_path / "r.csv").write_bytes(HEADER + b"q,p,a\nr,o,b\n")
    assert len(load(tmp_path / "r.csv", batch=2)[0]) == 2


def test_cells_of_ten_megabytes(tmp_path, monkeypatch):
    """They are read, cut and counted as all long texts are, by tokenising no more than their beginning."""
    huge = 10_000_000
    (tmp_path / "r.csv").write_text(
        f"Question,Abstract,Answer\n{'q' * huge},{'p ' * (huge // 2)},a\nq,p,{'a' * huge}\nr,o,a\n"
    )
    asked, encode = [], segments._encode
    monkeypatch.setattr(
        segments, "_encode", lambda t, texts, **o: asked.extend(map(len, texts)) or encode(t, texts, **o)
    )
    examples, report = load(tmp_path / "r.csv")
    assert len(examples) == 2 and report.dropped == {"an answer longer than data.answer_len=8 tokens": 1}
    assert report.cut["passages (retriever)"] == report.cut["queries (generator)"] == 1
    assert max(asked) < 100_000
    assert examples.retriever_passages[0].tolist() == [*b"p p p p "]


def test_the_beginning_of_a_long_text_decides_only_where_it_is_enough(monkeypatch):
    """The same tokens as of the whole text; where the beginning gives too few, the whole text is read."""
    tokenizer = byte_tokenizer()
    texts = ["ab" * 40, "x" * 3, " " * 30 + "after"]
    whole = segments.retriever_tokens(tokenizer, texts, "> ", 12)
    template = segments.template_tokens(tokenizer, "<{passage}>", texts, 12, "prompt_passage_len")
    monkeypatch.setattr(segments, "MORE_CHARS", 2)
    monkeypatch.setattr(segments, "CHARS_A_TOKEN", 1)
    short = segments.retriever_tokens(tokenizer, texts, "> ", 12)
    np.testing.assert_array_equal(short[0].tokens, whole[0].tokens)
    assert short[1].tolist() == whole[1].tolist() == [True, False, True]
    again = segments.template_tokens(tokenizer, "<{passage}>", texts, 12, "prompt_passage_len")
    assert again[0] == template[0] and again[1].tolist() == template[1].tolist()
    monkeypatch.setattr(segments, "CHARS_A_TOKEN", 0)
    few = segments.retriever_tokens(tokenizer, texts, "", 12)
    assert few[0].lengths.tolist() == [12, 3, 12], "two characters are too few to decide"


# Models: how a folder of a very small one is spoilt -> what the line says.

SMALL = models.Gpt2Config(257, 2, 2, 8, 16, 16, 1e-5, "gelu_tanh", 0.1, 0.1, 0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny.build("gpt2", folder, SMALL)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(whole, tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for name, content in whole.items():
        (made / name).write_bytes(content)
    return made


def header(change, length=None):
    """The file of weights with another header, and what it says of the header's length."""

    def spoil(folder):
        content = (folder / weights.SINGLE).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        tensors = json.loads(content[8 : 8 + size])
        change(tensors)
        new = json.dumps(tensors).encode()
        (folder / weights.SINGLE).write_bytes(
            struct.pack("<Q", len(new) if length is None else length) + new + content[8 + size :]
        )

    return spoil


def tensors(change):
    """Other tensors in a whole file."""

    def spoil(folder):
        content = safetensors.numpy.load_file(folder / weights.SINGLE)
        change(content)
        safetensors.numpy.save_file(content, folder / weights.SINGLE)

    return spoil


def entry(name, **values):
    return header(lambda tensors: tensors[name].update(values))


def index(weight_map):
    def spoil(folder):
        (folder / weights.SINGLE).rename(folder / "model-00001-of-00002.safetensors")
        (folder / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def value_of(number):
    def change(tensors):
        tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = number

    return tensors(change)


NORM, NOT_WHOLE = "transformer.ln_f.weight", "model.safetensors is not a complete safetensors file"
WEIGHTS = {
    "a header beyond the file": (header(lambda t: None, 2**40), NOT_WHOLE),
    "a header of no length": (header(lambda t: None, 0), NOT_WHOLE),
    "a header cut": (header(lambda t: None, 50), NOT_WHOLE),
    "an endless header": (header(lambda t: None, 2**64 - 1), NOT_WHOLE),
    "offsets that overlap": (entry(NORM, data_offsets=[0, 32]), NOT_WHOLE),
    "offsets beyond the end": (entry(NORM, data_offsets=[10**9, 10**9 + 32]), NOT_WHOLE),
    "offsets backwards": (entry(NORM, data_offsets=[32, 0]), NOT_WHOLE),
    "a shape of other bytes": (entry(NORM, shape=[9]), NOT_WHOLE),
    "a shape below zero": (entry(NORM, shape=[-8]), NOT_WHOLE),
    "a shape beyond counting": (entry(NORM, shape=[2**62, 2**62]), NOT_WHOLE),
    "an unheard-of type": (entry(NORM, dtype="F7"), NOT_WHOLE),
    "whole numbers": (
        tensors(lambda t: t.update({NORM: np.ones(8, np.int32)})),
        f"{NORM} is I32, not one of F32, F16,",
    ),
    "another shape": (tensors(lambda t: t.update({NORM: np.ones(9, np.float32)})), f"{NORM} is (9,), not (8,)"),
    "a missing tensor": (tensors(lambda t: t.pop(NORM)), f"do not fit its config.json: {NORM} is missing"),
    "an extra tensor": (tensors(lambda t: t.update(x=np.ones(1, np.float32))), "transformer.x is unknown"),
    "an endless name": (tensors(lambda t: t.update({"x" * 9000: np.ones(1, np.float32)})), "xxx... is unknown"),
    "a tensor twice": (
        tensors(lambda t: t.update({"ln_f.weight": np.ones(8, np.float32)})),
        f"{NORM} stands in {{folder}} twice, again in model.safetensors",
    ),
    "NaN": (
        value_of(np.nan),
        "transformer.h.1.mlp.c_fc.weight in {folder}/model.safetensors holds NaN or infinity; fetch",
    ),
    "infinity": (
        value_of(-np.inf),
        "transformer.h.1.mlp.c_fc.weight in {folder}/model.safetensors holds NaN or infinity",
    ),
    "a shard that is not there": (
        index({NORM: "model-00002-of-00002.safetensors"}),
        "lacks model-00002-of-00002.safetensors, named in model.safetensors.index.json; fetch it again",
    ),
    "an index that points outside": (
        index({NORM: "../x.safetensors"}),
        "points outside of its folder, to ../x.safetensors",
    ),
    "an index that points to the root": (
        index({NORM: "/x.safetensors"}),
        "points outside of its folder, to /x.safetens",
    ),
    "an index of other files": (
        index({NORM: "config.json"}),
        "index.json is not an index of safetensors files; fetch it again",
    ),
    "an index too deep": (
        lambda folder: (folder / weights.SINGLE).unlink() or (folder / weights.INDEX).write_text("[" * 100_000),
        "index.json is not an index of safetensors files; fetch it again",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_refused(folder, case):
    spoil, message = WEIGHTS[case]
    hf.load_params(folder, "gpt2", SMALL)
    spoil(folder)
    assert message.format(folder=folder) in refused(hf.load_params, folder, "gpt2", SMALL)


def test_nan_is_found_also_where_only_a_part_is_read(folder):
    where = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[1]), models.abstract(SMALL)[1])
    jax.tree.map(lambda a: a.block_until_ready(), hf.load_params(folder, "gpt2", SMALL, where))
    value_of(np.nan)(folder)
    assert "transformer.h.1.mlp.c_fc.weight in" in refused(hf.load_params, folder, "gpt2", SMALL, where)


def changed(**values):
    return lambda folder: write(folder, "config.json", json.loads((folder / "config.json").read_text()) | values)


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def file(name, content):
    return lambda folder: write(folder, name, content)


def added(folder):
    """A token more than the model has embeddings, put around every text."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "BertProcessing", "sep": ["<|endoftext|>", 5000], "cls": ["<|endoftext|>", 0],
    }  # fmt: skip
    write(folder, "tokenizer.json", content)


LLAMA = configs.to_hf(tiny.MODELS["llama"], "llama")
FOLDERS = {
    "config that is not JSON": (
        file("config.json", "{'a': 1}"),
        "its config.json cannot be read (not a valid JSON file",
    ),
    "config of no object": (
        file("config.json", "[]"),
        "its config.json cannot be read (not an object with a model_type)",
    ),
    "config too deep": (
        file("config.json", "[" * 100_000),
        "its config.json cannot be read (not a valid JSON file: max",
    ),
    "no layers": (changed(n_layer=0), "num_layers=0 (must be a whole number above 0)"),
    "fewer than no heads": (changed(n_head=-2), "num_heads=-2 (must be a whole number above 0)"),
    "enormous layers": (changed(n_layer=10**9), "its config.json holds n_layer=1000000000 (must be at most 10,000)"),
    "enormous vocabulary": (changed(vocab_size=10**15), "vocab_size=1000000000000000 (must be at most 100,000,000)"),
    "enormous labels": (changed(num_labels=10**9), "num_labels=1000000000 (must be at most 100,000)"),
    "a size in words": (changed(n_embd="wide"), "its config.json cannot be read ("),
    "a size that is true": (changed(n_layer=True), "n_layer"),
    "a rate above one": (changed(attn_pdrop=1.5), "attention_dropout=1.5 (must be a number from 0 to below 1)"),
    "a norm of nothing": (changed(layer_norm_epsilon=0.0), "norm_eps=0.0 (must be a number above 0)"),
    "several": (
        changed(n_layer=0, n_positions=-1, activation_function="mish"),
        "activation_function='mish' (supported",
    ),
    "no window": (
        file("config.json", LLAMA | {"model_type": "mistral", "sliding_window": 0}),
        "sliding_window=0 (must be a whole number above 0)",
    ),
    "a window below zero": (
        file("config.json", LLAMA | {"model_type": "mistral", "sliding_window": -4}),
        "sliding_window=-4 (must be a whole number above 0)",
    ),
    "odd heads": (
        file("config.json", LLAMA | {"head_dim": 15}),
        "its config.json cannot be read (",
    ),
    "rotation of nothing": (
        file("config.json", LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 0.0, "factor": -2.0}}),
        "rope rope_theta=0.0 (must be a number above 0); rope factor=-2.0 (must be a number above 0)",
    ),
    "ids beyond the vocabulary": (
        changed(vocab_size=200),
        "its tokenizer has ids up to 256, but the model only 200 embedd",
    ),
    "ids around texts beyond the vocabulary": (
        added,
        "its tokenizer has ids up to 5000, but the model only 257 embeddings",
    ),
    "tokenizer that is not JSON": (file("tokenizer.json", "{"), "its tokenizer cannot be read ("),
    "modules that are no list": (file("modules.json", {"a": 1}), "modules.json does not hold a list; fetch it again"),
    "modules that are no objects": (
        file("modules.json", [1]),
        "modules.json must be a list of objects; fetch it again",
    ),
    "prompts that are no texts": (
        file("config_sentence_transformers.json", {"prompts": {"query": 1}}),
        "config_sentence_transformers.json: prompts={'query': 1} must map names to texts",
    ),
    "a length that is none": (
        file("sentence_bert_config.json", {"max_seq_length": "x"}),
        "max_seq_length='x' must be a number",
    ),
    "a damaged copy in a workdir": (file(weights.REST, "x"), "rest.safetensors is damaged"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_refused(folder, case):
    spoil, message = FOLDERS[case]
    spoil(folder)
    if case == "a damaged copy in a workdir":
        text = refused(hf._rest_dtype, folder)
    else:
        text = refused(hf.open_model, str(folder), "generator.path", "generator")
        assert text.startswith(f"generator.path={str(folder)!r}: ")
    assert message in text


def without(*names):
    """A folder whose tokenizer knows no such special tokens."""

    def spoil(folder):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        write(folder, "tokenizer_config.json", {k: v for k, v in settings.items() if k not in names})

    return spoil


def test_a_tokenizer_without_pad_is_fine_and_without_end_is_no_generators(folder):
    source = hf.open_model(str(folder), "generator.path", "generator")
    prompt = data.Prompt(source.tokenizer, "{passage}", "{query}", "{answer}", 8, 8, 8)
    assert source.tokenizer.pad_token is None
    assert data.answer_segments(prompt, ["a"])[0].tolist()[-1] == 0
    without("eos_token", "bos_token")(folder)
    source = hf.open_model(str(folder), "generator.path", "generator")
    prompt = data.Prompt(source.tokenizer, "{passage}", "{query}", "{answer}", 8, 8, 8)
    assert "its tokenizer has no eos_token, which ends every answer; name one" in refused(
        data.answer_segments, prompt, ["a"]
    )


def test_a_retriever_without_pad_or_end_is_exported_with_a_pad_token(folder, tmp_path):
    without("eos_token", "bos_token")(folder)
    source = hf.open_model(str(folder), "retriever.path", "retriever")
    (tmp_path / "out").mkdir()
    hf.save_model(source, hf.load_params(folder, "gpt2", SMALL), tmp_path / "out", pooling=source.pooling)
    again = hf.open_model(str(tmp_path / "out"), "retriever.path", "retriever").tokenizer
    assert again.pad_token is not None and again.pad_token_id == 0


# Configs: what is given -> what the line says.

TINY = "configs/tiny.py"
CONFIGS = {
    "wrong type": ({"batch_size": 8.5}, "batch_size=8.5: must be a whole number"),
    "a list for a number": ({"optimizer.learning_rate": [1]}, "optimizer.learning_rate=[1]: must be a number"),
    "below zero": ({"data.query_len": -3}, "data.query_len=-3: must be at least 3"),
    "beyond 32 bits": ({"total_steps": 2**31}, "total_steps=2147483648: must be below 2147483648"),
    "unknown key": ({"optimizer.warmup": 3}, "unknown key optimizer.warmup; did you mean optimizer.warmup_steps?"),
    "keys that are unhashable": (
        {"optimizer.rate_rules": "{[]: 1}"},
        "optimizer.rate_rules={[]: 1}: must be pairs such",
    ),
    "an endless repetition": (
        {"optimizer.rate_rules": "(('a{99999999999}', 1),)"},
        "'a{99999999999}' is not a regular expression (the repetition number is too large)",
    ),
    "queries that are the passages": (
        {"data.columns.query": "Abstract"},
        "data.columns.query='Abstract', data.columns.passage='Abstract': every query would be its own passage",
    ),
    "no negatives": (
        {"batch_size": 1, "group_size": 1, "objective.candidates": 1, "objective.name": "none"},
        "batch_size=1, objective.name='none', objective.marginal_weight=1.0, objective.evidence_weight=1.0: a batch of "
        "one has no negatives",
    ),
    "half a character": (
        {"prompt.query": "{query}\udcff"},
        "holds half a character (a lone surrogate); give it as UTF-8",
    ),
    "NUL": ({"retriever.path": "a\0"}, "retriever.path='a\\x00': holds a NUL character; remove it"),
    "all at once": (
        {"seed": -1, "sede": 1, "dtype": "int8", "group_size": 3, "mesh.data": 0, "total_steps": "x"},
        "total_steps=x: must be a whole number; unknown key sede; did you mean seed?; seed=-1: must be at least 0",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_refused(case):
    overrides, message = CONFIGS[case]
    text = refused(config.load, TINY, overrides)
    assert message in text
    if case == "all at once":
        for part in (
            "dtype='int8': must be one of",
            "mesh.data=0: must be -1",
            "group_size=3, batch_size=8: the group",
        ):
            assert part in text


def test_a_config_file_that_ends_the_process(tmp_path):
    (tmp_path / "c.py").write_text("import sys\ndef get_config():\n    sys.exit(0)\n")
    assert "raises SystemExit: 0" in refused(config.load, tmp_path / "c.py")


def test_paths_of_any_bytes_survive_a_workdir(tmp_path):
    loaded = config.load(TINY, {"data.train": "rows-\udcff.csv", "data.eval": "Zeilen-ü.csv"})
    text = config.to_json(loaded)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert "Zeilen-ü.csv" in text and config.load_workdir(tmp_path) == loaded
