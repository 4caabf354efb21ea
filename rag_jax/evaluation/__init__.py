"""Evaluation on held-out rows: the rows and the corpus, the metrics, and the record that is kept of them.

Imports `inference` and what that may import; never `training`, which calls it.
"""
