"""The report of runs: one HTML page that opens from disk, and the tables that people paste.

Reads what a workdir holds and nothing else. May import what reads and writes files; no jax, no models.
"""
