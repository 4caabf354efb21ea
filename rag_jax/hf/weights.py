"""Weights in safetensors and our trees of stacked arrays, both ways by the tables of `families`."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from rag_jax import models, untrusted
from rag_jax.errors import UserError
from rag_jax.files import write_json
from rag_jax.hf import torch_file
from rag_jax.hf.families import FAMILIES, Family, Rule
from rag_jax.models import quantised

DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPE_NAMES = tuple(np.dtype(kind).name for kind in DTYPES.values())
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OTHERS = (".bin", ".pt", ".pth", ".h5", ".gguf", ".msgpack")  # kinds of weights that are not read
# What training leaves alone, kept in a workdir where the weights themselves are in checkpoints.
REST = "rest.safetensors"
SHARD_BYTES = 5 * 10**9
# Tensors that no family has use for: buffers that a loaded model makes anew.
BUFFERS = r"(.*\.)?(position_ids|token_type_ids|inv_freq|attn\.bias|attn\.masked_bias)"
HEADS = ("lm_head.", "score.")  # stand beside a model, without its prefix
MOST_SHOWN = 8
MOST_CHARS = 120  # of a name that a file gives


@dataclasses.dataclass(frozen=True)
class Expected:
    """A tensor that a file must hold, and where it goes: layer `layer` of a stack, or the whole leaf."""

    rule: Rule
    layer: int | None
    shape: tuple[int, ...]


def load_params(
    folder: pathlib.Path, model_type: str, config: models.ModelConfig, shardings: Any = None
) -> dict[str, Any]:
    """The parameters of a model folder as nested dicts, layers stacked, in the dtypes of `models.abstract`.

    Numpy arrays, or with `shardings` (a tree like them) jax arrays, of which every process reads only what its own
    devices hold.

    UserError, one line with all problems: no or broken files, tensors that are missing, unknown or of another shape.
    """
    family = FAMILIES[model_type]
    tensors = _tensors(folder, family)
    _check(folder, tensors, expected_tensors(family, config), family)
    pieces, held = _pieces(family, config), _leaves(config, as_held=True)
    leaves = {}

    def put(path: str, part: Callable[[Any], np.ndarray]) -> None:
        shape = held[path].shape
        if shardings is None:
            leaves[path] = part((slice(None),) * len(shape))
        else:
            leaves[path] = jax.make_array_from_callback(shape, at(shardings, path), part)

    for path, leaf in _leaves(config).items():
        with _reading() as read:  # a leaf at a time: no more of the files is in memory than it needs
            of_leaf = functools.partial(_part, pieces[path], leaf=leaf, read=functools.partial(_finite, tensors, read))
            if path in held:
                put(path, functools.partial(_in_dtype, of_leaf, held[path].dtype))
                continue
            for name, whole in _in_fewer_bits(of_leaf, leaf.shape, config.computing.base_dtype).items():
                put(f"{path.removesuffix('kernel')}{name}", whole.__getitem__)
    return _nest(leaves)


def save_params(
    params: Mapping[str, Any],
    folder: pathlib.Path,
    model_type: str,
    config: models.ModelConfig,
    dtype: Any,
    rest: Mapping[str, np.ndarray] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Inverse of `load_params`, with the names that `transformers` writes, and the tensors of `rest` beside them.

    Of arrays on devices no more than one file of `shard_bytes` is brought to the host at a time.
    """
    expected = expected_tensors(FAMILIES[model_type], config)

    def tensor(name: str) -> np.ndarray:
        if name not in expected:
            return np.ascontiguousarray((rest or {})[name], dtype)
        rule, layer = expected[name].rule, expected[name].layer
        arrays = [at(params, path) for path in rule.parts]
        value = np.concatenate([np.asarray(a if layer is None else _layer(a, layer)) for a in arrays], axis=-1)
        return np.ascontiguousarray(value.T if rule.transpose else value, dtype)

    shapes = {name: wanted.shape for name, wanted in expected.items()}
    shapes |= {name: value.shape for name, value in (rest or {}).items()}
    _write(folder, tensor, {name: math.prod(s) * np.dtype(dtype).itemsize for name, s in shapes.items()}, shard_bytes)


def load_rest(folder: pathlib.Path, model_type: str) -> dict[str, np.ndarray]:
    """Tensors of the model that our forward pass does not use, such as BERT's pooler, as they stand in its files."""
    family = FAMILIES[model_type]
    found = {name: tensor for name, tensor in _tensors(folder, family).items() if re.fullmatch(family.carried, name)}
    with _reading() as read:
        return {name: read(tensor, ...) for name, tensor in found.items()}


def file_dtype(folder: pathlib.Path, model_type: str, config: models.ModelConfig) -> str:
    """ "float32", "float16" or "bfloat16": that of most of the folder's tensors, of which all must be there.

    UserError as of `load_params`, for only the files' headers are needed to see what it would complain about.
    """
    family = FAMILIES[model_type]
    tensors = _tensors(folder, family)
    _check(folder, tensors, expected_tensors(family, config), family)
    kinds = [tensor.kind for tensor in tensors.values() if tensor.kind in DTYPES] or ["F32"]
    return np.dtype(DTYPES[max(set(kinds), key=kinds.count)]).name


def expected_tensors(family: Family, config: models.ModelConfig) -> dict[str, Expected]:
    """`{their name: ...}` of every tensor that a model of this config has. ValueError lists what no rule fills."""
    leaves = _leaves(config)
    if unfilled := leaves.keys() - {path for rule in family.rules for path in rule.parts}:
        raise ValueError(f"no rule fills {', '.join(sorted(unfilled))}; add one to the family's in hf.families")
    expected = {}
    for rule in family.rules:
        if not all(path in leaves for path in rule.parts):
            continue  # a bias, norm or head that this model does without
        *first, last = leaves[rule.parts[0]].shape
        shape = (*first, last + sum(leaves[path].shape[-1] for path in rule.parts[1:]))
        if rule.stacked:
            shape = shape[1:]
        shape = shape[::-1] if rule.transpose else shape
        for i in range(rule.first, config.num_layers) if rule.stacked else (None,):
            expected[rule.hf if i is None else rule.hf.format(i=i)] = Expected(rule, i, shape)
    return expected


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Where (a layer of) a leaf of ours stands: in which tensor, and from where on along our last axis."""

    name: str | None  # None: such a layer has none
    rule: Rule
    first: int


def _pieces(family: Family, config: models.ModelConfig) -> dict[str, list[_Piece]]:
    """The pieces of every leaf by its path, as many as it has layers."""
    leaves = _leaves(config)
    pieces: dict[str, list[_Piece]] = {path: [] for path in leaves}
    for name, tensor in expected_tensors(family, config).items():
        first = 0
        for path in tensor.rule.parts:
            if tensor.layer is not None and not pieces[path]:
                pieces[path] += [_Piece(None, tensor.rule, 0)] * tensor.rule.first
            pieces[path].append(_Piece(name, tensor.rule, first))
            first += leaves[path].shape[-1]
    return pieces


def _in_dtype(of_leaf: Callable[[Any], np.ndarray], dtype: Any, index: Any) -> np.ndarray:
    return of_leaf(index).astype(dtype, copy=False)


def _in_fewer_bits(of_leaf: Callable[[Any], np.ndarray], shape: tuple[int, ...], kind: str) -> dict[str, np.ndarray]:
    """The leaves of a stacked kernel that is quantised: no more than one layer of it is in memory whole."""
    layers = [
        quantised.quantised(of_leaf((slice(n, n + 1), slice(None), slice(None)))[0], kind) for n in range(shape[0])
    ]
    return {name: np.stack([layer[name] for layer in layers]) for name in quantised.LEAVES}


def _part(
    pieces: Sequence[_Piece],
    index: tuple[slice, ...],
    leaf: jax.ShapeDtypeStruct,
    read: Callable[[str, Any], np.ndarray],
) -> np.ndarray:
    """`leaf[index]` from the files, reading no more than that."""
    ranges = [range(size)[part] for part, size in zip(index, leaf.shape, strict=True)]
    out = np.empty([len(r) for r in ranges], leaf.dtype)
    stacked = pieces[0].rule.stacked
    for n, layer in enumerate(ranges[0] if stacked else [0]):
        piece = pieces[layer]
        if piece.name is None:
            out[n] = 1.0
            continue
        where = [slice(r.start, r.stop) for r in (ranges[1:] if stacked else ranges)]
        where[-1] = slice(where[-1].start + piece.first, where[-1].stop + piece.first)
        value = read(piece.name, tuple(where[::-1] if piece.rule.transpose else where))
        out[n if stacked else ...] = value.T if piece.rule.transpose else value
    return out


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in a file, not read yet."""

    path: pathlib.Path
    name: str
    kind: str  # "F32" and the like
    shape: tuple[int, ...]


def _tensors(folder: pathlib.Path, family: Family) -> dict[str, _Tensor]:
    """Every tensor of the folder by the name that the family's rules know it under; reads the files' headers."""
    tensors: dict[str, _Tensor] = {}
    for path in files(folder):
        untrusted.refuse_pointer(path, str(path))
        try:
            with opened(path) as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    known = canonical(name, family)
                    if known in tensors:
                        raise UserError(f"{known[:MOST_CHARS]} stands in {folder} twice, again in {path.name}")
                    tensors[known] = _Tensor(path, name, part.get_dtype(), tuple(part.get_shape()))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a complete safetensors file ({str(error)[:120]}); fetch it again") from None
    return tensors


def _finite(
    tensors: Mapping[str, _Tensor], read: Callable[[_Tensor, Any], np.ndarray], name: str, where: Any
) -> np.ndarray:
    """A part of a tensor, float32; UserError where it holds NaN or infinity."""
    tensor = tensors[name]
    value = np.asarray(read(tensor, where), np.float32)
    # Both are NaN where any value is; nothing of the size of the part is made.
    if value.size and not (np.isfinite(value.min()) and np.isfinite(value.max())):
        raise UserError(f"{tensor.name} in {tensor.path} holds NaN or infinity; fetch it again or save it in float32")
    return value


@contextlib.contextmanager
def _reading() -> Iterator[Callable[[_Tensor, Any], np.ndarray]]:
    """A reader of parts of tensors; on exit the memory of the mapped files is released."""
    with contextlib.ExitStack() as stack:
        files: dict[pathlib.Path, Any] = {}

        def read(tensor: _Tensor, where: Any) -> np.ndarray:
            if tensor.path not in files:
                files[tensor.path] = stack.enter_context(opened(tensor.path))
            file = files[tensor.path]
            return file.get_tensor(tensor.name) if where is ... else file.get_slice(tensor.name)[where]

        yield read


def opened(path: pathlib.Path) -> Any:
    return torch_file.opened(path) if path.suffix == ".bin" else safetensors.safe_open(path, "np")


def canonical(name: str, family: Family) -> str:
    """The name as `transformers` writes it today: with or without its model's prefix, gamma and beta by their names."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    if not family.prefixed:
        return name.removeprefix(family.prefix)
    return name if name.startswith((family.prefix, *HEADS)) else family.prefix + name


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold a folder's weights, as safetensors if it can be; UserError for none, for some missing."""
    single = [name for name in (SINGLE, REST, INDEX, TORCH, TORCH_INDEX) if (folder / name).is_file()][:1]
    if single and single[0] not in (INDEX, TORCH_INDEX):
        return [folder / single[0]]
    if not single:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHERS)
        found = f"only {', '.join(others[:3])}" if others else "no weights"
        raise UserError(
            f"{folder} holds {found}; needed is {SINGLE} or {INDEX} (`save_pretrained` of transformers writes it)"
        )
    index, suffix = folder / single[0], "safetensors" if single[0] == INDEX else "bin"
    try:
        content = untrusted.read_json(index, str(index))
        names = sorted(set(content["weight_map"].values()))
        outside = [name for name in names if name != pathlib.PurePath(name).name]
        others = [name for name in names if not re.fullmatch(rf"[^/\0]{{1,200}}\.{suffix}", name)]
        if others and not outside:
            raise ValueError
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not an index of {suffix} files; fetch it again") from None
    if outside:
        raise UserError(f"{index} points outside of its folder, to {outside[0][:MOST_CHARS]}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, named in {INDEX}; fetch it again")
    return [folder / name for name in names]


def _check(
    folder: pathlib.Path, tensors: Mapping[str, _Tensor], expected: Mapping[str, Expected], family: Family
) -> None:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for full, tensor in tensors.items():
        name = full if len(full) <= MOST_CHARS else f"{full[:MOST_CHARS]}..."
        if name not in expected:
            if not re.fullmatch(f"{family.carried}|{family.dropped}|{BUFFERS}", name):
                problems.append(f"{name} is unknown")
        elif tensor.shape != expected[name].shape:
            problems.append(f"{name} is {tensor.shape}, not {expected[name].shape}")
        elif tensor.kind not in DTYPES:
            problems.append(f"{name} is {tensor.kind}, not one of {', '.join(DTYPES)}")
    if problems:
        shown = "; ".join(problems[:MOST_SHOWN])
        more = f"; and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise UserError(f"the weights in {folder} do not fit its config.json: {shown}{more}")


@jax.jit
def _at_index(leaf: Any, layer: Any) -> Any:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _layer(leaf: Any, layer: int) -> Any:
    return leaf[layer] if isinstance(leaf, np.ndarray) else _at_index(leaf, layer)


def _write(
    folder: pathlib.Path, tensor: Callable[[str], np.ndarray], sizes: Mapping[str, int], shard_bytes: int
) -> None:
    """All tensors in files of at most `shard_bytes`, made when their file is written."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    files = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # "format" is what `transformers` asks of every file.
        safetensors.numpy.save_file({name: tensor(name) for name in names}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        write_json(folder / INDEX, index)


def _leaves(config: models.ModelConfig, *, as_held: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """All but adapters and what stands behind the pooling, which have files of their own; as in files, or as held."""
    held = models.with_base(models.plain(config), config.computing.base_dtype)
    config = held if as_held else models.plain(config)
    leaves, _ = jax.tree_util.tree_flatten_with_path(models.abstract(config)[1])
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree
