"""Model cards: what an exported model is, what it was trained on and how, what it reached, and how it is used.

The head is what the hub reads (`huggingface_hub.ModelCardData`). No path of this machine and no row is in a card.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import huggingface_hub

from rag_jax import untrusted
from rag_jax.hf import folder as folders
from rag_jax.objectives import OBJECTIVES

# Of the head: what is carried over from the card of the model that was trained.
CARRIED = ("license", "license_name", "license_link", "language")
TASKS = {"retriever": ("sentence-similarity", "information-retrieval"), "generator": ("text-generation",) * 2}
# Metrics that a card shows, in this order, of those that were measured.
METRICS = {
    "retriever": {
        "recall@1": "Recall@1", "recall@5": "Recall@5", "recall@10": "Recall@10", "mrr@10": "MRR@10",
        "ndcg@10": "nDCG@10", "map@100": "MAP@100", "answer_hit@1": "Answer in the first passage",
        "answer_hit@10": "Answer in the first ten passages", "document_hit@1": "Right document first",
    },
    "generator": {
        "answer_nll": "NLL of answers, nats a token", "answer_nll_gold": "NLL with the right passage alone",
        "answer_nll_none": "NLL without a passage", "em": "Exact match", "f1": "F1",
    },
}  # fmt: skip
SUBFOLDER = "reading_on"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is told of a run, beside its config."""

    step: int
    counts: Mapping[str, int]  # of what it was trained on: "rows", "passages"
    before: Mapping[str, Any]  # the record of the evaluation of step 0, or {}
    after: Mapping[str, Any]  # that of this step, or {}
    parameters: int
    width: int = 0  # of embeddings
    max_len: int = 0
    pooling: str = ""
    similarity: str = "cosine"
    prefixes: tuple[str, str] = ("", "")
    is_plain: bool = True  # whether nothing but a pooling stands behind the retriever's model
    bos: bool = True  # whether the generator's passages begin with it
    reading_on: bool = False  # whether segments behind the first are tokenised by the tokenizer in SUBFOLDER


def of_run(workdir: pathlib.Path, step: int, parameters: int) -> Facts:
    """What the run's folder tells of the rows and of the evaluations."""

    def read(name: str) -> dict[str, Any]:
        path = workdir / name
        found = untrusted.read_json(path, str(path)) if path.is_file() else {}
        return found if isinstance(found, dict) else {}

    inputs = read("inputs.json")
    counts = {
        what: found[what]
        for key, what in (("data.train", "rows"), ("data.passages", "passages"))
        if isinstance(found := inputs.get(key), dict) and isinstance(found.get(what), int)
    }
    before = read("eval/step_0.json") if step else {}
    return Facts(step, counts, before, read(f"eval/step_{step}.json"), parameters)


def card(config: Any, role: str, facts: Facts, names: Mapping[str, str], *, adapter: bool = False) -> str:
    """The whole card; `names`: under which name each model is loaded. `adapter`: an adapter by itself."""
    parts = [
        f"---\n{_head(config, role, facts, adapter)}\n---\n",
        f"# {pathlib.PurePath(names[role]).name}\n",
        _opening(config, role, facts, names),
        "## Training\n",
        _training(config, role, facts),
        *(["## Evaluation\n", _evaluation(config, role, facts)] if _measured(role, facts.after) else []),
        "## Use\n",
        (_use_retriever if role == "retriever" else _use_generator)(config, facts, names, adapter),
    ]
    return "\n".join(parts)


def _head(config: Any, role: str, facts: Facts, adapter: bool) -> str:
    """YAML."""
    path, (pipeline, task) = config[role].path, TASKS[role]
    retriever = role == "retriever"
    library = "peft" if adapter else "sentence-transformers" if retriever else "transformers"
    tags = ["rag_jax", "retrieval-augmented-generation", f"loss:{config.objective.name}"]
    tags += ["sentence-transformers", "feature-extraction", "dense"] if retriever else []
    tags += ["lora"] if adapter else []
    if rows := facts.counts.get("rows"):
        tags.append(f"dataset_size:{rows}")
    known = {name: value for name, value in folders.card_facts(path).items() if name in CARRIED and _is_plain(value)}
    if folders.is_hub_name(path):
        known |= {"base_model": path, "base_model_relation": "adapter" if adapter else "finetune"}
    if (train := _hub_dataset(config.data.train)) is not None:
        known["datasets"] = [train]
    held_out = _hub_dataset(config.data.eval)
    results = [
        huggingface_hub.EvalResult(
            task_type=task, dataset_type=held_out or "unknown", dataset_name=held_out or "held-out rows",
            metric_type=name, metric_name=shown, metric_value=value,
            metric_args={"interval_95": interval} if interval else None,
        )
        for name, shown, value, interval in _measured(role, facts.after)
    ]  # fmt: skip
    model_name = f"{role} of rag_jax"
    data = huggingface_hub.ModelCardData(
        library_name=library, pipeline_tag=pipeline, tags=tags, model_name=model_name if results else None,
        eval_results=results or None, **known,
    )  # fmt: skip
    return data.to_yaml().strip()


def _opening(config: Any, role: str, facts: Facts, names: Mapping[str, str]) -> str:
    path = untrusted.code(_shown(config[role].path))
    other = "generator" if role == "retriever" else "retriever"
    beside = "" if other not in names else f" together with its {other}, `{untrusted.code(names[other])}`,"
    text = (
        f"The {role} of a pair for retrieval-augmented generation, trained from `{path}`{beside} by rag_jax. "
        f"Objective: {OBJECTIVES[config.objective.name].meaning}.\n"
    )
    rows = {"parameters": f"{facts.parameters / 1e6:,.1f} M"}
    if role == "retriever":
        rows |= {
            "embeddings": f"{facts.width} numbers, {facts.pooling} pooling, compared by {facts.similarity}",
            "reads": f"{facts.max_len} tokens at most",
            "prefixes": " and ".join(f"`{untrusted.code(prefix)}`" for prefix in facts.prefixes)
            if any(facts.prefixes)
            else "none",
        }
    else:
        data, prompt = config.data, config.prompt
        shown = " ".join(f"`{untrusted.code(text)}`" for text in (prompt.passage, prompt.query, prompt.answer))
        rows |= {
            "prompt": shown,
            "reads": f"{data.prompt_passage_len} tokens of a passage, {data.prompt_query_len} of a question, at most",
            "answers": f"{data.answer_len} tokens at most",
        }
    return f"{text}\n{_table(rows)}"


def _training(config: Any, role: str, facts: Facts) -> str:
    objective, formula = config.objective, OBJECTIVES[config.objective.name]
    seen = ", ".join(f"{number:,} {what}" for what, number in facts.counts.items()) or "not known"
    rows = {
        "steps": f"{facts.step:,}",
        "trained on": f"{seen}; none of them is quoted here",
        "objective": f"{objective.name}, {', '.join(formula.weights(objective))}",
        "candidates": f"K = {objective.candidates} passages a question",
        "batch": f"{config.batch_size} questions in groups of {config.group_size}",
        "learning rate": f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}",
        "numbers": config.dtype,
    }
    if config[role].lora.rank:
        rows["adapters"] = f"LoRA of rank {config[role].lora.rank}, on a base in {config[role].base_dtype}"
    lines = []
    if objective.contrastive_weight:
        lines.append("contrastive  -log p(right passage | q), p = softmax(cosine / temperature) over the batch")
    if formula.formula:
        lines.append(f"{objective.name:<12} {formula.formula}")
    shown = "\n".join(lines)
    return f"{_table(rows)}\nMinimised, a mean over rows or over their tokens:\n\n```text\n{shown}\n```\n"


def _evaluation(config: Any, role: str, facts: Facts) -> str:
    counts = facts.after.get("counts") or {}
    size = ", ".join(f"{counts[what]:,} {what}" for what in ("queries", "passages", "answers") if counts.get(what))
    before = {name: value for name, _, value, _ in _measured(role, facts.before)}
    head = "| |" + (" before |" if before else "") + f" step {facts.step:,} | 95 % interval |"
    lines = [head, "|---|" + "---:|" * (head.count("|") - 2)]
    for name, shown, value, interval in _measured(role, facts.after):
        untrained = f" {before[name]:.3f} |" if name in before else " |" if before else ""
        span = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        lines.append(f"| {shown} |{untrained} {value:.3f} | {span} |")
    rows = "the rows that it was trained on" if config.data.eval == config.data.train else "held-out rows"
    return f"On {rows} ({size}); intervals by the percentile bootstrap over rows.\n\n" + "\n".join(lines) + "\n"


def _measured(role: str, record: Mapping[str, Any]) -> list[tuple[str, str, float, list[float] | None]]:
    """(name, how it is shown, value, interval) of each metric of a record."""
    intervals = record.get("intervals") or {}
    return [
        (name, shown, float(value), intervals.get(f"eval/{name}"))
        for name, shown in METRICS[role].items()
        if isinstance(value := record.get(f"eval/{name}"), int | float)
    ]


def _use_retriever(config: Any, facts: Facts, names: Mapping[str, str], adapter: bool) -> str:
    name, (query, passage) = names["retriever"], facts.prefixes
    similar = "query_emb @ passage_emb.T" if facts.similarity == "dot" else "model.similarity(query_emb, passage_emb)"
    needs = " with `peft` beside it" if adapter else ""
    prefixes = ""
    if query or passage:
        prefixes = f"; send `{untrusted.code(query)}` before questions and `{untrusted.code(passage)}` before passages"
    return f"""With `sentence-transformers`{needs}, prefixes included:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({name!r})
query_emb = model.encode(["a question"], prompt_name="query")
passage_emb = model.encode(["a passage"], prompt_name="document")
scores = {similar}
```
{_with_transformers(facts, name) if not adapter else ""}
On a server of embeddings (text-embeddings-inference, not run for this card){prefixes}:

```shell
text-embeddings-router --model-id {name}
```
"""


# How states become an embedding, of the poolings that take one line.
POOLED = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "cls": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(hidden)), mask[:, :, 0].sum(1) - 1]",
}


def _with_transformers(facts: Facts, name: str) -> str:
    """The same in plain `transformers`; "" where more than a pooling stands behind the model."""
    if facts.pooling not in POOLED or not facts.is_plain:
        return ""
    normalised = "" if facts.similarity == "dot" else "\nemb = torch.nn.functional.normalize(emb)"
    return f"""
With `transformers` alone:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r}, padding_side="right")
model = AutoModel.from_pretrained({name!r})
texts = [{facts.prefixes[0]!r} + "a question", {facts.prefixes[1]!r} + "a passage"]
batch = tokenizer(texts, padding=True, truncation=True, max_length={facts.max_len}, return_tensors="pt")
with torch.no_grad():
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
emb = {POOLED[facts.pooling]}{normalised}
```
"""


def _use_generator(config: Any, facts: Facts, names: Mapping[str, str], adapter: bool) -> str:
    name, texts = names["generator"], config.prompt
    auto = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    imports = ["import torch", f"from transformers import {auto}, AutoTokenizer"]
    if adapter:
        imports[1:] = [f"from peft import {auto}", "from transformers import AutoTokenizer"]
    reading_on = "reading_on = tokenizer"
    if facts.reading_on:
        reading_on = (
            "# Without the blank that this tokenizer puts before a text: the question goes on where the passage ends.\n"
            f"reading_on = AutoTokenizer.from_pretrained({name!r}, subfolder={SUBFOLDER!r})"
        )
    begin = "[tokenizer.bos_token_id]" if facts.bos else "[]"
    pair = ""
    if "retriever" in names:
        rag = f"RAG-{OBJECTIVES[config.objective.name].likelihood.capitalize()}"
        pair = (
            f"\nThis reads one passage. {rag} mixes what several say, weighed by the retriever: `rag_jax.load` of the "
            "exported pair does that.\n"
        )
    return f"""Passage and question are tokenised apart, as in training: a passage reads the same whatever is asked.

```python
{chr(10).join(imports)}

tokenizer = AutoTokenizer.from_pretrained({name!r})
{reading_on}
model = {auto}.from_pretrained({name!r})

passage, question = "a passage", "a question"
ids = {begin}
ids += tokenizer({texts.passage!r}.format(passage=passage), add_special_tokens=False)["input_ids"]
ids += reading_on({texts.query!r}.format(query=question), add_special_tokens=False)["input_ids"]

found = model.generate(torch.tensor([ids]), max_new_tokens={config.data.answer_len}, do_sample=False)
print(tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True).strip())
```

With vLLM (not run for this card), from the same `ids`:

```python
from vllm import LLM, SamplingParams

llm = LLM({name!r})
print(llm.generate({{"prompt_token_ids": ids}}, SamplingParams(temperature=0, max_tokens={config.data.answer_len})))
```
{pair}"""


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"


def _shown(path: str) -> str:
    """A model's name without where it lies on this machine."""
    return path if folders.is_hub_name(path) else pathlib.PurePath(path).name


def _hub_dataset(source: str | None) -> str | None:
    """The data set of the hub that a config's source names; None for files of this machine."""
    if source is None or pathlib.Path(source).expanduser().exists():
        return None
    base = source.partition("@")[0].partition(":")[0].partition("[")[0]
    return base if "/" in base and folders.is_hub_name(base) and not pathlib.PurePath(base).suffix else None


def _is_plain(value: Any) -> bool:
    """Whether a value is what a card's head holds: a text or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, str) and len(one) < 200 for one in values) and len(values) < 200
