"""What a run leaves behind and finds again: checkpoints and their checksums, the lock, the provenance of its inputs.

Imports `distributed`, `data` and the small modules above it; never `training`, which calls it.
"""
