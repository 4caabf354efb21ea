"""Texts to tokens, against tokens written by hand or made by one plain call of the tokenizer."""

import numpy as np
import pytest
import tokenizers
import transformers
from data_helpers import BOS, EOS, byte_tokenizer, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from rag_jax.data import segments
from rag_jax.errors import UserError

BYTES = byte_tokenizer()
WORDS = word_tokenizer(["the", "dog", "barks", "query:"])


def prompt(**changes):
    values = dict(
        tokenizer=BYTES,
        passage="<{passage}>",
        query="\nQ: {query}\nA:",
        answer=" {answer}",
        passage_len=12,
        query_len=20,
        answer_len=8,
    )
    return segments.Prompt(**{**values, **changes})


def rows_of(ragged):
    return [ragged[i].tolist() for i in range(len(ragged))]


def sentencepiece_like(normalizer=None, pre_tokenizer=None):
    """Token of a character, whose blank is drawn; as Llama's tokenizers put one before a text."""
    pieces = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127)), "▁", "\n", "Ġ", "Ċ"]
    backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "</s>"])
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


BLANK = normalizers.Replace(" ", "▁")
WITH_A_BLANK = {
    "Llama 2": sentencepiece_like(normalizers.Sequence([normalizers.Prepend("▁"), BLANK])),
    "alone": sentencepiece_like(normalizers.Prepend("▁"), pre_tokenizers.Metaspace(prepend_scheme="never")),
    "first": sentencepiece_like(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
    "always": sentencepiece_like(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always", split=False)])
    ),
    "byte-level": sentencepiece_like(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)),
}


@pytest.mark.parametrize("kind", WITH_A_BLANK)
def test_segments_together_have_the_tokens_of_the_whole(kind):
    tokenizer = WITH_A_BLANK[kind]
    whole = "A fox.\nQ: who?\nA: the fox"
    as_one = tokenizer(whole, add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(as_one)[0] in "▁Ġ"
    own = prompt(tokenizer=tokenizer, passage="{passage}", answer_len=20)
    (prefixes, _), (queries, _) = segments.prompt_segments(own, ["A fox."], ["who?"])
    answers = segments.answer_segments(own, ["the fox"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert [*prefixes[0], *queries[0], *answers[0]] == [bos, *as_one, eos]
    assert segments.reading_on(tokenizer) is not tokenizer


def test_most_tokenizers_read_on_as_they_begin():
    assert segments.reading_on(BYTES) is BYTES and segments.reading_on(WORDS) is WORDS


def test_segments_are_the_filled_templates_with_bos_first_and_eos_last():
    (prefixes, cut), (queries, query_cut) = segments.prompt_segments(prompt(), ["pass", "é"], ["why?"])
    assert rows_of(prefixes) == [[BOS, *b"<pass>"], [BOS, *"<é>".encode()]]
    assert rows_of(queries) == [[*b"\nQ: why?\nA:"]]
    assert rows_of(segments.answer_segments(prompt(), ["so", " "])) == [[*b" so", EOS], []]
    assert not cut.any() and not query_cut.any()


def test_a_long_field_is_cut_and_the_template_around_it_stays():
    (prefixes, cut), (queries, query_cut) = segments.prompt_segments(
        prompt(), ["0123456789", "012345678"], ["a much too long query", "fits exactly"]
    )
    assert rows_of(prefixes) == [[BOS, *b"<012345678>"], [BOS, *b"<012345678>"]]
    assert cut.tolist() == [True, False]
    assert rows_of(queries) == [[*b"\nQ: a much too lo\nA:"], [*b"\nQ: fits exactly\nA:"]]
    assert query_cut.tolist() == [True, False]


def test_an_answer_is_never_cut():
    answer = "much longer than answer_len"
    assert rows_of(segments.answer_segments(prompt(), [answer])) == [[*b" ", *answer.encode(), EOS]]


@settings(max_examples=60, deadline=None)
@given(
    before=st.text("ab \n:", max_size=4),
    after=st.text("ab \n:", max_size=4),
    field=st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=30),
    room=st.integers(1, 12),
)
def test_cutting_is_that_of_bytes(before, after, field, room):
    """With one token a byte, cutting tokens of the field is cutting its bytes."""
    limit = len(before) + len(after) + room
    (ids,), _ = segments.template_tokens(BYTES, before + "{x}" + after, [field.replace("{", "")], limit, "query_len")
    assert ids == [*before.encode(), *field.replace("{", "").encode()[:room], *after.encode()]


def test_no_bos_where_the_tokenizer_has_none():
    (prefixes, _), _ = segments.prompt_segments(prompt(tokenizer=byte_tokenizer(bos=False)), ["0123456789"], [])
    assert rows_of(prefixes) == [[*b"<0123456789>"]]


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(UserError, match="generator.path=.* has no eos_token"):
        segments.answer_segments(prompt(tokenizer=byte_tokenizer(eos=False)), ["a"])


def test_a_template_that_leaves_no_room_is_refused():
    with pytest.raises(UserError, match="data.prompt_query_len leaves 7 tokens, and .* takes 7 of them: raise"):
        segments.prompt_segments(prompt(query_len=7), [], ["why?"])


def test_braces_in_templates_and_texts():
    assert segments.split_template("{{x}} {passage}!") == ("{x} ", "!")
    for template in ("no field", "{a} {b}"):
        with pytest.raises(UserError, match="exactly once"):
            segments.split_template(template)


def test_retriever_texts_have_prefix_and_special_tokens():
    ragged, cut = segments.retriever_tokens(WORDS, ["the dog", "the dog barks the dog"], "query: ", 6)
    assert rows_of(ragged) == [[1, 6, 3, 4, 2], [1, 6, 3, 4, 5, 2]]
    assert cut.tolist() == [False, True]


def test_padding_is_on_the_right_to_a_round_length():
    ragged, _ = segments.retriever_tokens(WORDS, ["dog", "the dog"], "", 32)
    ids, mask = segments.pad(ragged, np.array([1, 0]), segments.padded_length(ragged.lengths, 32))
    assert ids.tolist() == [[1, 3, 4, 2, 0, 0, 0, 0], [1, 4, 2, 0, 0, 0, 0, 0]]
    assert mask.sum(axis=1).tolist() == [4, 3] and mask.dtype == bool and ids.dtype == np.int32
    assert segments.padded_length(np.array([3, 9]), 32) == 16
    assert segments.padded_length(np.array([3, 9]), 10) == 10


def test_strings_of_the_predecessor():
    whole = segments.WholeString(WORDS, 12)
    rows = [("the", "dog", "barks"), ("the", "dog " * 8, "barks")]
    strings, start, cut = segments.string_segments(whole, rows)
    texts = [f"#query# #query# {q} #passage# #passage# {p} #answer# {a}" for q, p, a in rows]
    assert rows_of(strings) == [WORDS(text, truncation=True, max_length=12)["input_ids"] for text in texts]
    # [CLS] #query# #query# the #passage# #passage# dog #answer# [SEP] are nine tokens, and sixteen.
    assert start.tolist() == [8, 15]
    assert cut.tolist() == [False, True]


def test_bytes_of_the_predecessors_strings_begin_to_predict_at_the_tag():
    (row,), start, _ = segments.string_segments(segments.WholeString(BYTES, 500), [("q", "p", "so")])
    assert bytes(row[: start[0] + 1].tolist()).endswith(b"p #answer#")
    assert bytes(row[start[0] + 1 :].tolist()) == b" so"


def test_padding_joins_parts_and_refuses_what_does_not_fit():
    a, b = segments.Ragged.of([[1, 2], [3]]), segments.Ragged.of([[7], [], [8, 9]])
    ids, mask = segments.join_padded((a, b), (np.array([1, 0, 0]), np.array([2, 1, 0])), 4)
    assert ids.tolist() == [[3, 8, 9, 0], [1, 2, 0, 0], [1, 2, 7, 0]]
    assert mask.tolist() == [[True] * 3 + [False], [True] * 2 + [False] * 2, [True] * 3 + [False]]
    with pytest.raises(ValueError, match="3 tokens does not fit a length of 2"):
        segments.join_padded((a, b), (np.array([1]), np.array([2])), 2)
