"""Measurements, each a command that prints a table. Importing this quiets the libraries that they import after it."""

from rag_jax import cli

cli.prepare_environment()
