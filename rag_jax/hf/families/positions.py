"""What a config.json says of rotary positions and of how far layers look, read and written."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rag_jax import untrusted
from rag_jax.hf.families.entry import is_number, is_size
from rag_jax.models import LayerKind, LlamaConfig, RopeScaling

FULL, SLIDING = "full_attention", "sliding_attention"
# In use, but no different from none within `max_position_embeddings`.
GROWING = ("default", "dynamic")


class Rope(NamedTuple):
    theta: float
    scaling: RopeScaling | None = None
    max_positions: int | None = None  # beyond which it turns otherwise; None: as many as the model has


def read_rope(theirs: Mapping[str, Any], rope: Mapping[str, Any], channels: Any, problems: list[str]) -> Rope:
    """Of `channels` channels that turn, by their `rope_parameters` of one kind of layers."""

    def number(key: str, *default: float) -> float:
        value = rope.get(key)
        value = default[0] if value is None and default else value
        if not is_number(value) or value <= 0:
            problems.append(f"rope {key}={untrusted.short(value)} (must be a number above 0)")
            return 1.0
        return float(value)

    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={untrusted.short(rope['partial_rotary_factor'])} (supported: 1.0)")
    theta, kind = number("rope_theta", 10000.0), rope.get("rope_type", "default")
    if kind in GROWING:
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, RopeScaling("linear", number("factor")))
    if kind not in ("llama3", "yarn", "longrope"):
        known = ", ".join((*GROWING, "linear", "llama3", "yarn", "longrope"))
        problems.append(f"rope_type={untrusted.short(kind)} (supported: {known})")
        return Rope(theta)
    trained = int(number("original_max_position_embeddings"))
    if kind == "longrope":
        return _read_longrope(theirs, rope, channels, trained, theta, number, problems)
    low, high = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
    slow, fast = number(low, *([1.0] if kind == "yarn" else [])), number(high, *([32.0] if kind == "yarn" else []))
    if slow >= fast:
        problems.append(f"rope {low}={slow} (must be below {high}={fast})")
    if kind == "llama3":
        return Rope(theta, RopeScaling("llama3", number("factor"), slow, fast, trained))
    factor = number("factor", _growth(theirs, trained))
    magnitude = number("attention_factor", _yarn_magnitude(rope, factor))
    whole = rope.get("truncate", True) is not False
    scaling = RopeScaling("yarn", factor, slow, fast, trained, whole_channels=whole, magnitude=magnitude)
    return Rope(theta, scaling)


def _growth(theirs: Mapping[str, Any], trained: int) -> float:
    positions = theirs.get("max_position_embeddings")
    return positions / trained if is_size(positions) and trained else 1.0


def _yarn_magnitude(rope: Mapping[str, Any], factor: float) -> float:
    def of(share: Any) -> float:
        return 0.1 * float(share) * math.log(factor) + 1.0 if factor > 1 else 1.0

    shares = rope.get("mscale"), rope.get("mscale_all_dim")
    return of(shares[0]) / of(shares[1]) if all(is_number(share) and share for share in shares) else of(1.0)


def _read_longrope(
    theirs: Mapping[str, Any],
    rope: Mapping[str, Any],
    channels: Any,
    trained: int,
    theta: float,
    number: Any,
    problems: list[str],
) -> Rope:
    """Texts of no more than the trained context alone: a longer one would turn by other factors, all of its tokens."""
    factors = rope.get("short_factor")
    if not isinstance(factors, list) or not all(is_number(each) and each > 0 for each in factors):
        problems.append(f"rope short_factor={untrusted.short(factors)} (must be a list of numbers above 0)")
        return Rope(theta)
    if is_size(channels) and len(factors) != channels // 2:
        problems.append(
            f"rope short_factor holds {len(factors)} numbers (must be {channels // 2}, one a pair of channels)"
        )
        return Rope(theta)
    factor = number("factor", _growth(theirs, trained))
    magnitude = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 and trained > 1 else 1.0
    magnitude = number("attention_factor", magnitude)
    factors = tuple(map(float, factors))
    scaling = RopeScaling(
        "channels", factor, original_max_positions=trained, channel_factors=factors, magnitude=magnitude
    )
    return Rope(theta, scaling, trained)


def write_rope(kind: LayerKind) -> dict[str, Any]:
    """What `read_rope` reads as the rope of such layers."""
    rope: dict[str, Any] = {"rope_theta": kind.rope_theta, "rope_type": "default"}
    scaling = kind.rope_scaling
    if scaling is None:
        return rope
    rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return rope
    rope["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        return rope | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    rope["attention_factor"] = scaling.magnitude
    if scaling.kind == "yarn":
        betas = {"beta_slow": scaling.low_freq_factor, "beta_fast": scaling.high_freq_factor}
        return rope | betas | {"truncate": scaling.whole_channels}
    factors = list(scaling.channel_factors)
    return rope | {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}


def channels_of(theirs: Mapping[str, Any]) -> Any:
    """Channels of a head that turn; None where the config does not say."""
    width, heads = theirs.get("hidden_size"), theirs.get("num_attention_heads")
    own = theirs.get("head_dim") or (width // heads if is_size(width) and is_size(heads) else None)
    share = (theirs.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    return int(own * share) if is_size(own) and is_number(share) else None


def read_one_rope(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Of layers that all turn alike and see as far as one another."""
    read = read_rope(theirs, theirs.get("rope_parameters") or {}, channels_of(theirs), problems)
    limit = {} if read.max_positions is None else {"max_positions": read.max_positions}
    return {"rope_theta": read.theta, "rope_scaling": read.scaling} | limit


def write_one_rope(config: LlamaConfig) -> dict[str, Any]:
    return {"rope_parameters": write_rope(config.kinds[0])}


def types_of(theirs: Mapping[str, Any], problems: list[str]) -> list[str]:
    """The type of every layer, by whether it looks at all tokens or at those nearby."""
    types = theirs.get("layer_types") or []
    types = [str(one) for one in types] if isinstance(types, list) else [str(types)]
    if set(types) - {FULL, SLIDING}:
        problems.append(f"layer_types={untrusted.short(types)} (supported: {FULL}, {SLIDING})")
    if is_size(theirs.get("num_hidden_layers")) and types and len(types) < theirs["num_hidden_layers"]:
        problems.append(f"layer_types names {len(types)} layers of {theirs['num_hidden_layers']}")
        return []
    return types[: theirs.get("num_hidden_layers")]


def window_of(theirs: Mapping[str, Any], problems: list[str], key: str = "sliding_window") -> int:
    if not is_size(theirs.get(key)):
        problems.append(f"{key}={untrusted.short(theirs.get(key))} (must be a whole number above 0)")
        return 1
    return theirs[key]


def fields_of(kinds: Sequence[LayerKind]) -> dict[str, Any]:
    """Our fields from the kind of every layer."""
    first, *further = dict.fromkeys(kinds)
    places = [first, *further]
    return {
        "rope_theta": first.rope_theta,
        "rope_scaling": first.rope_scaling,
        "sliding_window": first.sliding_window,
        "layer_kinds": tuple(map(places.index, kinds)) if further else (),
        "further_kinds": tuple(further),
    }


def kinds_of(config: LlamaConfig) -> list[LayerKind]:
    """The kind of every layer."""
    return [config.kinds[place] for place in config.layer_kinds or (0,) * config.num_layers]


def write_types(config: LlamaConfig) -> dict[str, Any]:
    return {"layer_types": [FULL if kind.sliding_window is None else SLIDING for kind in kinds_of(config)]}


def read_windows(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Of layers that all turn alike; all look at all tokens, none does, or some."""
    ours, types = read_one_rope(theirs, problems), types_of(theirs, problems)
    if not theirs.get("use_sliding_window", True) or theirs.get("sliding_window") is None or SLIDING not in types:
        return ours | {"sliding_window": None}
    window = window_of(theirs, problems)
    return ours | fields_of(
        [LayerKind(ours["rope_theta"], ours["rope_scaling"], window if one == SLIDING else None) for one in types]
    )


def write_windows(config: LlamaConfig) -> dict[str, Any]:
    windows = [kind.sliding_window for kind in config.kinds]
    sizes: dict[str, Any] = {"use_sliding_window": any(windows)}
    if any(windows):
        sizes |= {"sliding_window": max(window or 0 for window in windows)} | write_types(config)
    return write_one_rope(config) | sizes


def read_two_ropes(theirs: Mapping[str, Any], problems: list[str], window: int) -> list[LayerKind]:
    """The kind of every layer, of two types that turn by parameters of their own; nearby tokens are `window` away."""
    by_type, types = theirs.get("rope_parameters") or {}, types_of(theirs, problems)
    channels = channels_of(theirs)
    ropes = {one: read_rope(theirs, by_type.get(one) or {}, channels, problems) for one in dict.fromkeys(types)}
    if any(rope.max_positions is not None for rope in ropes.values()):
        problems.append("rope_type='longrope' of some layers (supported: of all layers alike)")
    kinds = [LayerKind(ropes[one].theta, ropes[one].scaling, window if one == SLIDING else None) for one in types]
    return kinds or [LayerKind(10000.0)]


def write_two_ropes(kinds: Sequence[LayerKind]) -> dict[str, Any]:
    """Their parameters by type; of a type that no layer is of, those of the other."""
    by_type = {FULL if kind.sliding_window is None else SLIDING: write_rope(kind) for kind in kinds}
    other = next(iter(by_type.values()))
    return {"rope_parameters": {one: by_type.get(one, other) for one in (FULL, SLIDING)}}
