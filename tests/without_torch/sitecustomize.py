"""Processes with this folder on their path find no PyTorch: rag_jax does without, and importing it takes seconds."""

import sys

sys.modules["torch"] = None
