"""Set-up shared by all tests: eight CPU devices in one process, and no network."""

import fcntl
import gc
import hashlib
import importlib.metadata
import os
import pathlib
import shutil

from quick_compiling import FLAGS

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FLAGS}")
os.environ.setdefault("NPROC", "32")  # see rag_jax.cli.threads_for
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test has compiled, no other one compiles again, nor does the next run of the suite.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache/compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Else the cache's own path is part of its keys, and a copy of it of no use.
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest  # noqa: E402 (after the environment is set)

ROOT = pathlib.Path(__file__).parent.parent
MOST_COMPILED = 2 * 10**9  # bytes
MOST_MAPS = 20_000  # of a process, after a file of tests
# Begun first, so that no worker is left alone with one of them at the end.
LONGEST = (
    "test_real_models", "test_processes", "test_loop", "test_ask", "test_mesh", "test_rag", "test_bad_input",
    "test_plan", "test_evaluation", "test_watch", "test_mining", "test_configs", "test_answering", "test_hf",
    "test_fuzz", "test_launch",
)  # fmt: skip


def pytest_sessionstart(session):
    """The cache must not grow for ever; jax itself, asked for a limit, looks at every file for each that it writes."""
    compiled = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if "PYTEST_XDIST_WORKER" not in os.environ and sum(f.stat().st_size for f in compiled.glob("*")) > MOST_COMPILED:
        shutil.rmtree(compiled)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The longest files first."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_runtest_logreport(report):
    """What failed is named at once, so that a suite that is stopped has told of it."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid} ({report.when})", flush=True)


def make_once(folder, build):
    """`build(folder)` by the first worker that comes; the others wait for it, and then nobody writes there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def real_models():
    """A folder with the pretrained `minilm` and `smollm2-135m`, made from the installed packages.

    It is kept from run to run of the suite, until the code that makes it is another.
    """
    from rag_jax import quickstart

    versions = [importlib.metadata.version(name) for name in quickstart.MODELS.values()]
    content = pathlib.Path(quickstart.__file__).read_bytes() + " ".join(versions).encode()
    return make_once(ROOT / ".cache/models" / hashlib.sha256(content).hexdigest()[:12], quickstart.make_models)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """One folder for all workers of this run of the suite."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def made_tiny_run(shared_folder):
    """A run of configs/tiny.py through the real command, its output, and the cache that it began empty with."""
    from command import SECRET, TINY, TINY_VALUES, run

    def build(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("JAX_COMPILATION_CACHE_DIR")
            patch.setenv("HF_TOKEN", SECRET)
            flags = (f"--config={TINY}", f"--workdir={folder / 'run'}")
            (folder / "printed").write_text(run(folder / "cache", "main", *flags, **TINY_VALUES), encoding="utf-8")

    return make_once(shared_folder / "tiny_run", build)


@pytest.fixture(scope="module")
def tiny_run(made_tiny_run, tmp_path_factory):
    """(workdir, what was printed, cache) of the run, copies that the tests of one module may change."""
    copy = tmp_path_factory.mktemp("tiny") / "made"
    shutil.copytree(made_tiny_run, copy)
    return copy / "run", (copy / "printed").read_text(encoding="utf-8"), copy / "cache"


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Each compiled program takes three or four memory maps; of more than 65,530 a process dies on Linux."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.is_file() and sum(1 for _ in maps.open()) > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window, driven by playwright; skipped where one of the two is missing."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        except playwright.Error as error:  # a browser that does not start is as good as none
            pytest.skip(f"{path} does not start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page of it, on which nothing may go wrong: no error on its console, no dialog, no request to another host."""
    page = browser.new_page()
    page.expected_errors, wrong = False, []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda request: None if is_near(request.url) else wrong.append(request.url))
    yield page
    page.close()
    assert page.expected_errors or not wrong, wrong


def is_near(url):
    return url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:"))
