"""The model families: a frozen config each, and modules that know no mesh, no tokenizer and no run config."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from rag_jax.models.bert import Bert, BertConfig
from rag_jax.models.decoder import Cache, Decoder
from rag_jax.models.gpt2 import Gpt2, Gpt2Config
from rag_jax.models.llama import Llama, LlamaConfig, RopeScaling

ModelConfig = BertConfig | Gpt2Config | LlamaConfig

FAMILIES: dict[type, Callable[..., nnx.Module]] = {BertConfig: Bert, Gpt2Config: Gpt2, LlamaConfig: Llama}

__all__ = [
    "FAMILIES",
    "Bert",
    "BertConfig",
    "Cache",
    "Decoder",
    "Gpt2",
    "Gpt2Config",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "RopeScaling",
    "abstract",
]


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The model's definition and the shapes of its parameters, as plain nested dicts; no array is made."""
    model = nnx.eval_shape(lambda: FAMILIES[type(config)](config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)
