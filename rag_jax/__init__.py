"""End-to-end training of retrieval-augmented generation in JAX."""

__version__ = "0.1.0"
