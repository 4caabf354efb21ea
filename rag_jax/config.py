"""The run's configuration: the table of all keys, loading, overriding, checking, JSON."""

import ast
import dataclasses
import difflib
import inspect
import json
import math
import pathlib
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, get_args

from ml_collections import ConfigDict

from rag_jax import untrusted
from rag_jax.errors import UserError
from rag_jax.evaluation import metrics
from rag_jax.objectives import OBJECTIVES
from rag_jax.workdir import untrained

MOST = 2**31
ATTENTION = ("plain", "cudnn", "pallas")
REMAT = ("none", "dots", "full")
REMAT_MEANING = "what layers recompute in the backward pass: nothing, all but products with weights, everything"
# The names of `data.formats`, which would bring numpy and tokenizers along.
LAYOUTS = (
    "beir", "chat", "contexts", "dpr", "flagembedding", "ms-marco", "passages", "prepared documents",
    "query and passage",
    "question and answer", "question and passage", "sentence-transformers", "squad", "tevatron", "text",
    "title and text",
)  # fmt: skip
TRACKERS = ("wandb", "mlflow", "trackio")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

Rules = tuple[tuple[str, float], ...]
Texts = tuple[str, ...]
Widths = tuple[int, ...]
# A ConfigDict of the keys below. Its sections and values are attributes, whose types no checker can know.
Config = Any
# A check says what a value must be, or None when it is right.
Check = Callable[[Any], str | None]


REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """One row of the table: the type, what else must hold, and one line of meaning."""

    kind: Any
    check: Check
    meaning: str
    # Of a key that came after others: what files and runs mean that were written before. REQUIRED: they name it.
    before: Any = REQUIRED


def at_least(low: int) -> Check:
    """And below 2**31: devices count in 32 bits."""
    return lambda v: f"must be at least {low}" if v < low else f"must be below {MOST}" if v >= MOST else None


def zero_or_above_one(v: float) -> str | None:
    return None if v == 0 or v > 1 else "must be greater than 1, or 0"


def positive(v: float) -> str | None:
    return None if 0 < v < MOST else f"must be greater than 0 and below {MOST}"


def seed(v: int) -> str | None:
    return None if 0 <= v < 2**32 else "must be at least 0 and less than 2**32"


def fraction(v: float) -> str | None:
    return None if 0 <= v < 1 else "must be at least 0 and less than 1"


def anything(v: Any) -> str | None:
    return None


def not_empty(v: str) -> str | None:
    return None if v else "must not be empty"


def axis(v: int) -> str | None:
    return None if v == -1 or 1 <= v < MOST else "must be -1 (the devices that the other axes leave) or at least 1"


def one_of(*choices: str) -> Check:
    return lambda v: None if v in choices else f"must be one of {', '.join(choices)}{_nearest(v[:160], choices)}"


def holds(field: str) -> Check:
    return lambda v: None if v.count(field) == 1 else f"must contain {field} once"


def rules(v: Rules) -> str | None:
    for pattern, multiplier in v:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            return f"{untrusted.short(pattern)} is not a regular expression ({error})"
        if not (math.isfinite(multiplier) and multiplier >= 0):
            return f"the multiplier of {untrusted.short(pattern)} must be at least 0"
    return None


def patterns(v: Texts) -> str | None:
    return rules(tuple((pattern, 1.0) for pattern in v)) if v else "must name a layer at least"


def among(known: Sequence[str]) -> Check:
    return lambda v: None if set(v) <= set(known) else f"must be among {', '.join(known)}"


def widths(v: Widths) -> str | None:
    return None if all(width > 0 for width in v) and len(set(v)) == len(v) else "must be different numbers above 0"


def base_keys(role: str) -> dict[str, Key]:
    return {
        f"{role}.base_dtype": Key(
            str,
            one_of("float32", "bfloat16", "int8", "int4", "uint4"),
            "of a frozen model's weights (adapters are none): int8, int4 and uint4 of its layers, then bfloat16 of the "
            "rest",
        ),
        f"{role}.lora.rank": Key(int, at_least(0), "R, of adapters that are trained in place of the model; 0: none"),
        f"{role}.lora.alpha": Key(float, positive, "what adapters add is multiplied by alpha / R"),
        f"{role}.lora.scaling": Key(
            str, one_of("standard", "rank_stabilised"), "standard: by alpha / R; rank_stabilised: by alpha / sqrt(R)"
        ),
        f"{role}.lora.dropout": Key(float, fraction, "of what adapters read"),
        f"{role}.lora.targets": Key(
            Texts, patterns, "regexes of paths: layers that have an adapter, such as layers/attention/query"
        ),
        f"{role}.lora.path": Key(
            str | None, not_empty, "folder of an adapter (PEFT) to go on from; None: a new one, or that of the path"
        ),
    }


KEYS: dict[str, Key] = {
    "seed": Key(int, seed, "random keys and the order of rows"),
    "total_steps": Key(int, at_least(1), "optimizer steps of the run"),
    "batch_size": Key(int, at_least(1), "global queries a step"),
    "group_size": Key(int, at_least(1), "rows whose passages can be each other's candidates; divides batch_size"),
    "dtype": Key(str, one_of("float32", "bfloat16"), "compute type; parameters are float32"),
    "matmul_precision": Key(
        str,
        one_of("default", "high", "highest"),
        "of a float32 run's products: highest is float32; default is the device's own, on an H100 TF32 (about 8 times "
        "as fast), on TPUs one bfloat16 pass (high: three, highest: six)",
    ),
    "attention": Key(
        str,
        one_of("auto", *ATTENTION),
        "what computes it in training: plain runs anywhere; cudnn, on GPUs, and pallas, on TPUs, never write scores to "
        "memory, but take bfloat16 alone and no dropout; auto: that of the device where it can, else plain",
    ),
    "kernels": Key(
        str,
        one_of("deterministic", "fastest"),
        "on GPUs: deterministic ones add in the same order every time, so that a resumed run has the same bits; "
        "fastest: as it comes",
    ),
    "dropout": Key(float | None, fraction, "None: what each model's config says; a number: that, for both"),
    "data.train": Key(str | None, not_empty, "rows to train on: a file, a save_to_disk folder or a hub name"),
    "data.eval": Key(str | None, not_empty, "rows to evaluate on; None: no evaluation"),
    "data.passages": Key(
        str | None,
        not_empty,
        "the corpus, a file of passages: searched in evaluation, and in training where rows name no passage",
    ),
    "data.columns.query": Key(str, not_empty, "column of the query"),
    "data.columns.passage": Key(
        str | None,
        not_empty,
        "column of the passage that answers the query, a text or a list of texts a row, empty where it is not known; "
        "None: it is known of no row",
    ),
    "data.columns.answer": Key(str | None, not_empty, "column of the answer; None: no answer is known"),
    "data.columns.negative": Key(
        str | None, not_empty, "column of given hard negatives, a text or a list of texts a row; None: none are given"
    ),
    "data.columns.document": Key(
        str | None,
        not_empty,
        "column of the document that the answer stands in and, in data.passages, that a passage is of; None: not known",
    ),
    "data.columns.passage_score": Key(
        str | None, not_empty, "column of the passages' scores, of distill: a number or a list of numbers a row"
    ),
    "data.columns.negative_score": Key(
        str | None, not_empty, "column of the given negatives' scores, of distill: a number or a list of numbers a row"
    ),
    **{
        f"data.eval_columns.{part}": Key(str | None, not_empty, f"that of data.eval's {part}; None: as in data.columns")
        for part in ("query", "passage", "answer", "document")
    },
    **{
        f"data.passages_columns.{part}": Key(
            str | None, not_empty, f"that of data.passages' {part}; None: as in data.columns"
        )
        for part in ("passage", "document")
    },
    "data.format": Key(
        str,
        one_of("auto", "columns", *LAYOUTS),
        "what data.train is: auto: by data.columns if these are there, else what their columns are recognised as; "
        "columns: by data.columns alone; or a layout by its name",
    ),
    "data.query_len": Key(int, at_least(3), "retriever tokens of a query"),
    "data.passage_len": Key(int, at_least(3), "retriever tokens of a passage"),
    "data.prompt_passage_len": Key(int, at_least(2), "generator tokens of the passage segment"),
    "data.prompt_query_len": Key(int, at_least(1), "generator tokens of the query segment"),
    "data.answer_len": Key(int, at_least(2), "generator tokens of the answer segment, end-of-sequence included"),
    "data.bad_rows": Key(str, one_of("drop", "refuse"), "rows with an empty field or an answer that does not fit"),
    "prompt.passage": Key(str, holds("{passage}"), "template of the passage segment"),
    "prompt.query": Key(str, holds("{query}"), "template of the query segment"),
    "prompt.answer": Key(str, holds("{answer}"), "template of the answer segment"),
    "retriever.path": Key(str | None, not_empty, "Hugging Face folder, hub name, or random:bert|gpt2|llama|qwen3"),
    "retriever.pooling": Key(
        str,
        one_of("auto", "cls", "mean", "last", "max", "mean_sqrt_len", "weighted_mean"),
        "auto: what the model's folder says",
    ),
    "retriever.similarity": Key(
        str, one_of("auto", "cosine", "dot"), "of two embeddings; auto: what the model's folder says, else cosine"
    ),
    "retriever.truncate_dim": Key(
        int | None, at_least(1), "leading channels that are the embedding; None: what the model's folder says, else all"
    ),
    "retriever.matryoshka_dims": Key(
        Widths,
        widths,
        "numbers of leading channels that are embeddings too: the contrastive loss is summed over them, retrieval is "
        "measured at each",
        before=(),
    ),
    "retriever.query_prefix": Key(str | None, anything, "put before queries; None: what the model's folder says"),
    "retriever.passage_prefix": Key(str | None, anything, "put before passages; None: what the model's folder says"),
    "retriever.remat": Key(str, one_of(*REMAT), REMAT_MEANING),
    "retriever.chunk_size": Key(int, at_least(0), "rows encoded at a time on a device, to bound memory; 0: all"),
    **base_keys("retriever"),
    "generator.path": Key(str | None, not_empty, "Hugging Face folder, hub name, or random:gpt2|llama|qwen3"),
    "generator.remat": Key(str, one_of(*REMAT), REMAT_MEANING),
    **base_keys("generator"),
    "objective.name": Key(
        str,
        one_of(*OBJECTIVES),
        "; ".join(f"{name}: {formula.meaning}" for name, formula in OBJECTIVES.items()),
    ),
    "objective.candidates": Key(
        int, at_least(1), "K, passages the generator reads for a query; at most all of its group's"
    ),
    "objective.candidates_from": Key(
        str,
        one_of("group", "row"),
        "group: a query's candidates are any passages of its group; row: only those that it brings itself",
    ),
    "objective.negatives": Key(
        int, at_least(0), "J, further passages that each query brings, from data.columns.negative or mined; 0: none"
    ),
    "objective.temperature": Key(float, positive, "divides the similarity in the contrastive loss"),
    "objective.marginal_temperature": Key(float, positive, "divides the similarity in the marginal"),
    "objective.contrastive_weight": Key(float, at_least(0), "of the contrastive loss in the total"),
    "objective.document_weight": Key(
        float,
        at_least(0),
        "of the loss that tells a query's document, where it alone is known, from the other passages of the batch",
    ),
    "objective.marginal_weight": Key(float, at_least(0), "of the marginal loss in the total"),
    "objective.evidence": Key(
        str,
        one_of("answer", "question", "both"),
        "the tokens whose likelihood behind a passage is its evidence, of pdist, replug and emdr2",
    ),
    "objective.evidence_temperature": Key(
        float, positive, "divides the evidence, a mean log-likelihood, of pdist and replug"
    ),
    "objective.evidence_weight": Key(float, at_least(0), "of the loss by evidence in the total"),
    "objective.kept_evidence": Key(
        str,
        one_of("auto", "never"),
        "auto: of a frozen generator, with marginal_weight 0 and candidates_from row, evidence is computed once and "
        "kept on disk; never: in every step",
    ),
    "objective.label_noise": Key(
        float | None,
        positive,
        "margin, nats a token, by which kept evidence corrects labels in the contrastive loss; None: they are right",
    ),
    "objective.label_share": Key(
        float, fraction, "share of the label in what pdist, replug and emdr2 draw p(k | q) to, in rows that have one"
    ),
    "optimizer.learning_rate": Key(float, positive, "highest learning rate"),
    "optimizer.schedule": Key(str, one_of(*SCHEDULES), "schedule of the learning rate"),
    "optimizer.warmup_steps": Key(int, at_least(0), "steps until the highest learning rate"),
    "optimizer.weight_decay": Key(float, at_least(0), "AdamW's, times the learning rate"),
    "optimizer.clip_norm": Key(float | None, positive, "highest norm of each model's gradients; None: no clipping"),
    "optimizer.rate_rules": Key(Rules, rules, "(regex of a parameter's path, multiplier of the rate); 0: frozen"),
    "optimizer.decay_rules": Key(Rules, rules, "(regex of a parameter's path, multiplier of weight_decay)"),
    "mining.every_steps": Key(
        int, at_least(0), "regroup rows with similar passages every N steps, from step 0 on; 0: never"
    ),
    "mining.margin": Key(
        float | None,
        anything,
        "keep passages out of a group that score above a query's own by more than this; None: keep all",
    ),
    "mining.negatives_from": Key(
        str,
        one_of("rows", "corpus"),
        "what negatives are mined from where all rows name their passages: these passages, or data.passages too",
    ),
    "mining.explore": Key(
        int, at_least(0), "of the candidates that are mined for a row without a passage, how many are drawn at random"
    ),
    "mesh.replica": Key(int, axis, "copies of everything; -1: the devices that are left"),
    "mesh.data": Key(int, axis, "shards of the batch and of the parameters; -1: the devices that are left"),
    "mesh.model": Key(int, axis, "tensor parallelism; -1: the devices that are left"),
    "checkpoint.every_steps": Key(int, at_least(0), "save every N steps, and after the last; 0: never"),
    "checkpoint.every_minutes": Key(float, at_least(0), "also save every N minutes; 0: never"),
    "checkpoint.keep": Key(int, at_least(1), "newest checkpoints kept, besides the best one by eval.metric"),
    "checkpoint.keep_every": Key(int, at_least(0), "keep the checkpoint of every N-th step for good; 0: none"),
    "guard.skip_nonfinite": Key(
        int, at_least(0), "updates that may be skipped because a loss or gradient is non-finite; 0: stop at the first"
    ),
    "guard.spike_factor": Key(
        float, zero_or_above_one, "report a loss this many times the median of recent ones; 0: never"
    ),
    "log.every_steps": Key(int, at_least(0), "write metrics every N steps; 0: never"),
    "log.trackers": Key(
        Texts,
        among(TRACKERS),
        "services that get them too: wandb, mlflow, trackio; by their own environment variables",
        before=(),
    ),
    "eval.every_steps": Key(int, at_least(0), "evaluate every N steps; 0: never"),
    "eval.rows": Key(int, at_least(0), "rows of data.eval that are evaluated, the same in every run; 0: all"),
    "eval.likelihoods": Key(
        int, at_least(0), "of these rows those of which the answers' likelihood is measured; 0: all", before=0
    ),
    "eval.answers": Key(int, at_least(0), "greedy answers generated for EM and F1; 0: none"),
    "eval.metric": Key(
        str,
        one_of("auto", *metrics.METRICS),
        "the metric that chooses the best step; auto: mrr@10, else answer_nll, else document_hit@10",
    ),
    "eval.patience": Key(int, at_least(0), "stop after this many evaluations without a better eval.metric; 0: never"),
    "eval.batch_size": Key(int, at_least(1), "global queries evaluated at a time"),
}


def load(file: str | pathlib.Path, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The checked, locked config of a file whose `get_config()` returns it, with `{dotted key: value or text}` on top.

    UserError, one line with all problems, for a file that cannot be used, an unknown key or an unusable value.
    """
    return build(_flatten(_read_file(pathlib.Path(file))), overrides)


def changes(file: str | pathlib.Path, config: ConfigDict) -> dict[str, list[Any]]:
    """The keys in which a config differs from its file's, `{key: [the file's value, its own]}`."""
    before, now = _flatten(_read_file(pathlib.Path(file))), _flatten(config)
    return {key: [before.get(key), value] for key, value in now.items() if before.get(key) != value}


def load_workdir(workdir: str | pathlib.Path, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config that a run saved in its workdir, with overrides on top."""
    file = pathlib.Path(workdir) / "config.json"
    if not file.is_file():
        raise UserError(f"--workdir={workdir}: no config.json there; give the folder of a run")
    models = [name for name in overrides or {} if name in ("retriever.path", "generator.path")]
    if models and not untrained.read(pathlib.Path(workdir)):
        raise UserError(f"--config.{models[0]}: the models are those of --workdir={workdir}; leave it out")
    return build(_flatten(_of_run(file)), overrides)


def build(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """A checked, locked config of `{dotted key: value}`; the values of overrides may be text as typed."""
    values, unreadable = dict(values), []
    for name, value in (overrides or {}).items():
        try:
            values[name] = parse(KEYS[name].kind, value) if isinstance(value, str) and name in KEYS else value
        except ValueError as error:
            unreadable.append(f"{name}={untrusted.short(value)[1:-1]}: {error}")
    values = {name: key.before for name, key in KEYS.items() if key.before is not REQUIRED} | values
    values = {str(name): _convert(value, name) for name, value in values.items()}
    if problems := unreadable + _problems(values):
        raise UserError("config: " + "; ".join(problems))
    return ConfigDict(_nest(values)).lock()


def check(config: ConfigDict) -> None:
    """UserError with all problems of a config at once."""
    if problems := _problems({name: _convert(value, name) for name, value in _flatten(config).items()}):
        raise UserError("config: " + "; ".join(problems))


def require(config: ConfigDict, name: str) -> Any:
    """The value of a key that may be None, or UserError if it is."""
    value = _flatten(config)[name]
    if value is None:
        raise UserError(f"{name}=None: give it a value, --config.{name}=...; {KEYS[name].meaning}")
    return value


def flat(config: ConfigDict) -> dict[str, Any]:
    """`{dotted key: value}` of all keys."""
    return _flatten(config)


def to_json(config: ConfigDict) -> str:
    """Nested JSON, in the order of `KEYS`."""
    text = json.dumps(_nest(_flatten(config)), indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # paths that are no UTF-8, as JSON escapes them


def from_json(text: str, overrides: Mapping[str, Any] | None = None, *, name: str = "config.json") -> ConfigDict:
    """The config whose `to_json` is `text`, checked, with overrides on top."""
    return build(_flatten(_from_text(text, name)), overrides)


def is_of_run(file: pathlib.Path) -> bool:
    """Whether a config.json is one that a run has saved, perhaps with other keys than those of today."""
    try:
        return {"data", "objective", "optimizer"} <= _of_run(file).keys()
    except UserError:
        return False


def _of_run(file: pathlib.Path) -> dict[str, Any]:
    try:
        return _from_text(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error}); was it edited by hand?") from None


def _from_text(text: str, name: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON ({error}); was it edited by hand?") from None
    if not isinstance(tree, dict):
        raise UserError(f"{name}: holds no config")
    return tree


def parse(kind: Any, text: str) -> Any:
    """The value of a kind from what a user types; ValueError says what is expected."""
    kind, optional = _optional(kind)
    if optional and text in ("None", "none", "null"):
        return None
    try:
        return _PARSERS[kind](text)
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"must be {_kind_name(kind | None if optional else kind)}") from None


def _optional(kind: Any) -> tuple[Any, bool]:
    """(float, True) for `float | None`, (float, False) for `float`."""
    return (get_args(kind)[0], True) if NoneType in get_args(kind) else (kind, False)


def _kind_name(kind: Any) -> str:
    kind, optional = _optional(kind)
    return _KIND_NAMES[kind] + (" or None" if optional else "")


_PARSERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    Rules: ast.literal_eval,
    Texts: ast.literal_eval,
    Widths: ast.literal_eval,
}
_KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    Rules: "pairs such as (('generator/', 0.5), ('.*', 1.0))",
    Texts: "texts such as ('attention/', 'mlp/')",
    Widths: "whole numbers such as (256, 128)",
}


def _read_file(path: pathlib.Path) -> ConfigDict:
    if not path.is_file():
        raise UserError(f"--config={path}: no such file; configs/ holds examples")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if not callable(get_config):
            raise UserError(f"--config={path}: defines no function get_config()")
        config = get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"--config={path}: line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"--config={path}: raises {type(error).__name__}: {untrusted.one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config() returns {type(config).__name__}, not a ConfigDict")
    return config


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"data.train": ...}` for nested dicts or ConfigDicts."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, ConfigDict | dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `_flatten`, in the order of `KEYS`."""
    tree: dict[str, Any] = {}
    for name in KEYS:
        *sections, last = name.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = values[name]
    return tree


def _convert(value: Any, name: str) -> Any:
    """Whole numbers as fractions where the key takes one, and JSON's lists as tuples."""
    kind = _optional(KEYS[name].kind)[0] if name in KEYS else None
    if kind is Rules and isinstance(value, list | tuple):
        pairs = [tuple(pair) if isinstance(pair, list) else pair for pair in value]
        return tuple((pair[0], float(pair[1])) if _is_rule(pair) else pair for pair in pairs)
    if kind in (Texts, Widths) and isinstance(value, list):
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _is_kind(kind: Any, value: Any) -> bool:
    kind, optional = _optional(kind)
    if kind is Rules:
        return isinstance(value, tuple) and all(_is_rule(pair) for pair in value)
    if kind is Texts:
        return isinstance(value, tuple) and all(isinstance(text, str) for text in value)
    if kind is Widths:
        return isinstance(value, tuple) and all(_is_kind(int, width) for width in value)
    if value is None:
        return optional
    if isinstance(value, bool):
        return False
    return isinstance(value, kind) and not (isinstance(value, float) and not math.isfinite(value))


def _is_rule(pair: Any) -> bool:
    if not (isinstance(pair, tuple) and len(pair) == 2):
        return False
    return isinstance(pair[0], str) and isinstance(pair[1], int | float) and not isinstance(pair[1], bool)


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Everything wrong with `{dotted key: value}`: each key alone, then what must hold between those that are right."""
    problems, right = [_unknown(name) for name in values if name not in KEYS], {}
    for name, key in KEYS.items():
        if name not in values:
            problems.append(f"{name} is missing: {key.meaning}")
        elif not _is_kind(key.kind, values[name]):
            problems.append(f"{name}={untrusted.short(values[name])}: must be {_kind_name(key.kind)}")
        elif problem := _text_problem(name, values[name]) or (values[name] is not None and key.check(values[name])):
            problems.append(f"{name}={untrusted.short(values[name])}: {problem}")
        else:
            right[name] = values[name]
    for names, holds, fix in _JOINT_CHECKS:
        if all(name in right for name in names) and not holds(*(right[name] for name in names)):
            problems.append(", ".join(f"{name}={untrusted.short(right[name])}" for name in names) + f": {fix}")
    return problems


def _text_problem(name: str, value: Any) -> str | None:
    """Paths may hold any bytes; other texts are read by tokenizers. None may hold a secret."""
    if not isinstance(value, str):
        return None
    if untrusted.holds_secret(value):
        return "holds a password or a token, which would be saved with the run; leave it out and set HF_TOKEN instead"
    if "\0" in value:
        return "holds a NUL character; remove it"
    if name not in PATHS and not untrusted.is_unicode(value):
        return "holds half a character (a lone surrogate); give it as UTF-8"
    return None


PATHS = (
    "data.train", "data.eval", "data.passages", "retriever.path", "generator.path", "retriever.lora.path",
    "generator.lora.path",
)  # fmt: skip
# (keys, whether their values go together, what is wrong otherwise and the fix), in the order in which they are told.
_JOINT_CHECKS: list[tuple[tuple[str, ...], Callable[..., bool], str]] = []
_BY_PARAMETER = {name.replace(".", "_"): name for name in KEYS}


def together(fix: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Registers a check of what must hold between several keys: those its parameters are named after."""

    def register(holds: Callable[..., bool]) -> Callable[..., bool]:
        keys = tuple(_BY_PARAMETER[parameter] for parameter in inspect.signature(holds).parameters)
        _JOINT_CHECKS.append((keys, holds, fix))
        return holds

    return register


@together("the group does not divide the batch; choose one that does")
def _groups_fill_the_batch(group_size: int, batch_size: int) -> bool:
    return batch_size % group_size == 0


@together("a query's candidates come from its group; lower the first or raise one of the others")
def _group_holds_the_candidates(objective_candidates: int, group_size: int, objective_negatives: int) -> bool:
    return objective_candidates <= group_size * (1 + objective_negatives)


@together("nothing to train; raise a weight")
def _something_is_trained(
    objective_name: str, objective_contrastive_weight: float, objective_marginal_weight: float,
    objective_evidence_weight: float, objective_document_weight: float,
) -> bool:  # fmt: skip
    uses_generator = OBJECTIVES[objective_name].uses_generator(objective_marginal_weight, objective_evidence_weight)
    return uses_generator or objective_contrastive_weight + objective_document_weight > 0


@together("a batch of one has no negatives to learn from; raise batch_size")
def _the_retriever_has_negatives(
    objective_negatives: int, batch_size: int, objective_name: str, objective_marginal_weight: float,
    objective_evidence_weight: float,
) -> bool:  # fmt: skip
    weights = objective_marginal_weight, objective_evidence_weight
    uses_generator = OBJECTIVES[objective_name].uses_generator(*weights)
    return batch_size > 1 or objective_negatives > 0 or uses_generator


@together("every query would be its own passage; name two columns")
def _query_is_not_the_passage(data_columns_query: str, data_columns_passage: str | None) -> bool:
    return data_columns_query != data_columns_passage


@together("every passage would be its own negative; name two columns")
def _negative_is_not_the_passage(data_columns_negative: str | None, data_columns_passage: str | None) -> bool:
    return data_columns_negative is None or data_columns_negative != data_columns_passage


@together("nothing says which passages a query brings; name the column of given ones, or mine them")
def _negatives_come_from_somewhere(
    objective_negatives: int, data_columns_negative: str | None, mining_every_steps: int
) -> bool:
    return objective_negatives == 0 or data_columns_negative is not None or mining_every_steps > 0


@together("no query brings a negative; raise the first, or leave the column out (None)")
def _given_negatives_are_used(objective_negatives: int, data_columns_negative: str | None) -> bool:
    return objective_negatives > 0 or data_columns_negative is None


@together("this objective has no negatives but the batch's; set the first to 0")
def _the_objective_reads_negatives(objective_negatives: int, objective_name: str) -> bool:
    return objective_negatives == 0 or OBJECTIVES[objective_name].reads != "strings"


@together("nothing reads what a query brings; raise the second or the third, or set the first to 0")
def _negatives_are_read(
    objective_negatives: int, objective_candidates: int, objective_contrastive_weight: float
) -> bool:
    return objective_negatives == 0 or objective_candidates > 1 or objective_contrastive_weight > 0


@together("this objective needs a generator; give its path")
def _there_is_a_generator(
    generator_path: str | None, objective_name: str, objective_marginal_weight: float, objective_evidence_weight: float
) -> bool:
    weights = objective_marginal_weight, objective_evidence_weight
    return generator_path is not None or not OBJECTIVES[objective_name].uses_generator(*weights)


@together("this objective needs a retriever; give its path")
def _there_is_a_retriever(
    retriever_path: str | None, objective_name: str, objective_candidates: int, objective_contrastive_weight: float,
    objective_document_weight: float, objective_marginal_weight: float, objective_evidence_weight: float,
) -> bool:  # fmt: skip
    of_scores = objective_contrastive_weight + objective_document_weight
    weights = of_scores, objective_marginal_weight, objective_evidence_weight
    return retriever_path is not None or not OBJECTIVES[objective_name].uses_retriever(objective_candidates, *weights)


@together("this objective compares candidates by their evidence; raise the second to 2 or more, and the third above 0")
def _evidence_compares_candidates(
    objective_name: str, objective_candidates: int, objective_evidence_weight: float
) -> bool:
    return not OBJECTIVES[objective_name].divergence or (objective_candidates > 1 and objective_evidence_weight > 0)


@together("this objective reads the answer's likelihood alone; set the first to answer, or name pdist, replug or emdr2")
def _evidence_of_questions_is_read(objective_evidence: str, objective_name: str) -> bool:
    return objective_evidence == "answer" or bool(OBJECTIVES[objective_name].divergence)


@together(
    "labels are corrected by a mean log-likelihood, of pdist or replug; set the first to None, or name one of them"
)
def _labels_have_evidence_to_correct_them(objective_label_noise: float | None, objective_name: str) -> bool:
    formula = OBJECTIVES[objective_name]
    return objective_label_noise is None or (formula.reads == "evidence" and formula.divergence != "emdr2")


@together("this objective has no such target; set the first to 0, or name pdist, replug or emdr2")
def _labels_have_a_target_to_share(objective_label_share: float, objective_name: str) -> bool:
    return objective_label_share == 0 or bool(OBJECTIVES[objective_name].divergence)


@together("nothing says how good a passage is; name the columns of scores, or another objective")
def _there_are_scores(
    objective_name: str, data_columns_passage_score: str | None, data_columns_negative_score: str | None
) -> bool:
    has_scores = data_columns_passage_score is not None or data_columns_negative_score is not None
    return OBJECTIVES[objective_name].reads != "scores" or has_scores


@together("there is no retriever to measure; give its path or another metric")
def _the_metric_has_its_retriever(eval_metric: str, retriever_path: str | None) -> bool:
    return retriever_path is not None or eval_metric not in metrics.needing("retriever")


@together("there is no generator to measure; give its path or another metric")
def _the_metric_has_its_generator(eval_metric: str, generator_path: str | None) -> bool:
    return generator_path is not None or eval_metric not in metrics.needing("generator")


@together("no answers are generated; raise the second or choose another metric")
def _the_metric_has_its_answers(eval_metric: str, eval_answers: int) -> bool:
    return eval_answers > 0 or eval_metric not in metrics.needing("answers")


@together("nothing is evaluated during the run; raise the second")
def _patience_has_evaluations(eval_patience: int, eval_every_steps: int) -> bool:
    return eval_patience == 0 or eval_every_steps > 0


@together("mining fills groups with what a retriever considers near; give its path and groups of several rows")
def _mining_has_something_to_fill(
    mining_every_steps: int, group_size: int, retriever_path: str | None, objective_negatives: int,
    data_columns_negative: str | None,
) -> bool:  # fmt: skip
    brings = objective_negatives > 0 and data_columns_negative is None
    return mining_every_steps == 0 or (retriever_path is not None and (group_size > 1 or brings))


@together("not all candidates can be drawn at random; lower the first")
def _some_candidates_are_near(mining_explore: int, objective_candidates: int) -> bool:
    return mining_explore == 0 or mining_explore < objective_candidates


@together("what is drawn at random would not be read, as it is far; set the second to row, or the first to 0")
def _what_is_drawn_is_read(mining_explore: int, objective_candidates_from: str) -> bool:
    return mining_explore == 0 or objective_candidates_from == "row"


@together("there is no corpus; name it, or set the first to rows")
def _negatives_have_their_corpus(mining_negatives_from: str, data_passages: str | None) -> bool:
    return mining_negatives_from == "rows" or data_passages is not None


@together("without answers there is the evidence of questions alone; name the column, or set the second to question")
def _answers_are_there_to_be_read(
    data_columns_answer: str | None, objective_evidence: str, objective_name: str, objective_marginal_weight: float,
    objective_evidence_weight: float,
) -> bool:  # fmt: skip
    weights = objective_marginal_weight, objective_evidence_weight
    reads_answers = OBJECTIVES[objective_name].uses_generator(*weights) and objective_evidence != "question"
    return data_columns_answer is not None or not reads_answers


@together("only one axis may be -1; give the others a number")
def _one_axis_takes_the_rest(mesh_replica: int, mesh_data: int, mesh_model: int) -> bool:
    return (mesh_replica, mesh_data, mesh_model).count(-1) <= 1


def _unknown(name: str) -> str:
    if inside := [k for k in KEYS if k.startswith(name + ".")]:
        return f"{name} is a section; give one of {', '.join(inside)}"
    return f"unknown key {name[:160]}{_nearest(name[:160], KEYS)}"


def _nearest(word: Any, words: Any) -> str:
    words = list(words)
    near = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    # A key given without its section: `learning_rate` for `optimizer.learning_rate`.
    near = [w for w in words if w.endswith(f".{word}")][:1] or near
    return f"; did you mean {near[0]}?" if near else ""
