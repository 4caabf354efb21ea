"""Low-rank adapters (LoRA; Hu et al., 2021) on linear layers of a model, whatever its family.

They are two more leaves beside a layer's kernel, so that whatever walks the parameters (placement, rates, optimizer,
checkpoints, the scan over layers) treats them as it does all others.

**N** layers, **R** rank.
"""

import functools
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from rag_jax.models import quantised
from rag_jax.models.config import Computing, Lora
from rag_jax.models.layers import Linear

# The names of an adapter's leaves, beside that of the layer's kernel.
LEAVES = A, B = "lora_a", "lora_b"


def attached(model: nnx.Module, computing: Computing) -> nnx.Module:
    """The model with an adapter, as zeros, on each of its layers that a target names; see `drawn`."""
    lora = computing.lora
    for path, layer in _linear_layers(model):
        if lora is not None and is_target(path, lora):
            *stacked, width, out_width = layer.kernel[...].shape
            layer.lora, layer.lora_name = lora, path
            layer.lora_a = nnx.Param(jnp.zeros((*stacked, width, lora.rank)))
            layer.lora_b = nnx.Param(jnp.zeros((*stacked, lora.rank, out_width)))
    return model


def reduced(model: nnx.Module, base_dtype: str) -> nnx.Module:
    """The model with its frozen weights in fewer bits, to be filled; see `Computing.base_dtype`."""
    if base_dtype == "float32":
        return model
    for _, layer in _linear_layers(model):
        *stacked, width, out_width = layer.kernel[...].shape
        if base_dtype in quantised.KINDS:
            layer.is_quantised = True
            for name, (shape, dtype) in quantised.shapes(base_dtype, width, out_width).items():
                setattr(layer, name, nnx.Param(jnp.zeros((*stacked, *shape), dtype)))
            del layer.kernel
        else:
            layer.kernel = nnx.Param(layer.kernel[...].astype(base_dtype))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Embed):
            module.embedding = nnx.Param(module.embedding[...].astype(jnp.bfloat16))
    head = getattr(model, "head", None)
    if isinstance(head, Linear):
        head.kernel = nnx.Param(head.kernel[...].astype(jnp.bfloat16))
    return model


def _linear_layers(model: nnx.Module) -> list[tuple[str, Linear]]:
    """(path, module) of those that may have an adapter: all in the stacked layers."""
    found = [("/".join(map(str, parts)), module) for parts, module in nnx.iter_modules(model)]
    return [(path, each) for path, each in found if isinstance(each, Linear) and path.startswith("layers/")]


def is_target(path: str, lora: Lora) -> bool:
    return any(re.search(pattern, path) for pattern in lora.targets)


def problem(lora: Lora, layers: Mapping[str, tuple[int, int]]) -> str | None:
    """What is wrong with adapters for a model of these layers, `{path: (in, out)}`; None where nothing is."""
    for pattern in lora.targets:
        if not any(re.search(pattern, path) for path in layers):
            return f"targets={lora.targets}: {pattern!r} is found in no layer; there are {', '.join(layers)}"
    path, widths = min(((path, min(s)) for path, s in layers.items() if is_target(path, lora)), key=lambda one: one[1])
    if lora.rank > widths:
        return f"rank={lora.rank}: {path} is {widths} wide, so that a rank above it holds nothing more; lower it"
    return None


def is_adapter(path: str) -> bool:
    """Whether a parameter's path is that of an adapter's leaf."""
    return path.rsplit("/", 1)[-1] in LEAVES


def drawn(path: str, shape: tuple[int, ...], key: Key[Array, ""]) -> Float[Array, "N _ _"]:
    """A leaf as PEFT begins with: A uniform up to 1 / sqrt(in) either way, and B zero, so that nothing is added yet."""
    if path.endswith(B):
        return jnp.zeros(shape)
    bound = 1.0 / math.sqrt(shape[-2])
    return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), shape, minval=-bound, maxval=bound)


def merged(params: Any, lora: Lora | None) -> Any:
    """The parameters of the same model without adapters, whole: W + scale A B, float32, W as it is computed with."""
    if not isinstance(params, dict):
        return params if params.dtype == jnp.float32 else params.astype(jnp.float32)
    rest = {name: merged(part, lora) for name, part in params.items() if name not in (*LEAVES, *quantised.LEAVES)}
    if quantised.CODES in params:
        rest["kernel"] = _whole(params[quantised.CODES], params[quantised.SCALES])
    if A in params and lora is not None:
        rest["kernel"] = _sum(rest["kernel"], params[A], params[B], lora.scale)
    return rest


@jax.jit
def _whole(codes: Any, scales: Any) -> Float[Array, "N _ _"]:
    return jax.vmap(functools.partial(quantised.dequantised, dtype=jnp.float32))(codes, scales)


def without_effect(params: Any) -> Any:
    """The parameters of a model whose adapters add nothing."""

    def leaf(path: Any, value: Any) -> Any:
        return jnp.zeros_like(value) if path[-1].key == B else value

    return jax.tree_util.tree_map_with_path(leaf, params)


@jax.jit
def _sum(kernel: Any, a: Any, b: Any, scale: Any) -> Float[Array, "N _ _"]:
    return kernel + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
