"""Weights in safetensors and our trees of stacked float32 arrays, both ways by the tables of `rules`."""

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from rag_jax import models
from rag_jax.errors import UserError
from rag_jax.hf.rules import CARRIED, DROPPED, PREFIXES, RULES, Rule

DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What training leaves alone, kept in a workdir where the weights themselves are in checkpoints.
REST = "rest.safetensors"
SHARD_BYTES = 5 * 10**9
MOST_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Expected:
    """A tensor that a file must hold, and where it goes: layer `layer` of a stack, or the whole leaf."""

    rule: Rule
    layer: int | None
    shape: tuple[int, ...]


def load_params(folder: pathlib.Path, config: models.ModelConfig) -> dict[str, Any]:
    """The parameters of a model folder as nested dicts of numpy float32, layers stacked.

    UserError, one line with all problems: no or broken files, tensors that are missing, unknown or of another shape.
    """
    leaves = {path: np.empty(leaf.shape, np.float32) for path, leaf in _leaves(config).items()}
    expected = expected_tensors(config)
    with _opened(folder, config) as tensors:
        _check(folder, tensors, expected)
        for name, tensor in expected.items():
            value = np.asarray(tensors[name].read(), np.float32)
            value = value.T if tensor.rule.transpose else value
            for path, part in zip(tensor.rule.parts, _split(value, tensor.rule, leaves), strict=True):
                leaves[path][() if tensor.layer is None else tensor.layer] = part
    return _nest(leaves)


def save_params(
    params: Mapping[str, Any],
    folder: pathlib.Path,
    config: models.ModelConfig,
    dtype: Any,
    rest: Mapping[str, np.ndarray] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Inverse of `load_params`, with the names that `transformers` writes, and the tensors of `rest` beside them."""
    leaves = _leaves(config)
    arrays = {path: np.asarray(_at(params, path)) for path in leaves}
    tensors = {}
    for name, tensor in expected_tensors(config).items():
        here = () if tensor.layer is None else tensor.layer
        value = np.concatenate([arrays[path][here] for path in tensor.rule.parts], axis=-1)
        tensors[name] = np.ascontiguousarray(value.T if tensor.rule.transpose else value, dtype)
    tensors |= {name: np.ascontiguousarray(value, dtype) for name, value in (rest or {}).items()}
    _write(folder, tensors, shard_bytes)


def load_rest(folder: pathlib.Path, config: models.ModelConfig) -> dict[str, np.ndarray]:
    """Tensors of the model that our forward pass does not use, such as BERT's pooler, as they stand in its files."""
    with _opened(folder, config) as tensors:
        return {name: tensor.read() for name, tensor in tensors.items() if re.fullmatch(CARRIED, name)}


def file_dtype(folder: pathlib.Path, config: models.ModelConfig) -> str:
    """ "float32", "float16" or "bfloat16": that of most of the folder's tensors, of which all must be there.

    UserError as of `load_params`, for only the files' headers are needed to see what it would complain about.
    """
    with _opened(folder, config) as tensors:
        _check(folder, tensors, expected_tensors(config))
        kinds = [tensor.kind for tensor in tensors.values() if tensor.kind in DTYPES] or ["F32"]
    return np.dtype(DTYPES[max(set(kinds), key=kinds.count)]).name


def expected_tensors(config: models.ModelConfig) -> dict[str, Expected]:
    """`{their name: ...}` of every tensor that a model of this config has."""
    leaves = _leaves(config)
    expected = {}
    for rule in RULES[type(config)]:
        if not all(path in leaves for path in rule.parts):
            continue  # a bias, norm or head that this model does without
        *first, last = leaves[rule.parts[0]].shape
        shape = (*first, last + sum(leaves[path].shape[-1] for path in rule.parts[1:]))
        if rule.stacked:
            shape = shape[1:]
        shape = shape[::-1] if rule.transpose else shape
        for i in range(config.num_layers) if rule.stacked else (None,):
            expected[rule.hf if i is None else rule.hf.format(i=i)] = Expected(rule, i, shape)
    return expected


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in an open file, not read yet."""

    file: Any
    name: str
    kind: str  # "F32" and the like
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


@contextlib.contextmanager
def _opened(folder: pathlib.Path, config: models.ModelConfig) -> Iterator[dict[str, _Tensor]]:
    """Every tensor of the folder by the name that `rules` knows it under."""
    with contextlib.ExitStack() as stack:
        tensors = {}
        for path in _files(folder):
            try:
                file = stack.enter_context(safetensors.safe_open(path, "np"))
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(f"{path} is no whole safetensors file ({str(error)[:120]}); fetch it again") from None
            for name in file.keys():
                part = file.get_slice(name)
                known = canonical(name, type(config))
                tensors[known] = _Tensor(file, name, part.get_dtype(), tuple(part.get_shape()))
        yield tensors


def canonical(name: str, family: type) -> str:
    """The name as `transformers` writes it today: with or without its model's prefix, gamma and beta by their names."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    prefix = PREFIXES[family]
    if family is models.BertConfig:
        return name.removeprefix(prefix)
    return name if name.startswith((prefix, "lm_head.", "score.")) else prefix + name


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / REST).is_file():
        return [folder / REST]
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt"))
        found = f"only {', '.join(others[:3])}, which can run code when read" if others else "no weights"
        raise UserError(
            f"{folder} holds {found}; needed is {SINGLE} or {INDEX} (`save_pretrained` of transformers writes it)"
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if name != pathlib.PurePath(name).name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / INDEX} is no index of safetensors files; fetch it again") from None
    if outside:
        raise UserError(f"{folder / INDEX} points outside of its folder, to {outside[0]}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, named in {INDEX}; fetch it again")
    return [folder / name for name in names]


def _check(folder: pathlib.Path, tensors: Mapping[str, _Tensor], expected: Mapping[str, Expected]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            if not re.fullmatch(f"{CARRIED}|{DROPPED}", name):
                problems.append(f"{name} is unknown")
        elif tensor.shape != expected[name].shape:
            problems.append(f"{name} is {tensor.shape}, not {expected[name].shape}")
        elif tensor.kind not in DTYPES:
            problems.append(f"{name} is {tensor.kind}, not one of {', '.join(DTYPES)}")
    if problems:
        shown = "; ".join(problems[:MOST_SHOWN])
        more = f"; and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise UserError(f"the weights in {folder} do not fit its config.json: {shown}{more}")


def _split(value: np.ndarray, rule: Rule, leaves: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    ends = np.cumsum([leaves[path].shape[-1] for path in rule.parts])[:-1]
    return np.split(value, ends, axis=-1)


def _write(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    # "format" is what `transformers` asks of every file.
    metadata = {"format": "pt"}
    if len(shards) == 1:
        safetensors.numpy.save_file(shards[0], folder / SINGLE, metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors.numpy.save_file(shard, folder / file, metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _leaves(config: models.ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(models.abstract(config)[1])
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nest(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree
