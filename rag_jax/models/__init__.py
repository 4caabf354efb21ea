"""The model families: a frozen config each, and modules that know no mesh, no tokenizer and no run config."""

import functools
from typing import Any

import jax
from flax import nnx

from rag_jax.models.bert import Bert, BertConfig
from rag_jax.models.config import Computing, Kernel, ModelConfig
from rag_jax.models.decoder import Cache, Decoder
from rag_jax.models.gpt2 import Gpt2, Gpt2Config
from rag_jax.models.llama import LayerKind, Llama, LlamaConfig, RopeScaling

__all__ = [
    "Bert",
    "BertConfig",
    "Cache",
    "Computing",
    "Decoder",
    "Gpt2",
    "Gpt2Config",
    "Kernel",
    "LayerKind",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "RopeScaling",
    "abstract",
]


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The model's definition and its parameters' shapes and dtypes, as plain nested dicts; no array is made."""
    graphdef, shapes = _abstract(config)
    return graphdef, jax.tree.map(lambda leaf: leaf, shapes)  # dicts of the caller's own


@functools.cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Traced once: a start asks twenty times."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)
