"""Nothing that others wrote is run, leads elsewhere or is shown raw; no secret is written down."""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import sys

import datasets
import jax
import jax.numpy as jnp
import markdown_it
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rag_jax import cli, config, export, files, hf, untrusted
from rag_jax.data import rows as row_files
from rag_jax.errors import UserError
from rag_jax.hf import folder as folders
from rag_jax.hf import tiny, weights
from rag_jax.publishing import cards
from rag_jax.training import setup
from rag_jax.workdir import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.py"
COLUMNS = {"query": "Question", "passage": "Abstract", "answer": "Answer"}
TABLE = {"Question": ["q"], "Abstract": ["p"], "Answer": ["a"]}
TOKEN = "hf_" + "Secret0" * 5


# Code.

RUNS_CODE = re.compile(
    r"\bimport\s+(pickle|dill|cloudpickle|joblib|marshal|shelve)\b|\bpickle\.|allow_pickle\s*=\s*True|torch\.load"
    r"|weights_only\s*=\s*False|yaml\.(unsafe_)?load\b|(?<![\w.])(eval|exec)\(|shell\s*=\s*True|os\.system"
    r"|trust_remote_code(?!\s*=\s*False)|\b(tarfile|unpack_archive)\b"
)


def test_no_word_of_the_package_runs_what_it_reads():
    for path in [*(ROOT / "rag_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        found = [line for line in path.read_text().splitlines() if RUNS_CODE.search(line)]
        assert not found, path
    for word in ("import pickle", "np.load(f, allow_pickle=True)", "torch.load(f)", "x = eval(text)", "yaml.load(f)"):
        assert RUNS_CODE.search(word)
    assert RUNS_CODE.search("f(trust_remote_code=True)") and RUNS_CODE.search("f(trust_remote_code=flag)")
    assert not RUNS_CODE.search("f(trust_remote_code=False)") and not RUNS_CODE.search("np.load(f, allow_pickle=False)")


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


unpickled = []
watching = False


def watch(event, arguments):
    if watching and event == "pickle.find_class":
        unpickled.append(arguments)


sys.addaudithook(watch)  # stays for the life of the process, so it is told when to look


@pytest.fixture
def marker(tmp_path):
    """A folder that comes to be if code of an input runs; whatever is unpickled fails the test, too."""
    global watching
    unpickled.clear()
    watching = True
    yield tmp_path / "ran"
    watching = False
    assert not (tmp_path / "ran").exists() and not unpickled


def test_the_watch_sees_what_it_is_for(tmp_path):
    global watching
    watching = True
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    watching = False
    assert (tmp_path / "ran").is_dir() and unpickled
    unpickled.clear()


def poisoned_table(marker):
    """A column of the type that Arrow once unpickled on sight."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil(marker)),
    }
    field = pyarrow.field("Abstract", pyarrow.string(), metadata=metadata)
    texts = pyarrow.string()
    schema = pyarrow.schema([("Question", texts), field, ("Answer", texts)])
    return pyarrow.table([["q"], ["p"], ["a"]], schema=schema)


def test_rows_unpickle_nothing(tmp_path, marker):
    table, folder = poisoned_table(marker), tmp_path / "saved"
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    with pyarrow.OSFile(str(tmp_path / "r.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset.from_dict(TABLE).save_to_disk(str(folder))
    (arrow,) = folder.glob("*.arrow")
    with pyarrow.OSFile(str(arrow), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for extra in ("dataset.pkl", "cache.pickle"):
        (folder / extra).write_bytes(pickle.dumps(Evil(marker)))
    for name in ("r.parquet", "r.arrow", "saved"):
        rows = row_files.read_rows(str(tmp_path / name), "data.train", COLUMNS)
        queries, passages, answers = TABLE.values()
        assert rows == row_files.Rows(queries, [[text] for text in passages], answers)
    for name in ("r.csv", "r.json", "r.jsonl", "r.parquet", "r.arrow", "r.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(marker)))
        with pytest.raises(UserError):
            row_files.read_rows(str(tmp_path / name), "data.train", COLUMNS)


def test_tokenised_rows_on_disk_unpickle_nothing(tmp_path, marker, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path))
    evil = np.array([Evil(marker)], dtype=object)
    np.savez(tmp_path / "a.npz", a=evil)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Evil(marker)))
    np.save(tmp_path / "c.npy", evil)
    (tmp_path / "c.npy").rename(tmp_path / "c.npz")
    for key in ("a", "b", "c"):
        made, found = files.cached(key, lambda: {"a": np.ones(2)})
        assert not found and made["a"].tolist() == [1, 1]


def test_models_unpickle_nothing(tmp_path, marker):
    tiny.build("gpt2", tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "tokenizer.pkl", "optimizer.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(marker)))
    source = hf.open_model(str(tmp_path), "generator.path", "generator")
    hf.load_params(tmp_path, source.model_type, source.model_config)
    (tmp_path / weights.SINGLE).write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        hf.load_params(tmp_path, source.model_type, source.model_config)
    (tmp_path / weights.SINGLE).unlink()
    with pytest.raises(UserError, match="pytorch_model.bin is refused, for it holds not an archive"):
        hf.load_params(tmp_path, source.model_type, source.model_config)


def test_checkpoints_unpickle_nothing(tmp_path, marker):
    items = {"params": {"a": jnp.arange(4.0)}, "opt_state": {"b": jnp.zeros(2)}}
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, items)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), items)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract, 1)
    assert restored["params"]["a"].tolist() == [0, 1, 2, 3]


CODE = "import os\nos.mkdir({marker!r})\nclass Config: pass\nclass Tokenizer: pass\n"


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_models_folder_is_not_run(tmp_path, marker, known, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.build("gpt2", folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Config"}
    settings["model_type"] = "gpt2" if known else "own"
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal whether the code may run"))
    if not known:
        with pytest.raises(
            UserError, match=r"model_type='own' is code of its own \(auto_map.*which is never run; supp"
        ):
            hf.open_model(str(folder), "generator.path", "generator")
        return
    source = hf.open_model(str(folder), "generator.path", "generator")
    (tmp_path / "out").mkdir()
    hf.save_model(source, hf.load_params(folder, source.model_type, source.model_config), tmp_path / "out")
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / "out" / name).read_text(), "nor does what is exported ask for it"


def test_modules_of_others_are_not_named_to_sentence_transformers(tmp_path):
    modules = [{"idx": 0, "name": "0", "path": "", "type": "own_package.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(
        UserError, match="a module 'own_package.Transformer' that is code of its own, which is never run"
    ):
        hf.pooling.read_pooling(tmp_path, "mean", "retriever.path='x'")


# Places.


def test_a_link_out_of_a_models_folder_is_not_followed(tmp_path):
    folder, secret = tmp_path / "model", tmp_path / "id_rsa"
    folder.mkdir()
    tiny.build("gpt2", folder)
    secret.write_text("a key")
    (folder / "vocab.txt").symlink_to(secret)
    with pytest.raises(
        UserError, match=r"vocab\.txt is a link out of the folder, to .*id_rsa; put a copy in its place"
    ):
        hf.open_model(str(folder), "generator.path", "generator")
    (folder / "vocab.txt").unlink()
    # Links within the folder, and of a folder made of links to another, are whole models.
    (folder / "tokenizer.json").rename(folder / "other.json")
    (folder / "tokenizer.json").symlink_to("other.json")
    farm = tmp_path / "farm"
    farm.mkdir()
    for name in ("config.json", "tokenizer_config.json", weights.SINGLE):
        (farm / name).symlink_to(folder / name)
    (farm / "tokenizer.json").write_bytes((folder / "other.json").read_bytes())
    for path in (folder, farm):
        hf.copy_small_files(hf.open_model(str(path), "generator.path", "generator"), tmp_path / "copy" / path.name)
        assert not any(file.is_symlink() for file in (tmp_path / "copy" / path.name).iterdir())


def test_links_of_the_hubs_cache_are_its_own(tmp_path):
    home = tmp_path / "models--a--b"
    snapshot, blobs = home / "snapshots" / "0123", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    tiny.build("gpt2", snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(pathlib.Path("..") / ".." / "blobs" / str(number))
    assert hf.open_model(str(snapshot), "generator.path", "generator").model_type == "gpt2"
    (tmp_path / "key").write_text("")
    (snapshot / "merges.txt").symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match=r"merges\.txt is a link out of the folder"):
        folders.small_files(snapshot, "generator.path='a/b'")


def test_rows_that_point_outside_of_their_folder(tmp_path):
    data = datasets.Dataset.from_dict(TABLE)
    data.save_to_disk(str(tmp_path / "there"))
    data.save_to_disk(str(tmp_path / "saved"))
    (there,) = (tmp_path / "there").glob("*.arrow")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    for name in (f"../there/{there.name}", str(there)):
        (tmp_path / "saved" / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
        with pytest.raises(UserError, match=f"points outside of its folder, to {re.escape(name)}; save it again"):
            row_files.read_rows(str(tmp_path / "saved"), "data.train", COLUMNS)
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["../there"]}')
    with pytest.raises(UserError, match=r"points outside of its folder, to \.\./there; save it again"):
        row_files.read_rows(str(tmp_path / "splits"), "data.train", COLUMNS)


def test_an_export_goes_nowhere_but_into_a_new_or_empty_folder(tmp_path, monkeypatch):
    """Also not where something comes to be while it is made, and a link to an empty folder stays one."""
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))
    loaded = config.load(TINY)
    mine = tmp_path / "out" / "mine"

    class One(checkpoint.Checkpoints):
        """The one checkpoint of a run; it takes long enough for somebody to use the folder."""

        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def find(self, step):
            return 3

        def paths(self, step, item):
            return set()

        def restore(self, items, step):
            if mine.parent.is_dir():
                mine.write_text("mine")
            return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), items)

    monkeypatch.setattr(setup, "Checkpoints", One)
    (tmp_path / "run").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(
        UserError, match=r"--out=.*out: Directory not empty, while the export was made; give a new folder"
    ):
        export.export(loaded, tmp_path / "run", tmp_path / "out", None, "float32")
    assert mine.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out", "run"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert export.export(loaded, tmp_path / "run", tmp_path / "link", None, "float32") == 3
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "generator" / "README.md").is_file()


# Secrets.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/rows.csv", "https://***@host/rows.csv"),
        (f"https://{TOKEN}@hub/rows", "https://***@hub/rows"),
        (f"data.train='{TOKEN}'", "data.train='***'"),
        ("s3://b/x?X-Amz-Signature=abcdef&v=1", "s3://b/x?X-Amz-Signature=***&v=1"),
        ("GET /x?token=abc HTTP", "GET /x?token=*** HTTP"),
        ("authorization: Bearer abcdefgh.ijkl", "authorization: Bearer ***"),
        ("github_pat_" + "a1" * 12, "***"),
        ("AKIA" + "ABCDEFGH12345678", "***"),
        ("the value of $MY_API_KEY is correct-horse-battery", "the value of $MY_API_KEY is ***"),
        ("who@example.org asks: what is a token?", "who@example.org asks: what is a token?"),
        (
            "BAAI/bge-small-en, hf_models/x, sk-learn, ./data@2024/rows.csv",
            "BAAI/bge-small-en, hf_models/x, sk-learn, ./data@2024/rows.csv",
        ),
    ],
)
def test_secrets_are_hidden_and_all_else_is_not(monkeypatch, text, shown):
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "what is a token?")
    assert untrusted.redact(text) == shown


@pytest.mark.parametrize("value", ["https://user:pass@host/rows.csv", TOKEN, f"owner/rows?token={TOKEN}"])
def test_a_config_holds_no_secret(value, capsys):
    """So none can come into config.json, the summary, model cards or messages about it."""
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: config.load(TINY, {"data.train": value, "seed": "x"}) and None)
    err = capsys.readouterr().err
    assert end.value.code == 2 and "holds a password or a token, which would be saved with the run; leave it out" in err
    assert "pass@" not in err and TOKEN not in err and "***" in err


def test_tokens_of_the_environment_are_in_no_message(monkeypatch, capsys, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name: (_ for _ in ()).throw(RuntimeError(f"401 for {os.environ['HF_TOKEN']}"))
    )
    with pytest.raises(SystemExit):
        cli.run(lambda: row_files.read_rows("owner/rows", "data.train", COLUMNS) and None)
    assert "401 for ***" in (err := capsys.readouterr().err) and TOKEN not in err + caplog.text


# What is shown.


@pytest.mark.parametrize("nasty", ["a\x1b[2Jb", "a\rb\nc", "a\u202eb", "\udcff", "a\x00b"])
def test_messages_are_one_plain_line(nasty, capsys):
    def fail():
        raise UserError(f"--config={nasty}: no such file")

    with pytest.raises(SystemExit):
        cli.run(fail)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err[:-1].isprintable() and err.endswith(": no such file\n")


def test_long_messages_end(capsys):
    assert len(untrusted.shown("x" * 10**6)) < 11_000


NASTY = [
    "{passage}` | </code><script>alert(1)</script> [x](javascript:1) `",
    "{passage}\n---\nlicense: stolen\n---\n# Heading\n",
    "{passage}\r\n\r\n| a | b |\r<img src=x>",
    "{passage}\\| \\` ``` \u2028\n```\n<b>",
    "\n```\n{passage}\n```\n![](http://x/y.png)",
]


@pytest.mark.parametrize("template", NASTY)
def test_cards_show_texts_as_texts(template):
    markdown = markdown_it.MarkdownIt("commonmark").enable("table")
    facts, role = cards.Facts(3, {"rows": 5}, {}, {}, 100), "generator"
    names = {"generator": "generator", "retriever": "retriever"}
    plain = cards.card(config.load(TINY), role, facts, names)
    changes = {"prompt.passage": template, "generator.path": "random:gpt2"}
    loaded = config.load(TINY, changes)
    loaded.generator.path = f"x/a`|<script>{template}"
    card = cards.card(loaded, role, facts, names)

    def shape(text):
        """Kinds of all elements in order, texts aside."""
        front, body = text.split("---\n", 2)[1:]
        tokens = markdown.parse(body)
        kinds = [(token.type, token.tag, [child.type for child in token.children or ()]) for token in tokens]
        return front, kinds

    assert shape(card) == shape(plain)
    assert not any("html" in kind for kind, _, _ in shape(card)[1])
    code = [token.content for token in markdown.parse(card) if token.type == "fence" and token.info == "python"]
    assert len(code) == 2
    for each in code:
        compile(each, "card", "exec")
    assert repr(template) in code[0], "what is shown is what was trained with"
    loaded.retriever.path = loaded.generator.path
    safe, nasty = (
        cards.card(loaded, "retriever", dataclasses.replace(facts, prefixes=prefixes), names)
        for prefixes in (("ask: ", "say: "), (template, template))
    )
    assert shape(nasty) == shape(safe)
