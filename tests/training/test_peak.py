"""The peak FLOP/s that MFU is a share of, and what it is a peak of."""

import pytest

from rag_jax.training import peak as peaks


class Device:
    def __init__(self, device_kind):
        self.device_kind = device_kind


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4", 275e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_the_peak_of_known_devices_is_in_the_table(monkeypatch, kind, peak):
    monkeypatch.setattr(peaks.jax, "devices", lambda: [Device(kind)] * 4)
    monkeypatch.setattr(peaks.jax, "device_count", lambda: 4)
    assert peaks.peak() == (4 * peak, "bfloat16")
    assert str(peaks.peak()).endswith("TFLOP/s in bfloat16")


def test_the_peak_of_cpus_is_measured_and_shared_by_their_devices():
    one, all_devices = peaks.measured_flops(512), peaks.peak()
    assert 1e8 < one < 1e14
    assert all_devices.kind == "float32" and all_devices.flops < 4 * one, (
        "eight devices on the same cores are not eight times as fast"
    )
