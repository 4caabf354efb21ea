"""Set-up shared by all tests: eight CPU devices in one process, and no network."""

import os
import pathlib

# Most of the suite's time is compilation; what is compiled here runs for milliseconds.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("NPROC", "32")  # see rag_jax.cli.threads_for
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test has compiled, no other one compiles again, nor does the next run of the suite.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache/compiled"))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(10**9))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest  # noqa: E402 (after the environment is set)

# Begun first, so that no worker is left alone with one of them at the end.
LONGEST = (
    "test_soak", "test_real_models", "test_train", "test_plan", "test_rag", "test_ask", "test_mesh", "test_processes",
    "test_answering", "test_evaluate",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def real_models(tmp_path_factory):
    """A folder with the pretrained `minilm` and `smollm2-135m`, made from the installed packages."""
    from rag_jax import quickstart

    return quickstart.make_models(tmp_path_factory.mktemp("models"))
