"""What accelerators can do: peaks, memory, links; and the descriptions that their compilers ask for.

Figures are those of the makers: Google's TPU system architecture pages, NVIDIA's data sheets (of the SXM cards where
there are several). Links, PCIe where a card has no other, count both directions of one device's, as bytes a second that
it can send and receive at a time.
"""

import dataclasses
import math
import re

from rag_jax.errors import UserError

GIB = 2**30
# Dense bfloat16 FLOP/s of one jax device by its kind, the first whose name is part of it (cards without bfloat16:
# float16). A jax device is half a chip up to TPU v3 and from 7x on.
PEAK_FLOPS = (
    ("TPU v2", 23e12),
    ("TPU v3", 61e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 1154e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("V100", 125e12),
    ("T4", 65e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)
NODE = 8  # GPUs that NVLink joins
# Of which a TPU makes one float32 product.
BFLOAT16_PASSES = {"default": 1, "high": 3, "highest": 6}


def peak_flops(kind: str) -> float | None:
    """Of a jax device's kind; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS if name.lower() in kind.lower()), None)


@dataclasses.dataclass(frozen=True)
class Card:
    """What a GPU's compiler asks about it."""

    capability: tuple[int, int]
    cores: int
    shared_memory: tuple[int, int]  # bytes of a core, and of a block that asks for it
    l2_mib: int
    clock_ghz: float
    bandwidth: float  # bytes/s
    memory: float  # bytes
    threads: int = 2048  # of a core

    @property
    def target(self) -> str:
        """XLA's `GpuTargetConfigProto` as text."""
        of_core, of_block = self.shared_memory
        return f"""gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          shared_memory_per_core: {of_core} shared_memory_per_block_optin: {of_block}
          threads_per_core_limit: {self.threads} core_count: {self.cores} fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.l2_mib * 2**20} clock_rate_ghz: {self.clock_ghz}
          device_memory_size: {self.memory:.0f} registers_per_core_limit: 65536 registers_per_block_limit: 65536
          cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "NVIDIA"
        """


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device that `plan` knows."""

    kind: str  # in PEAK_FLOPS
    hbm_bytes: float  # that a program may use
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s to the other devices: ICI of a TPU, NVLink of a GPU inside its node
    node_bandwidth: float = 0.0  # bytes/s of one GPU to other nodes; 0: there are none
    float32_peak: float = 0.0  # GPU: FLOP/s of true float32
    card: Card | None = None  # GPU

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = peak_flops(self.kind)
        assert peak is not None
        return peak

    def product_peak(self, dtype: str, precision: str) -> float:
        """FLOP/s of products of this dtype; of float32 ones in this `matmul_precision`."""
        if dtype == "bfloat16":
            return self.peak
        if self.card is None:
            return self.peak / BFLOAT16_PASSES[precision]
        return self.float32_peak if precision == "highest" else self.peak / 2  # the half: TF32


def gpu(kind: str, card: Card, link_bandwidth: float, node_bandwidth: float, float32_peak: float) -> Chip:
    return Chip(kind, GPU_SHARE * card.memory, card.bandwidth, link_bandwidth, node_bandwidth, float32_peak, card)


# Shared memory of a core, and of a block that asks for it.
AMPERE, HOPPER, SMALL = (167936, 166912), (233472, 232448), (102400, 101376)
# A run takes this share of a card's memory, see `cli.ENVIRONMENT`.
GPU_SHARE = 0.92
CHIPS = {
    "v4": Chip("TPU v4", 31.75 * GIB, 1228e9, 300e9),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 819e9, 200e9),
    "v5p": Chip("TPU v5", 95.74 * GIB, 2765e9, 600e9),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 1640e9, 448e9),
    "l4": gpu("L4", Card((8, 9), 58, SMALL, 48, 2.04, 300e9, 24e9, 1536), 64e9, 12.5e9, 30.3e12),
    "a10g": gpu("A10G", Card((8, 6), 80, SMALL, 6, 1.71, 600e9, 24e9, 1536), 64e9, 12.5e9, 31.2e12),
    "rtx4090": gpu("RTX 4090", Card((8, 9), 128, SMALL, 72, 2.52, 1008e9, 24e9, 1536), 64e9, 12.5e9, 82.6e12),
    "l40s": gpu("L40S", Card((8, 9), 142, SMALL, 96, 2.52, 864e9, 48e9, 1536), 64e9, 12.5e9, 91.6e12),
    "a100-40": gpu("A100", Card((8, 0), 108, AMPERE, 40, 1.41, 1555e9, 40e9), 600e9, 50e9, 19.5e12),
    "a100": gpu("A100", Card((8, 0), 108, AMPERE, 40, 1.41, 2039e9, 80e9), 600e9, 50e9, 19.5e12),
    "h100": gpu("H100", Card((9, 0), 132, HOPPER, 50, 1.98, 3350e9, 80e9), 900e9, 100e9, 67e12),
    "h200": gpu("H200", Card((9, 0), 132, HOPPER, 50, 1.98, 4800e9, 141e9), 900e9, 100e9, 67e12),
    "b200": gpu("B200", Card((10, 0), 148, HOPPER, 126, 1.965, 8000e9, 180e9), 1800e9, 100e9, 75e12),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`v5e:16x16` or `h100:64`."""

    text: str
    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        return self.chip.card is None

    @property
    def bandwidth(self) -> float:
        """Bytes/s that the slowest link of a ring over all devices carries one way."""
        across_nodes = not self.is_tpu and self.devices > NODE
        return (self.chip.node_bandwidth if across_nodes else self.chip.link_bandwidth) / 2


def topology(text: str) -> Topology:
    """UserError for a device or a shape that there is not."""
    name, colon, sizes = text.partition(":")
    known = ", ".join(CHIPS)
    if name not in CHIPS or not colon:
        raise UserError(f"--topology={text}: must be DEVICE:SHAPE with a device of {known}, as in v5e:16x16 or h100:64")
    chip = CHIPS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"--topology={text}: {sizes!r} is not a shape; write v5e:16x16, v5p:4x4x4 or h100:64")
    shape = tuple(int(size) for size in sizes.split("x"))
    wanted = 1 if chip.card else 3 if name in ("v4", "v5p") else 2
    if len(shape) != wanted:
        example = {1: f"{name}:64", 2: f"{name}:16x16", 3: f"{name}:4x4x4"}[wanted]
        raise UserError(f"--topology={text}: {name} is given by {wanted} number{'s'[: wanted > 1]}, as in {example}")
    if chip.card and shape[0] > NODE and shape[0] % NODE:
        raise UserError(f"--topology={text}: more than one node of {NODE} must be whole nodes")
    return Topology(text, name, chip, shape)
