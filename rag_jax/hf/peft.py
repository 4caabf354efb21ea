"""Folders of adapters, as PEFT reads and writes them: their config, and their tensors as our leaves, both ways.

GPT-2 has query, key and value in one layer, ours are three. Three adapters of rank R are one of rank 3 R there, whose B
holds a block for each and zeros beside them; one of rank R there is three here that begin with the same A.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import regex
import safetensors
import safetensors.numpy

from rag_jax import files, models, untrusted
from rag_jax.errors import UserError
from rag_jax.hf import weights
from rag_jax.hf.families import FAMILIES, Family, Rule
from rag_jax.models import adapters

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# What changes the maths and is not computed here: key -> values that ask for nothing.
NOTHING = (None, False, "none", "", [], {})
ASKS = (
    "use_dora", "lora_bias", "layers_to_transform", "layer_replication", "trainable_token_indices", "exclude_modules",
    "target_parameters", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora", "megatron_config",
)  # fmt: skip
# Ways to begin that leave the base as it is; others (pissa, olora, loftq and so on) change it.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")
# Seconds for a pattern of a file, which may be made to take for ever.
PATIENCE = 1.0
MOST_RANK = 100_000


@dataclasses.dataclass(frozen=True)
class _Module:
    """A linear layer of theirs in every layer of a model, such as model.layers.{i}.self_attn.q_proj, and ours."""

    rule: Rule
    paths: tuple[str, ...]  # of our layers, side by side

    def name(self, layer: int) -> str:
        return self.rule.hf.removesuffix(".weight").format(i=layer)

    @property
    def suffix(self) -> str:
        return self.rule.hf.removesuffix(".weight").split("{i}.")[-1]


def is_adapter(folder: pathlib.Path) -> bool:
    return (folder / CONFIG).is_file()


def base_of(folder: pathlib.Path, where: str) -> str:
    """The hub name or folder of the model that an adapter is for; one beside it may be named relative to it."""
    base = _read(folder, where).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{where}: its {CONFIG} names no base_model_name_or_path; give the base's folder as the path, and this "
            "folder as lora.path beside it"
        )
    beside = folder / base
    return str(beside) if not pathlib.Path(base).is_dir() and beside.is_dir() else base


def read_config(folder: pathlib.Path, where: str, model_type: str, config: models.ModelConfig) -> models.Lora:
    """The adapters that a folder holds for this model; one UserError with all that is not computed here."""
    theirs = _read(folder, where)
    problems = [f"{key}={untrusted.short(theirs[key])}" for key in ASKS if theirs.get(key) not in NOTHING]
    if theirs.get("peft_type") != "LORA":
        problems.append(f"peft_type={untrusted.short(theirs.get('peft_type'))} (supported: LORA)")
    if theirs.get("bias", "none") != "none":
        problems.append(f"bias={untrusted.short(theirs['bias'])} (supported: none)")
    if theirs.get("init_lora_weights") not in PLAIN_STARTS:
        start = untrusted.short(theirs["init_lora_weights"])
        problems.append(f"init_lora_weights={start} (it changes the base; convert the adapter to plain LoRA)")
    rank: Any = theirs.get("r")
    alpha: Any = theirs.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < MOST_RANK:
        problems.append(f"r={untrusted.short(rank)} (must be a whole number above 0)")
    if not _is_number(alpha) or alpha <= 0:
        problems.append(f"lora_alpha={untrusted.short(alpha)} (must be a number above 0)")
    rate = theirs.get("lora_dropout", 0.0)
    if not _is_number(rate) or not 0 <= rate < 1:
        problems.append(f"lora_dropout={untrusted.short(rate)} (must be a number from 0 to below 1)")
    found = [] if problems else _targets(theirs, FAMILIES[model_type], config, problems)
    stabilised = bool(theirs.get("use_rslora"))
    for module in found:
        problems += _pattern_problems(theirs, module, rank, float(alpha), stabilised)
    if problems:
        raise UserError(f"{where}: its {CONFIG} asks for what is not computed here: {'; '.join(problems)}")
    targets = tuple(f"^{path}$" for module in found for path in module.paths)
    lora = models.Lora(rank, float(alpha), targets, stabilised, float(rate))
    if problem := adapters.problem(lora, models.linear_layers(config)):
        raise UserError(f"{where}: {problem}; it is an adapter for another base than this one")
    return lora


def fused_problem(model_type: str, config: models.ModelConfig, lora: models.Lora) -> str | None:
    """Which layers, one in Hugging Face's models, are not adapted together."""
    for module in _modules(FAMILIES[model_type], config):
        adapted = [path for path in module.paths if adapters.is_target(path, lora)]
        if 0 < len(adapted) < len(module.paths):
            return (
                f"targets={lora.targets}: {', '.join(module.paths)} are one layer of such a model ({module.suffix}), "
                "adapted together or not at all; name all of them"
            )
    return None


def load(folder: pathlib.Path, where: str, model_type: str, config: models.ModelConfig) -> dict[str, np.ndarray]:
    """`{path: float32 array}` of every adapter's leaf and, whole, of every other leaf that the folder holds.

    UserError, one line with all problems: tensors that are missing, unknown or of another shape, NaN or infinity.
    """
    family, lora = FAMILIES[model_type], config.computing.lora
    assert lora is not None
    tensors, problems, leaves = _tensors(folder, where, family), [], {}
    for module in _modules(family, config):
        if not adapters.is_target(module.paths[0], lora):
            continue
        layers = []
        for layer in range(config.num_layers):
            a, b = (tensors.pop(f"{module.name(layer)}.lora_{part}.weight", None) for part in "AB")
            if a is None or b is None:
                problems.append(f"{module.name(layer)}.lora_A or lora_B is missing")
                continue
            problem, parts = _parts(module, a.T, b.T, lora, config)
            problems += [f"{module.name(layer)}: {problem}"] if problem else []
            layers.append(parts)
        if not problems:
            for i, path in enumerate(module.paths):
                leaves[f"{path}/{adapters.A}"], leaves[f"{path}/{adapters.B}"] = (
                    np.stack([np.ascontiguousarray(parts[i][n]) for parts in layers]) for n in (0, 1)
                )
    if not problems:
        leaves |= _others(tensors, family, config, problems)
    if problems:
        shown = "; ".join(problems[: weights.MOST_SHOWN])
        more = f"; and {len(problems) - weights.MOST_SHOWN} more" if len(problems) > weights.MOST_SHOWN else ""
        raise UserError(f"{where}: its tensors do not fit its base and its {CONFIG}: {shown}{more}")
    return leaves


def save(
    params: Any,
    folder: pathlib.Path,
    model_type: str,
    config: models.ModelConfig,
    base: str,
    *,
    is_retriever: bool,
    trained: tuple[str, ...] = (),
) -> None:
    """A model's adapters as a folder of PEFT's, with the leaves of the base that were `trained` beside them."""
    family, lora = FAMILIES[model_type], config.computing.lora
    assert lora is not None
    modules = [each for each in _modules(family, config) if adapters.is_target(each.paths[0], lora)]
    tensors = {}
    for module in modules:
        a, b = ([np.asarray(weights.at(params, f"{path}/{leaf}")) for path in module.paths] for leaf in adapters.LEAVES)
        for layer in range(config.num_layers):
            theirs = _joined([part[layer] for part in a], [part[layer] for part in b])
            for name, value in zip("AB", theirs, strict=True):
                full = f"{_outer(module.name(layer), family, is_retriever)}.lora_{name}.weight"
                tensors[full] = np.ascontiguousarray(value.T, np.float32)
    others, kept = _trained_tensors(params, family, config, trained)
    tensors |= {_outer(name, family, is_retriever): value for name, value in others.items()}
    safetensors.numpy.save_file(tensors, folder / TENSORS, {"format": "pt"})
    fused = [module for module in modules if len(module.paths) > 1]
    growth = {module.suffix: len(module.paths) for module in fused}
    files.write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "FEATURE_EXTRACTION" if is_retriever else "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "use_rslora": lora.rank_stabilised,
            "lora_dropout": lora.dropout,
            "target_modules": _target_names(modules, family, config),
            "rank_pattern": {name: lora.rank * times for name, times in growth.items()},
            # So that the scale of an adapter that is several of ours stays what it was.
            "alpha_pattern": {
                name: lora.alpha * (math.sqrt(times) if lora.rank_stabilised else times)
                for name, times in growth.items()
            },
            "modules_to_save": sorted(kept) or None,
            "fan_in_fan_out": bool(modules) and not modules[0].rule.transpose,
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": True,
        },
    )


def _read(folder: pathlib.Path, where: str) -> dict[str, Any]:
    content = untrusted.read_json(folder / CONFIG, f"{where}: its {CONFIG}")
    if not isinstance(content, dict):
        raise UserError(f"{where}: its {CONFIG} cannot be read (not an object); fetch it again")
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _modules(family: Family, config: models.ModelConfig) -> Iterator[_Module]:
    layers = models.linear_layers(config)
    for rule in family.rules:
        paths = tuple(part.removesuffix("/kernel") for part in rule.parts)
        if rule.stacked and all(path in layers for path in paths):
            yield _Module(rule, paths)


def _targets(
    theirs: Mapping[str, Any], family: Family, config: models.ModelConfig, problems: list[str]
) -> list[_Module]:
    """The layers that `target_modules` names, as PEFT reads it: ends of names, or one pattern for whole names."""
    asked, modules = theirs.get("target_modules"), list(_modules(family, config))
    if isinstance(asked, str) and asked != "all-linear":
        found = [each for each in modules if _matches(asked, each.name(0), family.prefix)]
        if not found:
            problems.append(f"target_modules={untrusted.short(asked)} (it matches no layer of this base)")
        return found
    if asked == "all-linear":
        return modules
    if not isinstance(asked, list) or not all(isinstance(name, str) for name in asked):
        problems.append(f"target_modules={untrusted.short(asked)} (must be names or a pattern)")
        return []
    layers = range(config.num_layers)
    for name in asked:
        if not any(_ends(each.name(layer), name) for each in modules for layer in layers):
            problems.append(f"target_modules: {untrusted.short(name)} is no linear layer of this base")
    found = []
    for each in modules:
        adapted = [any(_ends(each.name(layer), name) for name in asked) for layer in layers]
        if any(adapted) and not all(adapted):
            problems.append(f"target_modules: {each.suffix} is adapted in some layers and not in others")
        found += [each] if all(adapted) else []
    return found


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _matches(pattern: str, name: str, prefix: str = "") -> bool:
    """Whether a pattern fits a layer's whole name, with its family's prefix or without it."""
    try:
        compiled = regex.compile(pattern[:1000])
        names = (name, name.removeprefix(prefix), prefix + name)
        return any(compiled.fullmatch(each, timeout=PATIENCE) for each in names)
    except (regex.error, TimeoutError):
        return False


def _pattern_problems(
    theirs: Mapping[str, Any], module: _Module, rank: int, alpha: float, stabilised: bool
) -> list[str]:
    """Where rank or alpha of a layer are others than those of all, beyond what several of ours in one are."""

    def own(key: str, default: Any) -> Any:
        patterns = theirs.get(key) or {}
        for name, value in patterns.items() if isinstance(patterns, dict) else ():
            if _matches(rf"(.*\.)?{name}", module.name(0)):
                return value
        return default

    rank_here, alpha_here, times = own("rank_pattern", rank), own("alpha_pattern", alpha), len(module.paths)
    if not _is_number(rank_here) or not _is_number(alpha_here):
        return ["rank_pattern, alpha_pattern: must hold numbers"]
    if (rank_here, alpha_here) == (rank, alpha):
        return []
    grown = alpha * (math.sqrt(times) if stabilised else times)
    if rank_here == times * rank and math.isclose(alpha_here, grown, rel_tol=1e-9):
        return []
    return [f"rank_pattern, alpha_pattern: {module.suffix} has {rank_here}, {alpha_here:g}, others {rank}, {alpha:g}"]


def _tensors(folder: pathlib.Path, where: str, family: Family) -> dict[str, np.ndarray]:
    """Every tensor of an adapter by the name that it has in its base, float32."""
    path = folder / TENSORS
    if not path.is_file():
        raise UserError(f"{where}: holds no {TENSORS}; save the adapter again with save_pretrained of peft")
    untrusted.refuse_pointer(path, str(path))
    found = {}
    try:
        with safetensors.safe_open(path, "np") as file:
            for name in file.keys():
                value = np.asarray(file.get_tensor(name), np.float32)
                if not np.isfinite(value).all():
                    raise UserError(f"{name[: weights.MOST_CHARS]} in {path} holds NaN or infinity; fetch it again")
                inner = name.removeprefix("base_model.model.").replace(".default.weight", ".weight")
                found[weights.canonical(inner, family)] = value
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({str(error)[:120]}); fetch it again") from None
    return found


def _parts(
    module: _Module, a: np.ndarray, b: np.ndarray, lora: models.Lora, config: models.ModelConfig
) -> tuple[str | None, list[tuple[np.ndarray, np.ndarray]]]:
    """What is wrong, or (A, B) of each of our layers from those of the one that holds them, (in, r) and (r, out)."""
    widths = [models.linear_layers(config)[path] for path in module.paths]
    in_width, out_widths, times = widths[0][0], [width for _, width in widths], len(widths)
    rank = a.shape[-1] if a.ndim == 2 else 0
    if a.shape != (in_width, rank) or b.shape != (rank, sum(out_widths)) or rank not in (lora.rank, times * lora.rank):
        return f"A {a.shape[::-1]} and B {b.shape[::-1]} do not fit rank {lora.rank} of its base", []
    columns = np.split(b, np.cumsum(out_widths)[:-1], axis=1)
    if rank == lora.rank:
        return None, [(a, column) for column in columns]
    rows = [np.split(column, times, axis=0) for column in columns]
    if any(rows[i][j].any() for i in range(times) for j in range(times) if i != j):
        return "is of a higher rank than the others (rank_pattern)", []
    return None, [(part, rows[i][i]) for i, part in enumerate(np.split(a, times, axis=1))]


def _joined(a: list[np.ndarray], b: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `_parts`: A side by side, and B as blocks on a diagonal."""
    rank, out_widths = a[0].shape[-1], [part.shape[-1] for part in b]
    joined = np.zeros((rank * len(b), sum(out_widths)), np.float32)
    for i, part in enumerate(b):
        start = sum(out_widths[:i])
        joined[i * rank : (i + 1) * rank, start : start + out_widths[i]] = part
    return np.concatenate(a, axis=-1), joined


def _others(
    tensors: dict[str, np.ndarray], family: Family, config: models.ModelConfig, problems: list[str]
) -> dict[str, np.ndarray]:
    """Leaves of the base that were trained beside the adapters (PEFT's modules_to_save), whole."""
    expected, leaves = weights.expected_tensors(family, config), {}
    unused = f"{family.carried}|{family.dropped}"  # a pooler that PEFT adapts too, though embeddings never see it
    unknown = [name for name in tensors if name not in expected and not re.fullmatch(unused, _of_base(name))]
    problems += [f"{name[: weights.MOST_CHARS]} is unknown" for name in unknown]
    rules = {expected[name].rule for name in tensors if name in expected}
    for rule in rules:
        names = [name for name, each in expected.items() if each.rule == rule]
        if any(name not in tensors for name in names):
            problems.append(f"{rule.hf} is missing in some layers")
            continue
        if wrong := [name for name in names if tensors[name].shape != expected[name].shape]:
            problems.append(f"{wrong[0]} is {tensors[wrong[0]].shape}, not {expected[wrong[0]].shape}")
            continue
        values = [tensors[name].T if rule.transpose else tensors[name] for name in names]
        value = np.stack([np.ones_like(values[0])] * rule.first + values) if rule.stacked else values[0]
        widths = [models.abstract_leaf(config, path).shape[-1] for path in rule.parts]
        leaves |= dict(zip(rule.parts, np.split(value, np.cumsum(widths)[:-1], axis=-1), strict=True))
    return leaves


def _of_base(name: str) -> str:
    return re.sub(r"\.lora_[AB]\.weight$", ".weight", name)


def _trained_tensors(
    params: Any, family: Family, config: models.ModelConfig, trained: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], set[str]]:
    """Their tensors of which a leaf of ours was trained, and of all that PEFT keeps by the same names.

    It keeps modules whole, and by how their names end: `norm` stands for `input_layernorm` too.
    """
    expected = weights.expected_tensors(family, config)
    names = {name.split(".")[-2] for name, each in expected.items() if set(each.rule.parts) & set(trained)}
    tensors = {}
    for name, each in expected.items():
        if name.rsplit(".", 1)[0].endswith(tuple(names)):
            arrays = [np.asarray(weights.at(params, path)) for path in each.rule.parts]
            value = np.concatenate([a if each.layer is None else a[each.layer] for a in arrays], axis=-1)
            tensors[name] = np.ascontiguousarray(value.T if each.rule.transpose else value, np.float32)
    return tensors, names


def _outer(name: str, family: Family, is_retriever: bool) -> str:
    """A layer's name as PEFT stores it: around the model with a head, or around the model alone of a retriever."""
    inner = name.removeprefix(family.prefix) if is_retriever else name
    return f"base_model.model.{inner}"


def _target_names(modules: list[_Module], family: Family, config: models.ModelConfig) -> list[str] | str:
    """Ends of names where they name these layers alone, else a pattern of whole names."""
    names = [module.suffix for module in modules]
    named = [each for each in _modules(family, config) if any(_ends(each.name(0), name) for name in names)]
    if named == modules:
        return names
    wholes = (regex.escape(module.rule.hf.removesuffix(".weight")).replace(r"\{i\}", r"\d+") for module in modules)
    return rf"(.*\.)?({'|'.join(whole.removeprefix(regex.escape(family.prefix)) for whole in wholes)})"
