"""What a run chooses by the devices that it finds: the kernel of attention, and how much it computes at a time."""

import dataclasses
import os
import pathlib
from typing import Literal

# Layers that are compiled each for itself at most: one takes the compiler as long as all of them in one loop do.
MOST_UNROLLED = 32
# Bytes of float32 logits that exist at a time on an accelerator, and tokens on a CPU, which gains nothing by more.
LOGITS_BYTES, CPU_TOKENS = 2**29, 512
# Of a device's memory, what the generator's activations may take that stay for the backward pass.
KEPT_SHARE = 0.4
# With more of its memory in use, fused attention is computed once more rather than what it returns be kept.
SHORT_SHARE = 0.7
# Of a host's memory, what its CPU devices may use.
HOST_SHARE = 0.75
# Where a container's limit stands; of the second kind and of the first.
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclasses.dataclass(frozen=True)
class Device:
    """The devices of a run, all alike."""

    platform: str  # "cpu" | "gpu" | "tpu"
    count: int = 1
    capability: tuple[int, int] = (0, 0)  # of a GPU
    memory: float = 0.0  # bytes of one that a run may use; 0: not known
    kind: str = ""  # as jax calls it


def host_memory() -> float:
    """Bytes that CPU devices may use: a share of what the host has, or of what a container leaves it; 0: not known."""
    try:
        bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):  # not told on every system
        return 0.0
    for path in map(pathlib.Path, CONTAINER_LIMITS):
        said = path.read_text().strip() if path.is_file() else ""
        bounds += [int(said)] if said.isdigit() else []  # "max": none
    return HOST_SHARE * min(bounds)


# By platform: the kernel of attention that never writes scores to memory.
Fused = Literal["cudnn", "pallas"]
FUSED: dict[str, Fused] = {"gpu": "cudnn", "tpu": "pallas"}


def fused_problem(
    kernel: Fused, device: Device, dtype: str, heads: tuple[int, int, int], split: int, dropout: float
) -> str:
    """Why a fused kernel cannot compute attention; empty where it can.

    `heads`: those of queries, of keys and values, and the channels of each. `split`: devices that share them.
    """
    _, num_kv_heads, channels = heads
    most, step = (256 if device.capability >= (9, 0) else 128, 8) if kernel == "cudnn" else (256, 16)
    if FUSED.get(device.platform) != kernel:
        return f"it runs on {'GPUs' if kernel == 'cudnn' else 'TPUs'} alone"
    if kernel == "cudnn" and device.capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0, and this one has {'.'.join(map(str, device.capability))}"
    if kernel == "pallas" and device.kind.startswith(("TPU v2", "TPU v3", "TPU v4")):
        return f"it needs more of the fastest memory than a {device.kind} has"
    if kernel == "pallas" and device.count == split > 1:
        return "the compiler cannot split it where nothing but mesh.model is split"
    if dtype != "bfloat16":
        return f"it needs dtype=bfloat16, and that is {dtype}"
    if channels > most or channels % step:
        return f"it needs heads of at most {most} channels, a multiple of {step}, and these have {channels}"
    if num_kv_heads % split:
        return f"the {num_kv_heads} heads of keys and values cannot be split over mesh.model={split} devices"
    if dropout:
        return f"it knows no dropout, and attention has {dropout:g} here (dropout=0 turns it off)"
    return ""


def unrolls(device: Device, num_layers: int) -> bool:
    """Whether each layer is compiled: a loop copies what stays for the backward pass, a tenth of a step's bytes.

    Not on several devices, where the loop is what keeps more than one layer's parameters from being gathered at a time.
    """
    return device.platform != "cpu" and device.count == 1 and num_layers <= MOST_UNROLLED


def packs(device: Device) -> bool:
    """Whether layers are run without the padding of rows, which are laid out anew for attention in each of them.

    Not on TPUs: how long such copies take there has not been measured.
    """
    return device.platform != "tpu"


def head_chunk(device: Device, vocab_size: int) -> int:
    """Tokens whose logits exist at a time: the output matrix' gradient goes through memory once for each chunk."""
    return CPU_TOKENS if device.platform == "cpu" else max(LOGITS_BYTES // (4 * vocab_size), CPU_TOKENS // 2)


def compiler_options(device: Device, kernels: str, chosen: str | None = None) -> dict[str, str | bool | int]:
    """What XLA is told of a training step. `chosen`: a folder for the kernels that it finds to be the fastest.

    A second process, or another host, then finds the same ones: measured anew they could be others, with other bits.
    """
    if device.platform != "gpu":
        return {}
    # Products that share an operand stay apart: merged, what each of them gives is copied out of the others'.
    options: dict[str, str | bool | int] = {"xla_gpu_dot_merger_threshold_mb": 0}
    # A layer's weights are cut out and cast as one: cast before, all layers would exist in the other dtype twice.
    options["xla_disable_hlo_passes"] = "slice-sinker,convert-mover"
    if kernels == "deterministic":
        options["xla_gpu_exclude_nondeterministic_ops"] = True
        if chosen is not None:
            options["xla_gpu_per_fusion_autotune_cache_dir"] = chosen
    return options


def remat(device: Device, chosen: str, used_bytes: float = 0.0) -> str:
    """A key of `layers.REMAT`: the config's, but for "dots" what suits the device and the memory in use."""
    if chosen != "dots":
        return chosen
    if device.memory and used_bytes > SHORT_SHARE * device.memory:
        return "products"
    return "sums" if device.platform == "gpu" else "dots"


def groups_at_a_time(device: Device, held_bytes: float, group_bytes: float) -> int:
    """Groups that the generator reads together: more than one costs no further forward pass in between.

    `held_bytes`: what a device holds all the time; `group_bytes`: what stays of a group for its backward pass.
    """
    if not device.memory:
        return 1
    return max(int(KEPT_SHARE * (device.memory - held_bytes) / group_bytes), 1)
