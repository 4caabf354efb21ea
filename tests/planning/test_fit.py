"""What a run chooses by its devices."""

import dataclasses

import pytest
from command import TINY

from rag_jax import config, hf, pair
from rag_jax.errors import UserError
from rag_jax.planning import fit

CPU = fit.Device("cpu")
H100 = fit.Device("gpu", 1, (9, 0), 73.6e9)
TPU = fit.Device("tpu", 1, memory=16e9)


@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "channels", "dropout", "problem"),
    [
        ("cudnn", H100, "bfloat16", 64, 0.0, ""),
        ("cudnn", H100, "bfloat16", 256, 0.0, ""),
        ("cudnn", fit.Device("gpu", 8, (9, 0)), "bfloat16", 64, 0.0, ""),
        ("cudnn", CPU, "bfloat16", 64, 0.0, "it runs on GPUs alone"),
        ("cudnn", TPU, "bfloat16", 64, 0.0, "it runs on GPUs alone"),
        ("cudnn", H100, "float32", 64, 0.0, "it needs dtype=bfloat16, and that is float32"),
        ("cudnn", H100, "bfloat16", 60, 0.0, "heads of at most 256 channels, a multiple of 8, and these have 60"),
        (
            "cudnn",
            H100,
            "bfloat16",
            64,
            0.1,
            "it knows no dropout, and attention has 0.1 here (dropout=0 turns it off)",
        ),
        ("cudnn", fit.Device("gpu", 1, (8, 6)), "bfloat16", 256, 0.0, "it needs heads of at most 128 channels"),
        ("cudnn", fit.Device("gpu", 1, (7, 5)), "bfloat16", 64, 0.0, "compute capability 8.0, and this one has 7.5"),
        ("pallas", TPU, "bfloat16", 64, 0.0, ""),
        ("pallas", H100, "bfloat16", 64, 0.0, "it runs on TPUs alone"),
        ("pallas", TPU, "bfloat16", 40, 0.0, "heads of at most 256 channels, a multiple of 16, and these have 40"),
        ("pallas", fit.Device("tpu", 1, kind="TPU v4"), "bfloat16", 64, 0.0, "of the fastest memory than a TPU v4 has"),
        ("pallas", fit.Device("tpu", 2), "bfloat16", 64, 0.0, "where nothing but mesh.model is split"),
    ],
)
def test_what_fused_kernels_can_compute(kernel, device, dtype, channels, dropout, problem):
    found = fit.fused_problem(kernel, device, dtype, (8, 2, channels), 2, dropout)
    assert problem in found and bool(problem) == bool(found)


def test_heads_that_cannot_be_split_over_the_devices_are_for_the_plain_kernel():
    found = fit.fused_problem("cudnn", fit.Device("gpu", 8, (9, 0)), "bfloat16", (8, 2, 64), 4, 0.0)
    assert "the 2 heads of keys and values cannot be split over mesh.model=4" in found


def kernel_of(device, **overrides):
    loaded = config.load(TINY, overrides)
    source = hf.open_config("gpt2", "generator.path", "generator")
    return pair.attention_kernel(loaded, "generator", source, device)


def test_the_kernel_is_what_the_config_asks_for_or_what_can_be():
    half = {"dtype": "bfloat16", "dropout": 0.0}
    assert kernel_of(H100, **half) == ("cudnn", "") == kernel_of(H100, **half, attention="cudnn")
    assert kernel_of(H100, **half, attention="plain") == ("plain", "")
    assert kernel_of(CPU, **half) == ("plain", "") and kernel_of(TPU, **half) == ("pallas", "")
    kernel, reason = kernel_of(H100, dtype="bfloat16")  # GPT-2's own dropout
    assert kernel == "plain" and reason.startswith("not cudnn: it knows no dropout")
    with pytest.raises(UserError, match=r"attention=cudnn: cannot compute generator\.path='gpt2', as it runs on GPUs"):
        kernel_of(CPU, **half, attention="cudnn")


def test_layers_are_unrolled_on_one_accelerator_alone():
    assert fit.unrolls(H100, 12) and fit.unrolls(TPU, 28)
    assert not fit.unrolls(CPU, 12) and not fit.unrolls(H100, 80)
    assert not fit.unrolls(fit.Device("gpu", 8, (9, 0), 73.6e9), 12)


def test_deterministic_kernels_are_asked_for_on_gpus_alone():
    always = {"xla_gpu_dot_merger_threshold_mb": 0, "xla_disable_hlo_passes": "slice-sinker,convert-mover"}
    wanted = always | {"xla_gpu_exclude_nondeterministic_ops": True}
    assert fit.compiler_options(H100, "deterministic") == wanted
    kept = {"xla_gpu_per_fusion_autotune_cache_dir": "run/autotuned"}
    assert fit.compiler_options(H100, "deterministic", "run/autotuned") == wanted | kept
    assert fit.compiler_options(H100, "fastest", "run/autotuned") == always
    assert fit.compiler_options(CPU, "deterministic") == {}


def test_less_is_kept_where_memory_is_short():
    assert fit.remat(H100, "dots", 60e9) == "products" and fit.remat(H100, "dots", 30e9) == "sums"
    assert fit.remat(H100, "full", 60e9) == "full" and fit.remat(CPU, "dots", 60e9) == "dots"


def test_a_host_gives_what_its_container_does(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(fit, "CONTAINER_LIMITS", (str(limit),))
    whole = fit.host_memory()
    assert 1e8 < whole < 1e15
    for said, share in (("max", whole), ("1000000\n", 750_000), (str(10**18), whole)):
        limit.write_text(said)
        assert fit.host_memory() == share


def test_how_much_is_computed_at_a_time():
    assert fit.head_chunk(CPU, 50257) == 512
    assert 4 * fit.head_chunk(H100, 50257) * 50257 <= fit.LOGITS_BYTES
    assert fit.head_chunk(H100, 10**7) == 256
    assert fit.groups_at_a_time(CPU, 1e9, 1e6) == 1 == fit.groups_at_a_time(H100, 70e9, 50e9)
    assert fit.groups_at_a_time(dataclasses.replace(CPU, memory=18e9), 2.5e9, 2.6e9) == 2
    assert fit.groups_at_a_time(H100, 13.6e9, 8e9) == 3  # of .4 times 60 GB
