"""Imports point downwards, and each part knows only what it may: found by parsing, not by running."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "rag_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A folder or a module of the top may import those of the lines above its own, never a neighbour. Each stands here once.
LAYERS = (
    ("errors", "progress"),
    ("untrusted", "planning", "objectives"),
    ("files", "losses"),
    ("models", "data", "distributed", "documents", "report"),
    ("hf", "rag", "workdir"),
    ("pair",),
    ("inference",),
    ("evaluation", "serving"),
    ("config", "publishing"),
    ("cli", "training"),
    ("main", "evaluate", "export", "ask", "index", "plan", "prepare", "quickstart", "replay", "report.__main__"),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
COMMANDS = {"main", "evaluate", "export", "ask", "index", "plan", "prepare", "quickstart", "replay", "report.__main__"}
# Beyond the order above: what these may not import although it lies below, or is not ours.
MAY_NOT = {
    "data": {"jax", "jaxlib", "flax", "optax", "orbax"},
    "report": {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "numpy"},
    "publishing": {"jax", "jaxlib", "flax", "optax", "orbax", "numpy"},
    "documents": {"jax", "jaxlib", "flax", "optax", "orbax", "transformers"},
    "planning": {"jax", "jaxlib", "flax", "optax", "orbax"},
    "models": {"transformers", "tokenizers", "datasets", "ml_collections", "safetensors", "rag_jax.losses"},
    "losses": {"flax", "optax", "transformers", "ml_collections"},
    "objectives": {"jax", "jaxlib", "flax", "optax", "rag_jax"},
    "progress": {"jax", "jaxlib", "flax", "optax", "rag_jax"},
    "rag": {"transformers", "tokenizers", "datasets", "ml_collections", "rag_jax.distributed"},
    "inference": {"rag_jax.hf", "rag_jax.workdir"},
    "serving": {"jax", "jaxlib", "flax", "transformers", "numpy", "rag_jax.inference"},
    "evaluation": {"rag_jax.hf", "rag_jax.workdir"},
}


def part_of(path: pathlib.Path) -> str:
    """losses for rag_jax/losses.py, models for rag_jax/models/bert.py; a folder's command is a part by itself."""
    parts = path.relative_to(PACKAGE).parts
    return f"{parts[0]}.__main__" if parts[-1] == "__main__.py" else parts[0].removesuffix(".py")


def imports(source: str, package: str) -> set[str]:
    """Dotted names of all that a source text imports anywhere, `from rag_jax import losses` as rag_jax.losses."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def imports_of(path: pathlib.Path) -> set[str]:
    return imports(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))


def imports_when_loaded(source: str) -> set[str]:
    """What importing the file itself imports: neither what its functions do, nor what only type checkers see."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef)
        and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return imports(ast.unparse(tree), "rag_jax")


def ours(names: set[str]) -> set[str]:
    """The parts of this package among the names; `__version__` and the like are none."""
    parts = {name.split(".")[1] for name in names if name.startswith("rag_jax.")}
    return parts - {"__version__"}


def starts_with(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import jax.numpy as jnp", {"jax.numpy"}),
        ("from rag_jax import losses, models", {"rag_jax.losses", "rag_jax.models"}),
        ("def f():\n    from rag_jax.models.bert import Bert", {"rag_jax.models.bert.Bert"}),
        ("from . import layers", {"rag_jax.models.layers"}),
        ("from ..errors import UserError", {"rag_jax.errors.UserError"}),
    ],
)
def test_the_parser_sees_every_form(source, expected):
    assert imports(source, "rag_jax.models") == expected


def test_the_parser_tells_what_is_imported_at_once():
    source = "from rag_jax import a\nif TYPE_CHECKING:\n    import rag_jax.b\ndef f():\n    import rag_jax.c\n"
    assert imports_when_loaded(source) == {"rag_jax.a"}
    assert imports_when_loaded(source.replace("TYPE_CHECKING", "True")) == {"rag_jax.a", "rag_jax.b"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = part_of(path)
    if part == "__init__":
        assert not ours(imports_when_loaded(path.read_text())), "importing rag_jax must stay free of side effects"
        return
    assert part in RANK, f"rag_jax/{part} has no place in LAYERS"
    others = ours(imports_of(path)) - {part}
    assert others <= set(RANK), f"{others - set(RANK)} have no place in LAYERS"
    upwards = {other for other in others if RANK[other] >= RANK[part]}
    assert not upwards, f"{path.name} imports {sorted(upwards)}, not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_parts_know_only_what_they_may(path):
    names = imports_of(path)
    banned = {"torch", "pickle"} | MAY_NOT.get(part_of(path), set())
    assert not {name for name in names if starts_with(name, banned)}


def test_only_commands_read_flags():
    flags = {"argparse", "absl", "rag_jax.cli", "sys.argv"}
    readers = {part_of(path) for path in FILES if any(starts_with(name, flags) for name in imports_of(path))}
    assert readers <= COMMANDS | {"cli"}


def test_only_the_loop_and_the_commands_see_the_run_config():
    readers = {part_of(path) for path in FILES if any(starts_with(n, {"rag_jax.config"}) for n in imports_of(path))}
    assert readers <= COMMANDS | {"cli", "training", "__init__"}


def test_families_share_only_what_is_of_all():
    for path in (PACKAGE / "models").glob("*.py"):
        if path.stem != "__init__":
            inside = {name.split(".")[2] for name in imports_of(path) if name.startswith("rag_jax.models.")}
            shared = {
                "config", "products", "rows", "packing", "quantised", "layers", "adapters", "tpu_attention",
                "attention", "head", "rope", "decoder",
            }  # fmt: skip
            assert inside <= shared - {path.stem} or path.stem == "flops", path.name


def test_configs_hold_values_only():
    for path in (ROOT / "configs").glob("*.py"):
        outside = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names)
        assert outside <= {"ml_collections", "configs"}, path.name


# What adds over devices, and is never differentiated: where it were, its gradient would be summed once more a device.
SUMS = {"rag.py:total", "sharding.py:sums", "sharding.py:total", "decoding.py:unfinished"}


def test_sums_over_devices_stand_where_no_gradient_passes():
    found = set()
    for path in FILES:
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            within = [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef) and node is not function]
            own = set(ast.walk(function)) - {node for inner in within for node in ast.walk(inner)}
            if any(isinstance(node, ast.Attribute) and node.attr == "psum" for node in own):
                found.add(f"{path.name}:{function.name}")
    assert found == SUMS


def test_every_part_stands_in_one_layer_and_exists():
    assert sum(map(len, LAYERS)) == len(RANK)
    files = {part: PACKAGE / part.replace(".", "/") for part in RANK}
    assert not {part for part, path in files.items() if not path.is_dir() and not path.with_suffix(".py").exists()}
