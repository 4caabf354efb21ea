"""The same training step as a capable PyTorch user would write it: transformers models, full sequences, full logits."""

import numpy as np
import torch
import transformers


class Models(torch.nn.Module):
    def __init__(self, retriever: str, generator: str):
        super().__init__()
        self.retriever = transformers.AutoModel.from_pretrained(retriever, dtype=torch.float32)
        self.generator = transformers.AutoModelForCausalLM.from_pretrained(generator, dtype=torch.float32)


def embed(model, ids, mask):
    hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=-1)


def contrastive(scores):
    """Symmetric, positives on the diagonal."""
    diagonal = torch.arange(len(scores))
    return sum(torch.nn.functional.cross_entropy(s, diagonal) for s in (scores, scores.T)) / 2


def token_loss(models, batch, objective):
    """Contrastive plus RAG-Token over the K best passages of the batch, one full sequence a (query, candidate)."""
    cosine = embed(models.retriever, batch["query_ids"], batch["query_mask"]) @ (
        embed(models.retriever, batch["passage_ids"], batch["passage_mask"]).T
    )
    B, K = len(cosine), objective["candidates"]
    order = cosine.detach() + 4 * torch.eye(B)  # the own passage first
    candidates = order.topk(K, dim=1).indices
    prefix_len = batch["prefix_mask"].sum(1)
    suffix_len = batch["suffix_mask"].sum(1)
    sequences = [
        torch.cat([batch["prefix_ids"][k][: prefix_len[k]], batch["suffix_ids"][i][: suffix_len[i]]])
        for i in range(B)
        for k in candidates[i]
    ]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    log_probs = torch.log_softmax(models.generator(input_ids=ids, attention_mask=mask.long()).logits, dim=-1)
    start = prefix_len[candidates] + batch["answer_start"][:, None]  # (B, K)
    T = batch["answer_mask"].shape[1]
    position = (start[:, :, None] + torch.arange(T)).clamp(max=ids.shape[1] - 1)  # (B, K, T)
    flat = position.view(B * K, T)
    gold = log_probs[torch.arange(B * K)[:, None], flat - 1, ids.gather(1, flat)].view(B, K, T)
    prior = torch.log_softmax(cosine.gather(1, candidates) / objective["marginal_temperature"], dim=1)
    marginal = torch.logsumexp(prior[:, :, None] + gold, dim=1)
    nll = -(marginal * batch["answer_mask"]).sum() / batch["answer_mask"].sum()
    return objective["contrastive_weight"] * contrastive(cosine / objective["temperature"]) + nll


def dalm_loss(models, batch, objective):
    """The predecessor's step: contrastive, and whole strings' likelihood with the pair's log-probability on answers.

    In its order of operations, which keeps three arrays of (tokens, vocabulary): the log-probabilities, each row's own
    with the pair's added from the answer on, and all rows' again, of which the strings' are taken at the end.
    """
    cosine = embed(models.retriever, batch["query_ids"], batch["query_mask"]) @ (
        embed(models.retriever, batch["passage_ids"], batch["passage_mask"]).T
    )
    ids, mask = batch["string_ids"], batch["string_mask"]
    log_probs = torch.log_softmax(models.generator(input_ids=ids, attention_mask=mask.long()).logits[:, :-1], dim=2)
    own = torch.log_softmax(100 * cosine, dim=1).diagonal()
    rows = []
    for row, start, pair in zip(log_probs, batch["string_answer_start"], own, strict=True):
        rows.append(torch.cat([row[:start], row[start:] + pair]))
    gold = torch.stack(rows).gather(2, ids[:, 1:, None])[:, :, 0]
    scored = mask[:, 1:]
    nll = -(gold * scored).sum() / scored.sum()
    return objective["contrastive_weight"] * contrastive(cosine / objective["temperature"]) + nll


LOSSES = {"token": token_loss, "dalm": dalm_loss}


def tensors(batch):
    """Torch tensors of one of our batches, whose rows have a passage each that no other row of a group has."""
    kinds = {np.dtype(np.int32): torch.int64, np.dtype(bool): torch.bool}
    assert (batch.pool.key >= 0).all() and batch.pool.key.shape[1] == 1
    arrays = batch._asdict() | {name: array[:, 0] for name, array in batch.pool._asdict().items() if array is not None}
    return {
        name: torch.as_tensor(value).to(kinds[value.dtype])
        for name, value in arrays.items()
        if value is not None and name != "pool"
    }
