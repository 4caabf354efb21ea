"""The metrics of runs side by side, as text that is pasted: Markdown and LaTeX."""

from collections.abc import Sequence
from typing import Any

from rag_jax.report.collect import FALLING, METRICS, Run

COLUMNS = {
    "recall@1": "R@1", "recall@5": "R@5", "recall@10": "R@10", "mrr@10": "MRR@10", "ndcg@10": "nDCG@10",
    "answer_hit@1": "answer hit@1", "answer_hit@10": "answer hit@10", "document_hit@1": "document hit@1",
    "answer_nll": "NLL", "answer_nll_gold": "NLL, right passage", "answer_nll_none": "NLL, no passage", "em": "EM",
    "f1": "F1",
}  # fmt: skip


def rows(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """(metrics, [(name, values)]): the first run before training, then every run as it ended."""
    found: list[tuple[str, dict[str, Any]]] = []
    if runs[0].first is not None and runs[0].first["step"] == 0:
        found.append(("untrained", runs[0].first))
    found += [(run.name, run.last) for run in runs if run.last is not None]
    names = [name for name in METRICS if any(f"eval/{name}" in record for _, record in found)]
    return names, [(label, [record.get(f"eval/{name}") for name in names]) for label, record in found]


def best(names: Sequence[str], values: Sequence[tuple[str, Sequence[float | None]]]) -> list[set[int]]:
    """Of each metric, the places of the rows that are best; none where all are the same."""
    found = []
    for i, name in enumerate(names):
        column = {j: value for j, (_, row) in enumerate(values) if (value := row[i]) is not None}
        if len(set(column.values())) < 2:
            found.append(set())
            continue
        winner = (min if name in FALLING else max)(column.values())
        found.append({j for j, value in column.items() if value == winner})
    return found


def markdown(runs: Sequence[Run]) -> str:
    names, values = rows(runs)
    winners = best(names, values)
    lines = [
        "| | " + " | ".join(COLUMNS[name] for name in names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for j, (label, row) in enumerate(values):
        cells = [_cell(value, j in winners[i], "**") for i, value in enumerate(row)]
        lines.append(f"| {label.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def latex(runs: Sequence[Run]) -> str:
    names, values = rows(runs)
    winners = best(names, values)
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(names)}}}",
        r"\toprule",
        " & ".join(["", *(_escaped(COLUMNS[name]) for name in names)]) + r" \\",
        r"\midrule",
    ]
    for j, (label, row) in enumerate(values):
        cells = [_cell(value, False, "") for value in row]
        cells = [rf"\textbf{{{cell}}}" if j in winners[i] else cell for i, cell in enumerate(cells)]
        lines.append(" & ".join([_escaped(label), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _cell(value: float | None, is_best: bool, mark: str) -> str:
    shown = "-" if value is None else f"{value:.3f}"
    return f"{mark}{shown}{mark}" if is_best else shown


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
