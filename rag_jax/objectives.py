"""The objectives: a row each, which says how the generator's part of the loss is made and what it takes.

A new objective is a function in `losses` and a row here; everything else asks the row. Free of jax, because the config
is checked against this table before jax is there.
"""

import dataclasses

ROLES = ("retriever", "generator")


@dataclasses.dataclass(frozen=True)
class Formula:
    """What an objective adds to the contrastive loss."""

    meaning: str  # one line, for --help and the docs
    likelihood: str  # "token" | "sequence": the p(y | q) by which answers are scored and decoded
    terms: str = ""  # the function of `losses` that gives its terms; "": no generator is trained
    reads: str = "pairs"  # what of a batch its generator reads: "pairs" of query and candidate | "strings"
    needs_scores: bool = False  # even of a single candidate
    prefixes: tuple[str, str] | None = None  # of query and passage where the config has none; None: the folder's

    def uses_generator(self, marginal_weight: float) -> bool:
        return self.terms != "" and marginal_weight > 0

    def uses_retriever(self, candidates: int, contrastive_weight: float, marginal_weight: float) -> bool:
        """With one candidate, the positive, the marginal is plain answer likelihood and asks for no scores."""
        reads_scores = self.uses_generator(marginal_weight) and (candidates > 1 or self.needs_scores)
        return contrastive_weight > 0 or reads_scores


OBJECTIVES = {
    "token": Formula("RAG-Token: every token may come from another passage", "token", "marginal_terms"),
    "sequence": Formula("RAG-Sequence: one passage explains the whole answer", "sequence", "marginal_terms"),
    "dalm": Formula(
        "DALM's loss for comparison: not a marginal, and nothing flows from generator to retriever",
        "token",
        "dalm_terms",
        reads="strings",
        needs_scores=True,
        prefixes=("#query# ", "#passage# "),
    ),
    "none": Formula("the contrastive loss alone", "token"),
}
