"""Trained or pretrained models at work: embedding, exact search, likelihood of answers, decoding, answering.

Imports `rag`, `pair`, `models`, `data` and `distributed`; never `training`, which calls it.
"""
