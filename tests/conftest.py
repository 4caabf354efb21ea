"""Set-up shared by all tests: eight CPU devices in one process, and no network."""

import os

# Most of the suite's time is compilation; what is compiled here runs for milliseconds.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("NPROC", "32")  # see rag_jax.cli.threads_for
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest  # noqa: E402 (after the environment is set)


@pytest.fixture(scope="session")
def real_models(tmp_path_factory):
    """A folder with the pretrained `minilm` and `smollm2-135m`, made from the installed packages."""
    from rag_jax import quickstart

    return quickstart.make_models(tmp_path_factory.mktemp("models"))
