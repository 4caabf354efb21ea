"""What a run's config stands for: the models it names, how they read, and the composite of both."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rag_jax import data, hf, models, rag
from rag_jax.distributed import sharding
from rag_jax.errors import UserError
from rag_jax.objectives import OBJECTIVES, ROLES


@dataclasses.dataclass(frozen=True)
class Pair:
    """The models of a config before any weight is read. What the config does not name is None."""

    config: Any
    sources: dict[str, hf.Source]  # by role
    model: rag.Rag
    retriever_text: data.RetrieverText | None
    prompt: data.Prompt | None
    whole_string: data.WholeString | None  # objective "dalm": what its generator trains on

    def shapes(self) -> dict[str, Any]:
        """Shapes of all parameters, by role."""
        return {role: models.abstract(source.model_config)[1] for role, source in self.sources.items()}


def open_pair(config: Any, workdir: pathlib.Path | None = None) -> Pair:
    """Configs and tokenizers of the models, from the copies in the workdir where it has them. Reads no weights."""
    sources = {}
    for role in ROLES:
        if config[role].path is not None:
            copy = None if workdir is None else workdir / "models" / role
            path = str(copy) if copy is not None and copy.is_dir() else config[role].path
            sources[role] = hf.open_model(path, f"{role}.path", role)
    check_lengths(config, sources)
    text, prompt_text = retriever_text(config, sources), prompt(config, sources)
    whole_string = None
    if prompt_text is not None and OBJECTIVES[config.objective.name].reads == "strings":
        whole_string = data.WholeString(prompt_text.tokenizer, string_len(config))
    return Pair(config, sources, composite(config, sources), text, prompt_text, whole_string)


def use_precision(config: Any) -> None:
    """Of every float32 product that is traced from now on, until another run is opened; jax keeps programs apart by it.

    In a bfloat16 run it stays the device's own: all of its float32 products but those of the scores, which ask for
    more themselves, are gradients of bfloat16 ones.
    """
    precision = config.matmul_precision if config.dtype == "float32" else "default"
    jax.config.update("jax_default_matmul_precision", precision)


def string_len(config: Any) -> int:
    """The most tokens the generator reads: all three segments."""
    return config.data.prompt_passage_len + config.data.prompt_query_len + config.data.answer_len


def check_lengths(config: Any, sources: dict[str, hf.Source]) -> None:
    """UserError for texts longer than the positions that a model has."""
    lengths = {
        "retriever": {name: config.data[name] for name in ("query_len", "passage_len")},
        "generator": {"prompt_passage_len + data.prompt_query_len + data.answer_len": string_len(config)},
    }
    problems = [
        f"data.{name}={length}: {role}.path={source.path!r} has {source.model_config.max_positions} positions"
        for role, source in sources.items()
        for name, length in lengths[role].items()
        if length > source.model_config.max_positions
    ]
    if problems:
        raise UserError(f"{'; '.join(problems)}; lower what is too long")


def composite(config: Any, sources: dict[str, hf.Source]) -> rag.Rag:
    """Both models in one; what is traced from now on computes with the config's precision, see `use_precision`."""
    use_precision(config)
    graphs = {role: models.abstract(model_config(config, role, source))[0] for role, source in sources.items()}
    pooling = config.retriever.pooling
    if pooling == "auto":
        pooling = sources["retriever"].pooling.mode if "retriever" in sources else "mean"
    return rag.Rag(
        rag.Objective(**config.objective.to_dict()),
        graphs.get("retriever"),
        graphs.get("generator"),
        pooling,
        config.group_size,
        jnp.dtype(config.dtype),
        config.retriever.chunk_size,
    )


def model_config(config: Any, role: str, source: hf.Source) -> models.ModelConfig:
    """The model's own config, with what the run decides: how it is computed, and dropout."""
    changes: dict[str, Any] = {"computing": models.Computing(config.dtype, config[role].remat)}
    if config.dropout is not None:
        changes |= dict.fromkeys(dropouts(source.model_config), config.dropout)
    return dataclasses.replace(source.model_config, **changes)


def dropouts(model_config: models.ModelConfig) -> dict[str, float]:
    """The dropout rates of a model, by the names of its config."""
    return {name: rate for name, rate in vars(model_config).items() if name.endswith("dropout")}


def retriever_text(config: Any, sources: dict[str, hf.Source]) -> data.RetrieverText | None:
    if "retriever" not in sources:
        return None
    source, section = sources["retriever"], config.retriever
    folder_says = (source.pooling.query_prefix, source.pooling.passage_prefix)
    query, passage = OBJECTIVES[config.objective.name].prefixes or folder_says
    return data.RetrieverText(
        source.tokenizer,
        query if section.query_prefix is None else section.query_prefix,
        passage if section.passage_prefix is None else section.passage_prefix,
        config.data.query_len,
        config.data.passage_len,
    )


def prompt(config: Any, sources: dict[str, hf.Source]) -> data.Prompt | None:
    if "generator" not in sources:
        return None
    texts, lengths = config.prompt, config.data
    return data.Prompt(
        sources["generator"].tokenizer, texts.passage, texts.query, texts.answer,
        lengths.prompt_passage_len, lengths.prompt_query_len, lengths.answer_len,
    )  # fmt: skip


def abstract_params(pair: Pair, mesh: Mesh | None = None) -> dict[str, Any]:
    """Shapes of all parameters and how they lie on a mesh; without one, on a mesh of all devices."""
    shapes = pair.shapes()
    places = sharding.param_shardings(mesh or sharding.make_mesh(1, -1, 1), shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places)


def pretrained_params(pair: Pair, mesh: Mesh | None = None) -> dict[str, Any]:
    """The parameters in the models' folders, which lie as `abstract_params` says."""
    return {
        role: hf.load_params(
            pair.sources[role].folder,
            pair.sources[role].model_type,
            pair.sources[role].model_config,
            jax.tree.map(lambda a: a.sharding, places),
        )
        for role, places in abstract_params(pair, mesh).items()
    }
