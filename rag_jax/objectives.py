"""The objectives: a row each, which says how the generator's part of the loss is made and what it takes.

A new objective is a function in `losses` and a row here; everything else asks the row. Free of jax, because the config
is checked against this table before jax is there.
"""

import dataclasses
from typing import Any

ROLES = ("retriever", "generator")


@dataclasses.dataclass(frozen=True)
class Formula:
    """What an objective adds to the contrastive loss."""

    meaning: str  # one line, for --help and the docs
    likelihood: str  # "token" | "sequence": the p(y | q) by which answers are scored and decoded
    formula: str = ""  # what is minimised beside the contrastive loss, a mean over rows, or over tokens (T of a row)
    terms: str = ""  # the function of `losses` that gives its terms; "": no generator is trained
    # What it reads: "pairs" of query and candidate | "evidence" of them, which is not differentiated | "scores" of them
    # that rows bring, with no generator | "strings".
    reads: str = "pairs"
    divergence: str = ""  # of `losses.evidence_nats`, where it compares p(k | q) with evidence; "": it does not
    needs_scores: bool = False  # even of a single candidate
    prefixes: tuple[str, str] | None = None  # of query and passage where the config has none; None: the folder's

    def uses_generator(self, marginal_weight: float, evidence_weight: float) -> bool:
        if self.reads == "scores":
            return False
        if self.divergence:
            return marginal_weight > 0 or evidence_weight > 0
        return self.terms != "" and marginal_weight > 0

    def weights(self, objective: Any) -> list[str]:
        """The terms of the loss and their weights by a config's section `objective`, in words."""
        named = [f"contrastive weight {objective.contrastive_weight:g}"]
        if self.reads == "scores":
            named.append(f"weight of the given scores {objective.evidence_weight:g}")
        elif self.divergence:
            tokens = {"both": "question and answer"}.get(objective.evidence, objective.evidence)
            named.append(f"weight of the {tokens}'s evidence {objective.evidence_weight:g}")
        if self.reads != "scores":
            named.append(f"marginal weight {objective.marginal_weight:g}")
        if objective.document_weight:
            named.append(f"document weight {objective.document_weight:g}")
        return named

    def uses_retriever(
        self, candidates: int, contrastive_weight: float, marginal_weight: float, evidence_weight: float
    ) -> bool:
        """With one candidate, the positive, the marginal is plain answer likelihood and asks for no scores."""
        if self.reads == "scores":
            return contrastive_weight > 0 or evidence_weight > 0
        reads_scores = self.uses_generator(marginal_weight, evidence_weight) and (candidates > 1 or self.needs_scores)
        return contrastive_weight > 0 or reads_scores


OBJECTIVES = {
    "token": Formula(
        "RAG-Token: every token may come from another passage",
        "token",
        "-1/T sum_t log sum_k p(k | q) p(y_t | k, q, y_<t)",
        "marginal_terms",
    ),
    "sequence": Formula(
        "RAG-Sequence: one passage explains the whole answer",
        "sequence",
        "-1/T log sum_k p(k | q) prod_t p(y_t | k, q, y_<t)",
        "marginal_terms",
    ),
    "pdist": Formula(
        "KL(q || p), q the softmax of the evidence",
        "token",
        "KL(e || p), e(k) = softmax_k(evidence of passage k), p(k | q)",
        reads="evidence",
        divergence="pdist",
    ),
    "replug": Formula(
        "KL(p || q), q the softmax of the evidence",
        "token",
        "KL(p || e), e(k) = softmax_k(evidence of passage k), p(k | q)",
        reads="evidence",
        divergence="replug",
    ),
    "emdr2": Formula(
        "the marginal of the evidence, which teaches the retriever alone",
        "sequence",
        "-log sum_k p(k | q) exp(evidence of passage k)",
        reads="evidence",
        divergence="emdr2",
    ),
    "distill": Formula(
        "KL(q || p), q the softmax of scores that rows bring, a cross-encoder's for example",
        "token",
        "KL(e || p), e(k) = softmax_k(given score of passage k), p(k | q)",
        reads="scores",
        divergence="pdist",
    ),
    "dalm": Formula(
        "DALM's loss for comparison: not a marginal, and nothing flows from generator to retriever",
        "token",
        "-log p(string) of question, right passage and answer, less A log p(right passage | q), A tokens of the answer",
        "dalm_terms",
        reads="strings",
        needs_scores=True,
        prefixes=("#query# ", "#passage# "),
    ),
    "none": Formula("the contrastive loss alone", "token"),
}
