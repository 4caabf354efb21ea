"""The model families: a frozen config each, and modules that know no mesh, no tokenizer and no run config."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from rag_jax.models import adapters, projection
from rag_jax.models.bert import Bert, BertConfig
from rag_jax.models.config import Computing, Dense, Kernel, Lora, ModelConfig, Norm, Part, Unit
from rag_jax.models.decoder import Cache, Decoder
from rag_jax.models.gpt2 import Gpt2, Gpt2Config
from rag_jax.models.llama import Llama, LlamaConfig
from rag_jax.models.modernbert import ModernBert, ModernBertConfig
from rag_jax.models.rope import LayerKind, RopeScaling

__all__ = [
    "Bert",
    "BertConfig",
    "Cache",
    "Computing",
    "Decoder",
    "Dense",
    "Gpt2",
    "Gpt2Config",
    "Kernel",
    "LayerKind",
    "Llama",
    "LlamaConfig",
    "Lora",
    "ModelConfig",
    "ModernBert",
    "ModernBertConfig",
    "Norm",
    "Part",
    "RopeScaling",
    "Unit",
    "abstract",
    "abstract_leaf",
    "linear_layers",
    "plain",
    "with_base",
    "with_lora",
    "with_projection",
]


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The model's definition and its parameters' shapes and dtypes, as plain nested dicts; no array is made."""
    graphdef, shapes = _abstract(config)
    return graphdef, jax.tree.map(lambda leaf: leaf, shapes)  # dicts of the caller's own


def with_lora(config: ModelConfig, lora: Lora | None) -> ModelConfig:
    """The same model with these adapters."""
    computing = dataclasses.replace(config.computing, lora=lora)
    return dataclasses.replace(config, computing=computing)  # type: ignore[type-var]


def with_base(config: ModelConfig, base_dtype: str) -> ModelConfig:
    """The same model with its frozen weights in this dtype."""
    computing = dataclasses.replace(config.computing, base_dtype=base_dtype)
    return dataclasses.replace(config, computing=computing)  # type: ignore[type-var]


def with_projection(config: ModelConfig, parts: tuple[Part, ...]) -> ModelConfig:
    """The same model with this behind its pooling."""
    computing = dataclasses.replace(config.computing, projection=parts)
    return dataclasses.replace(config, computing=computing)  # type: ignore[type-var]


def plain(config: ModelConfig) -> ModelConfig:
    """The model as its files hold it: no adapters, nothing in fewer bits, and nothing behind its pooling."""
    kept = dataclasses.replace(config.computing, lora=None, base_dtype="float32", projection=())
    return config if kept == config.computing else dataclasses.replace(config, computing=kept)  # type: ignore[type-var]


def abstract_leaf(config: ModelConfig, path: str) -> jax.ShapeDtypeStruct:
    """The shape and dtype of one parameter, such as layers/attention/query/kernel."""
    leaf: Any = abstract(config)[1]
    for name in path.split("/"):
        leaf = leaf[name]
    return leaf


@functools.cache
def linear_layers(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every layer that may have an adapter, by its path, such as layers/attention/query."""
    leaves = jax.tree_util.tree_leaves_with_path({"layers": abstract(plain(config))[1]["layers"]})
    paths = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    return {path.removesuffix("/kernel"): shape[-2:] for path, shape in paths.items() if path.endswith("/kernel")}


@functools.cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Traced once: a start asks twenty times."""

    def build() -> nnx.Module:
        model = projection.attached(config.build(nnx.Rngs(0)), config.computing.projection)
        adapted = adapters.attached(model, config.computing)
        return adapters.reduced(adapted, config.computing.base_dtype)

    graphdef, state = nnx.split(nnx.eval_shape(build))
    return graphdef, nnx.to_pure_dict(state)
