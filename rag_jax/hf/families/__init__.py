"""The model families: how Hugging Face's config.json and tensors become ours, one entry a model type.

An entry and, where it computes what none does yet, its module in `models` are all that a family needs. Both tables of
an entry are read in both directions.
"""

from rag_jax.hf.families import bert, gemma, gpt2, llama, modernbert
from rag_jax.hf.families.entry import Family, Rule, is_number, is_size

__all__ = ["FAMILIES", "Family", "Rule", "is_number", "is_size"]

FAMILIES: dict[str, Family] = {
    model_type: family
    for module in (bert, modernbert, gpt2, llama, gemma)
    for model_type, family in module.FAMILIES.items()
}
