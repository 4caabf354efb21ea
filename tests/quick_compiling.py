"""Flags with which XLA compiles fast what runs for milliseconds: most of the suite's time is compilation."""

import importlib.metadata

# Without its newer emitters jaxlib 0.10 takes 30 % less; other versions may not know that flag, and end over it.
_EMITTERS = " --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""
FLAGS = f"--xla_backend_optimization_level=0{_EMITTERS}"
