"""Rotary positions (Su et al., 2021), and how models turn beyond the context that they were first trained on.

**C** channels of a head, **C2** pairs of them that turn.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rag_jax.models.layers import Rope


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a longer context than the trained one turns.

    `linear` slows every channel by `factor`. `llama3` and `yarn` (Peng et al., 2023) slow those alone that turn less
    than `low_freq_factor` times over the trained context, keep those that turn more than `high_freq_factor` times, and
    move from one to the other between. `channels` divides each pair of channels by its own number (LongRoPE, Ding et
    al., 2024).
    """

    kind: str  # "linear" | "llama3" | "yarn" | "channels"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    channel_factors: tuple[float, ...] = ()
    whole_channels: bool = True  # yarn moves from a whole channel to a whole channel
    magnitude: float = 1.0  # of turned queries and of turned keys


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """How layers tell positions apart, and how far they look."""

    rope_theta: float | None  # None: they do not
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # only keys less than that far away


def rope(kind: LayerKind, channels: int, positions: Int[Array, "B L"]) -> Rope:
    """The turns of `channels` channels at these positions."""
    angles = positions[:, :, None].astype(jnp.float32) * rope_frequencies(kind, channels)
    turns = jnp.cos(angles), jnp.sin(angles)
    magnitude = 1.0 if kind.rope_scaling is None else kind.rope_scaling.magnitude
    return turns if magnitude == 1.0 else (turns[0] * magnitude, turns[1] * magnitude)


def rope_frequencies(kind: LayerKind, channels: int) -> Float[np.ndarray, " C2"]:
    """Radians a position for each pair of channels, float32."""
    if kind.rope_theta is None:
        return np.zeros(channels // 2, np.float32)
    exponents = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    frequencies = (1.0 / np.float32(kind.rope_theta) ** exponents).astype(np.float32)
    scaling = kind.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind == "channels":
        return frequencies / np.array(scaling.channel_factors, np.float32)
    kept = _llama3_kept(frequencies, scaling) if scaling.kind == "llama3" else _yarn_kept(kind, scaling, channels)
    return (frequencies * (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


def _llama3_kept(frequencies: Float[np.ndarray, " C2"], scaling: RopeScaling) -> Float[np.ndarray, " C2"]:
    """What share of each frequency is kept, in proportion to how often its channels turn."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return np.clip(share, 0.0, 1.0)


def _yarn_kept(kind: LayerKind, scaling: RopeScaling, channels: int) -> Float[np.ndarray, " C2"]:
    """What share of each frequency is kept, in proportion to the number of its channels."""
    theta = kind.rope_theta or 1.0

    def pair_that_turns(times: float) -> float:
        return channels * math.log(scaling.original_max_positions / (times * 2 * math.pi)) / 2 / math.log(theta)

    first, last = pair_that_turns(scaling.high_freq_factor), pair_that_turns(scaling.low_freq_factor)
    if scaling.whole_channels:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    if first == last:
        last += 0.001
    return 1.0 - np.clip((np.arange(channels // 2, dtype=np.float32) - first) / (last - first), 0.0, 1.0)
