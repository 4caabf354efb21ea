"""What a run's config stands for: the models it names, how they read, and the composite of both."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from rag_jax import data, hf, models, rag, sharding

ROLES = ("retriever", "generator")


@dataclasses.dataclass(frozen=True)
class Run:
    """The models of a run before any weight is read. What the config does not name is None."""

    config: Any
    sources: dict[str, hf.Source]  # by role
    model: rag.Rag
    retriever_text: data.RetrieverText | None
    prompt: data.Prompt | None


def open_run(config: Any, workdir: pathlib.Path | None = None) -> Run:
    """Configs and tokenizers of the models, from the copies in the workdir where it has them. Reads no weights."""
    sources = {}
    for role in ROLES:
        if config[role].path is not None:
            copy = None if workdir is None else workdir / "models" / role
            path = str(copy) if copy is not None and copy.is_dir() else config[role].path
            sources[role] = hf.open_model(path, f"{role}.path", role)
    return Run(config, sources, composite(config, sources), retriever_text(config, sources), prompt(config, sources))


def composite(config: Any, sources: dict[str, hf.Source], batch_shards: int = 1) -> rag.Rag:
    graphs = {
        role: models.abstract(dataclasses.replace(source.model_config, remat=config[role].remat))[0]
        for role, source in sources.items()
    }
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
        batch_shards,
    )


def retriever_text(config: Any, sources: dict[str, hf.Source]) -> data.RetrieverText | None:
    if "retriever" not in sources:
        return None
    source, section = sources["retriever"], config.retriever
    query_prefix = source.pooling.query_prefix if section.query_prefix is None else section.query_prefix
    passage_prefix = source.pooling.passage_prefix if section.passage_prefix is None else section.passage_prefix
    return data.RetrieverText(
        source.tokenizer, query_prefix, passage_prefix, config.data.query_len, config.data.passage_len
    )


def prompt(config: Any, sources: dict[str, hf.Source]) -> data.Prompt | None:
    if "generator" not in sources:
        return None
    texts, lengths = config.prompt, config.data
    return data.Prompt(
        sources["generator"].tokenizer, texts.passage, texts.query, texts.answer,
        lengths.prompt_passage_len, lengths.prompt_query_len, lengths.answer_len,
    )  # fmt: skip


def abstract_params(run: Run) -> dict[str, Any]:
    """Shapes of all parameters, with their places on a mesh of all devices."""
    shapes = {role: models.abstract(source.model_config)[1] for role, source in run.sources.items()}
    places = sharding.param_shardings(sharding.make_mesh(1, -1, 1), shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=s), shapes, places)


def pretrained_params(run: Run) -> dict[str, Any]:
    """The parameters in the models' folders, placed as `abstract_params` says."""
    params = {role: hf.load_params(source.folder, source.model_config) for role, source in run.sources.items()}
    return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), params, abstract_params(run))
