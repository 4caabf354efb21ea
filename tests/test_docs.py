"""The documentation holds: commands run or at least parse, keys and files exist, links lead somewhere.

`python tests/test_docs.py` writes the table of keys in docs/training.md anew.
"""

import csv
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from rag_jax import cli, config  # noqa: E402 (after the path is set, for the command above)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
TINY = ROOT / "configs" / "tiny.py"
TABLE = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- keys: written by `python tests/test_docs.py` -->\n\n", "<!-- end of keys -->\n"
MOST_LINES = 200  # of the README

# Run by no test of this file, and why. The first words of a command.
NOT_RUN = {
    "make quickstart": "5 minutes; tests/commands/test_quickstart.py runs its parts",
    "make test": "this suite",
    "make lint": "a check of its own in .ci/run",
    "make soak": "hours",
    ".ci/run": "this suite and more",
    "python -m venv": "makes what this runs in",
    "source .venv/bin/activate": "of the user's shell",
    "tensorboard": "another program, which does not end",
    "b2sum": "another program; tests/workdir/test_checkpoint.py reads what it reads",
    "pip install": "the network",
    "python tests/test_docs.py": "writes the table that is compared here",
    "python -m benchmarks.": "minutes to hours; flags and keys are checked",
}
# What runs here, in this order, and is parsed wherever else it stands.
ORDER = ("main", "export", "evaluate")
# Parsed by the real parsers, keys and values checked, but not run here, and why.
ONLY_PARSED = {
    "ask": "decoding takes long to compile; tests/commands/test_ask.py and tests/test_api.py run it",
    "index": "tests/commands/test_index.py runs it",
    "replay": "compiles the step twice more; tests/training/test_watch.py runs it",
    "prepare": "tests/documents/test_documents.py runs it",
    "report": "tests/report/test_report.py runs it",
    "plan": "compilers that are not installed everywhere; tests/planning/test_plan.py runs it",
}
# So that a run takes a second: no generator, and few steps.
CHEAP = {
    "objective.name": "none", "generator.path": "None", "total_steps": "8", "eval.every_steps": "8",
    "data.eval": "held_out.csv",
}  # fmt: skip
COMMAND = re.compile(r"(\$ )?(python|make|launch/\w+\.sh|\.ci/|tensorboard|pip|source|b2sum|([A-Z_]+=\S+ )+launch/)")


class Command(NamedTuple):
    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def fences(text):
    """The fenced blocks of a page without a language."""
    blocks = re.findall(r"^( *)```\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return ["\n".join(line.strip() for line in body.splitlines()) for _, body in blocks]


def commands_of(page):
    """Each command of a page once, on one line, without what stands behind a #."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in fences(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += [
        code for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)) if " " in code
    ]
    found = (line.removeprefix("$ ").strip() for line in lines if COMMAND.match(line))
    return [Command(str(page.relative_to(ROOT)), line) for line in dict.fromkeys(found)]


COMMANDS = [command for page in PAGES for command in commands_of(page)]


def words_of(text):
    return shlex.split(text, comments=True)


def module_of(text):
    """main for `python -m rag_jax.main ...`."""
    found = re.match(r"python -m rag_jax\.(\w+)", text)
    return found and found[1]


class Parsed(Exception):
    """Ends a command once its flags are read."""


def parsed(module, words, monkeypatch):
    """Flags and overrides of a command as its own parser reads them; UserError for what it does not know."""
    parse = cli.parse

    def read_only(flags, argv=None):
        raise Parsed(*parse(flags, argv))

    monkeypatch.setattr(cli, "parse", read_only)
    monkeypatch.setattr(sys, "argv", [module, *words])
    is_folder = (ROOT / "rag_jax" / module).is_dir()
    command = __import__(f"rag_jax.{module}{'.__main__' if is_folder else ''}", fromlist=["main"])
    with pytest.raises(Parsed) as end:
        command.main()
    return end.value.args


def check_command(text, monkeypatch):
    """UserError or AssertionError for a command of ours with flags, keys or values that there are not."""
    words = words_of(text)
    args, overrides = parsed(module_of(text), words[3:], monkeypatch)
    if "--help" not in words:
        file = getattr(args, "config", None) or TINY
        # The tiny config lacks nothing that the keys of others go with.
        config.load(TINY if str(file) in ("FILE.py",) else ROOT / file, overrides)


def check_benchmark(text):
    """The same by the source: importing benchmarks takes PyTorch."""
    _, _, module, *words = words_of(text)
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    for word in words:
        name, _, value = word.partition("=")
        if name.startswith(cli.PREFIX):
            config.load(TINY, {name.removeprefix(cli.PREFIX): value})
        elif name.startswith("--"):
            assert f'"{name}"' in source, f"{module} has no flag {name}"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_known(command, monkeypatch, capsys):
    text, reasons = command.text, [name for name in NOT_RUN if command.text.startswith(name)]
    if module_of(text):
        if len(words_of(text)) == 3:  # a command by its name alone
            assert (ROOT / "rag_jax" / f"{module_of(text)}.py").exists()
        elif "--help" in words_of(text):
            with pytest.raises(SystemExit) as end:
                check_command(text, monkeypatch)
            assert end.value.code == 0
        else:
            check_command(text, monkeypatch)
    elif text.startswith("python -m benchmarks."):
        check_benchmark(text)
    elif "launch/" in text:
        check_launch(text, monkeypatch)
    else:
        assert len(reasons) == 1, f"{command} is neither run here nor in NOT_RUN"


def check_launch(text, monkeypatch):
    """A dry run of the script, and the training's own flags."""
    words = words_of(text)
    script = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    variables = dict(word.split("=", 1) for word in words[:script])
    end = words.index("--")
    dry = [*words[script:end], "--dry-run", *words[end:]]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_COORD"))}
    done = subprocess.run(dry, cwd=ROOT, env=kept | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_command(f"python -m rag_jax.main {shlex.join(words[end + 1 :])}", monkeypatch)


def test_the_lists_name_nothing_that_is_gone():
    texts = [command.text for command in COMMANDS]
    assert [name for name in NOT_RUN if not any(text.startswith(name) for text in texts)] == []
    assert [name for name in ONLY_PARSED if not any(module_of(text) == name for text in texts)] == []
    assert {module_of(c.text) for c in COMMANDS if module_of(c.text)} - {*ORDER, *ONLY_PARSED} == set()
    reasons = " ".join([*NOT_RUN.values(), *ONLY_PARSED.values()])
    assert [path for path in re.findall(r"tests/[\w/]+\.py", reasons) if not (ROOT / path).exists()] == []
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    made = {" ".join(words_of(text)[:2]) for text in texts if text.startswith("make ")}
    assert made <= {f"make {target}" for target in targets}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python -m rag_jax.main --config=FILE.py --workdir=DIR --config.data.trian=x", "unknown key data.trian"),
        ("python -m rag_jax.main --config=FILE.py --workdir=DIR --config.total_steps=few", "total_steps=few"),
        ("python -m rag_jax.evaluate --workdir=my_run --stepp=best", "unrecognized arguments: --stepp=best"),
        ("python -m rag_jax.ask --workdir=my_run --decoding=best 'q'", "invalid choice: 'best'"),
        ("python -m rag_jax.plan --config=configs/none.py --topology=h100:8", "no such file"),
        ("python -m benchmarks.step --case=gpt2 --remta=dots", "has no flag --remta"),
        ("launch/local.sh --process=2 -- --config=FILE.py --workdir=DIR", "unknown flag"),
        ("launch/local.sh -- --config=FILE.py --workdir=DIR --config.seeed=1", "unknown key seeed"),
    ],
)
def test_a_dead_flag_or_key_is_found(text, message, monkeypatch):
    with pytest.raises((config.UserError, AssertionError), match=message):
        if text.startswith("python -m benchmarks."):
            check_benchmark(text)
        elif text.startswith("launch/"):
            check_launch(text, monkeypatch)
        else:
            check_command(text, monkeypatch)


# --- commands that run ---


def executable():
    """What trains, exports and measures, in this order; of the trainings the one with most flags."""
    found = [c for c in COMMANDS if module_of(c.text) in ORDER and len(words_of(c.text)) > 3]
    found = [c for c in found if "--help" not in c.text and not c.page.startswith("benchmarks")]
    # Of a run that has adapters: tests/training/test_adapters.py; to the hub: tests/commands/test_push.py.
    found = [c for c in found if "--adapters" not in c.text and "--push" not in c.text]
    # Not the generator of a retriever that is there: tests/training/test_mining.py.
    trainings = (c for c in found if module_of(c.text) == "main" and "retriever.path=my_models" not in c.text)
    trains = max(trainings, key=lambda c: len(words_of(c.text)))
    others = {c.text: c for c in found if module_of(c.text) != "main"}.values()
    return [trains, *sorted(others, key=lambda c: ORDER.index(module_of(c.text)))]


def substituted(text, folder):
    """The command on a tiny retriever and its files in `folder`; rows have the columns that it names."""
    words, values, names = [], {}, {"query": "Question", "passage": "Abstract", "answer": "Answer"}
    for word in words_of(text)[3:]:
        name, _, value = word.partition("=")
        key = name.removeprefix(cli.PREFIX)
        if name == "--config":
            words.append(f"--config={TINY}")
            values = CHEAP | values
        elif name in ("--workdir", "--out", "--models", "--index"):
            words.append(f"{name}={folder / value}")
        elif key.startswith("data.columns."):
            part = key.rpartition(".")[2]
            values |= {} if names[part] == value else {key: value}
            names[part] = value
        elif name.startswith(cli.PREFIX) and not key.endswith(".path"):
            values[key] = value
        elif not name.startswith(cli.PREFIX):
            words.append(word)
    for key in ("data.train", "data.eval", "data.passages"):
        if key in values:
            values[key] = str(write_rows(folder / f"{'-'.join(names.values())}-{values[key]}", names))
    return [*words, *(f"{cli.PREFIX}{key}={value}" for key, value in values.items())]


def write_rows(path, names):
    with open(ROOT / "tests" / "data" / "rows.csv", newline="", encoding="utf-8") as file:
        rows = [list(names.values()), *list(csv.reader(file))[1:]]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run: on one of the tests' devices, for which programs are compiled in less time."""
    import jax

    from rag_jax.distributed import sharding

    folder, compiled = tmp_path_factory.mktemp("docs"), jax.config.jax_compilation_cache_dir
    make_mesh, devices = sharding.make_mesh, jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *_, **__: make_mesh(1, 1, 1, devices))
        patch.setenv("RAG_JAX_CACHE", str(folder / "cache"))
        yield folder
    jax.config.update("jax_compilation_cache_dir", compiled)


@pytest.mark.slow
def test_the_commands_of_the_pages_run(folder, monkeypatch, capsys):
    """Each after the other, as a reader types them: what one trains, the others measure and export."""
    ran = set()
    for command in executable():
        module = module_of(command.text)
        monkeypatch.setattr(sys, "argv", [module, *substituted(command.text, folder)])
        with pytest.raises(SystemExit) as end:
            cli.run(__import__(f"rag_jax.{module}", fromlist=["main"]).main)
        _, err = capsys.readouterr()
        assert end.value.code == 0, f"{command}\n{err}"
        ran.add(module)
    assert ran == set(ORDER)
    assert (folder / "my_models" / "retriever" / "model.safetensors").is_file()


# --- keys, files, links ---


def table():
    """The table of all keys, as docs/training.md has it."""

    def cell(text):
        return text.replace("|", "\\|")

    rows = [f"| `{name}` | {cell(kind_of(key.kind))} | {cell(key.meaning)} |" for name, key in config.KEYS.items()]
    return "\n".join(["| key | type | meaning |", "|---|---|---|", *rows]) + "\n"


def kind_of(kind):
    names = {config.Rules: "rules", config.Texts: "texts", int: "int", float: "float", str: "text", bool: "bool"}
    return names.get(kind) or str(kind).replace("str", "text").replace(" | ", " or ")


def test_the_table_of_keys_is_that_of_the_config():
    _, found, rest = TABLE.read_text(encoding="utf-8").partition(BEGIN)
    assert found and rest.partition(END)[0] == table(), "run python tests/test_docs.py"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_variables_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    sections = "|".join(dict.fromkeys(name.split(".")[0] for name in config.KEYS if "." in name))
    keys = re.findall(rf"`((?:{sections})\.[a-z_.]+)(?:=[^`]*)?`", text)
    assert {key for key in keys if key not in config.KEYS} == set()
    files = re.findall(r"`((?:rag_jax|tests|configs|launch|benchmarks|docs)/[\w./-]*)`", text)
    assert {file for file in files if not (ROOT / file).exists()} == set()
    code = [*(ROOT / "rag_jax").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "launch").glob("*.sh")]
    ours = "".join(path.read_text() for path in code)
    assert {name for name in re.findall(r"RAG_JAX_[A-Z_]+", text) if name not in ours} == set()
    flags = set(re.findall(r"`(--[a-z][\w-]*)", text))
    assert {flag for flag in flags if not re.search(rf"{flag}(?![\w-])", ours)} == set()


def anchors(page):
    """What a page's headings are linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        other = page if not name else (page.parent / name).resolve()
        assert other.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(other), f"{page.name} links to {target}"


def test_the_readme_and_the_map_name_all_there_is():
    linked = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:-1] if f"](docs/{page.name})" not in linked] == []
    (shown,) = [block for block in fences((ROOT / "docs" / "developing.md").read_text()) if "rag_jax/main.py" in block]
    named = set(re.findall(r"[\w./]+", shown))
    parts = [p for p in (ROOT / "rag_jax").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    missing = [p.name for p in parts if not named & {p.name, f"rag_jax/{p.name}", f"rag_jax/{p.name}/"}]
    assert missing == []


if __name__ == "__main__":
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(BEGIN)
    TABLE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
