"""The step of `benchmarks.on_device` as a capable PyTorch user would write it for a GPU."""

from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import on_device
from rag_jax.hf import config as configs
from rag_jax.hf import known, tiny
from rag_jax.planning.chips import peak_flops

DROPOUTS = ("attention_probs_dropout_prob", "hidden_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPERATURE = 0.05


def build(name: str, kind: Any) -> Any:
    model_type, sizes = known.KNOWN.get(name) or (name.partition(":")[2], {})
    if not sizes:
        sizes = configs.to_hf(tiny.MODELS[model_type], model_type)
        sizes.pop("model_type")
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    for rate in DROPOUTS:
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    with torch.device(DEVICE):
        return kind.from_config(config, attn_implementation="sdpa", dtype=torch.float32).train()


def loss_of(retriever: Any, generator: Any, ids: dict[str, Any], size: on_device.Size) -> Any:
    """Contrastive plus RAG-Token. Every length is filled, so no mask is given and attention is the flash kernel."""
    B, K, (_, _, Lp, query, T) = size.batch_size, size.candidates, size.lengths
    diagonal = torch.arange(B, device=DEVICE)

    def embed(name: str) -> Any:
        return torch.nn.functional.normalize(retriever(input_ids=ids[name]).last_hidden_state.float().mean(1), dim=-1)

    cosine = embed("query") @ embed("passage").T
    candidates = (cosine.detach() + 4 * torch.eye(B, device=DEVICE)).topk(K, dim=1).indices
    pairs = torch.cat([ids["prefix"][candidates.flatten()], ids["suffix"].repeat_interleave(K, 0)], dim=1)
    hidden = generator.base_model(input_ids=pairs, use_cache=False).last_hidden_state
    at = Lp + query - 1 + torch.arange(T, device=DEVICE)
    logits = generator.get_output_embeddings()(hidden[:, at]).flatten(0, 1).float()  # of answers alone
    gold = -torch.nn.functional.cross_entropy(logits, pairs[:, at + 1].flatten(), reduction="none")
    prior = torch.log_softmax(cosine.gather(1, candidates) / TEMPERATURE, dim=1)
    marginal = torch.logsumexp(prior[:, :, None] + gold.view(B, K, T), dim=1)
    scores = cosine / TEMPERATURE
    pulled = sum(torch.nn.functional.cross_entropy(s, diagonal) for s in (scores, scores.T)) / 2
    return pulled - marginal.mean()


def measure(size: on_device.Size) -> None:
    """Says seconds and memory of a step, and of decoding where the size asks for it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    models = [
        build(size.retriever, transformers.AutoModel), build(size.generator, transformers.AutoModelForCausalLM)
    ]  # fmt: skip
    batch = on_device.full_batch(size, min(model.config.vocab_size for model in models))
    arrays = batch._asdict() | {name: array[:, 0] for name, array in batch.pool._asdict().items() if array is not None}
    ids = {
        name: torch.as_tensor(arrays[f"{name}_ids"].astype(np.int64), device=DEVICE)
        for name in ("query", "passage", "prefix", "suffix")
    }
    parameters = [p for model in models for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.01, fused=DEVICE == "cuda")

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            value = loss_of(*models, ids, size)
        value.backward()
        for model in models:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.item()

    note = ""
    try:
        step()
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        models[1].gradient_checkpointing_enable()
        note = "gradient checkpointing"
        step()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, needed = on_device.timed(step, 4.0, warm=1, most=8), on_device.needed_flops(size, sources(size))
    peak = peak_flops(torch.cuda.get_device_name()) if DEVICE == "cuda" else None
    on_device.say(
        kind="step", side="torch", name=size.name, B=size.batch_size, K=size.candidates, seconds=seconds,
        queries_s=size.batch_size / seconds, mfu=needed / seconds / peak if peak else 0.0, note=note,
        memory_gb=torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0,
    )  # fmt: skip
    if size.decoded[0]:
        with on_device.attempt("decode torch", size.name), torch.inference_mode():
            decode(models[1], ids, size)


def sources(size: on_device.Size) -> Any:
    from rag_jax import hf

    names = {"retriever": size.retriever, "generator": size.generator}
    return {role: hf.open_config(name, f"{role}.path", role) for role, name in names.items()}


def decode(generator: Any, ids: dict[str, Any], size: on_device.Size) -> None:
    """The K streams of each query one by one: a user of `generate` mixes nothing."""
    (B, T), K, query = size.decoded, size.candidates, size.lengths[3]
    generator.eval().to(torch.bfloat16)
    prompts = torch.cat([ids["prefix"], ids["suffix"][:, :query]], 1).repeat(K, 1)[: B * K]
    generator.generation_config.eos_token_id = None
    told = dict(do_sample=False, pad_token_id=0, max_new_tokens=T, attention_mask=torch.ones_like(prompts))
    seconds = on_device.timed(lambda: generator.generate(prompts, **told).cpu(), 3.0, warm=1, most=3)
    on_device.say_decoded("torch", size, B, seconds)
