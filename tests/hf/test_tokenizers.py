"""Tokenizers of the kinds that families bring, with their models: special tokens, pads, positions, embeddings."""

import numpy as np
import pytest
import transformers
from command import TINY

from rag_jax import config, pair
from rag_jax.data import segments
from rag_jax.inference.trained import Trained

TEXTS = ["who ran", "the old dog ran away from the old dog today", "x", "who  owns\tthe <s> dog?"]
WORDS = ["who", "ran", "the", "old", "dog", "away", "from", "to", "day", "owns", "?"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 66,
}  # fmt: skip


def unigram():
    letters = [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz?<>/"]
    vocabulary = [(token, 0.0) for token in SPECIAL] + [("▁", -3.0), *((f"▁{word}", -2.0) for word in WORDS), *letters]
    return transformers.XLMRobertaTokenizer(vocab=[*vocabulary, ("<mask>", 0.0)])


def word_pieces():
    pieces = [*SPECIAL[:3], "[UNK]", *WORDS, *(f"##{word}" for word in WORDS), "x", "<mask>"]
    return transformers.MPNetTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def byte_level(kind=transformers.RobertaTokenizer):
    alphabet = sorted(set("".join(TEXTS).replace(" ", "Ġ").replace("\t", "ĉ")))
    pieces = [*SPECIAL, *alphabet, "th", "the", "Ġth", "Ġthe", "<mask>"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "th"), ("Ġth", "e")]
    return kind(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


def sentence_piece_bpe():
    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "▁",
        *sorted(set("".join(TEXTS)) - {" "}),
        "th",
        "the",
        "▁the",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    return transformers.GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


KINDS = {
    "xlm-roberta": (unigram, {"pad_token_id": 1}),
    "roberta": (byte_level, {"pad_token_id": 1}),
    "mpnet": (word_pieces, {"pad_token_id": 1}),
    "gemma3_text": (
        sentence_piece_bpe,
        {"head_dim": 8, "num_key_value_heads": 1, "pad_token_id": 0, "use_bidirectional_attention": True,
         "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_texts_become_what_transformers_makes_of_them(kind, tmp_path, monkeypatch):
    """Tokens of each text, and embeddings of a batch that is padded with the family's own pad."""
    torch = pytest.importorskip("torch")
    make, values = KINDS[kind]
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "model")
    settings = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SIZES | values)
    torch.manual_seed(1)
    theirs = transformers.AutoModel.from_config(settings, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "model")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))
    loaded = config.load(TINY, {
        "retriever.path": str(tmp_path / "model"), "generator.path": None, "objective.name": "none",
        "retriever.pooling": "mean", "retriever.query_prefix": "", "data.query_len": 64,
    })  # fmt: skip
    opened = pair.open_pair(loaded)
    text = opened.retriever_text
    assert text is not None
    ours, _ = segments.retriever_tokens(text.tokenizer, TEXTS, "", 64)
    batch = again(TEXTS, padding=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) > 2, "some texts are padded"
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        assert ours[row].tolist() == ids[mask.bool()].tolist()
    if kind != "gemma3_text":
        assert (ours[0][0], ours[0][-1]) == (again.bos_token_id, again.eos_token_id)
    with torch.no_grad():
        hidden = theirs(**{name: batch[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    found = Trained(opened, pair.pretrained_params(opened), 0).embed_queries(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
