"""How many tokens batches are packed to: counted by hand, and on rows like those that people have."""

import dataclasses
import itertools

import numpy as np
import pytest
from test_batches import PROMPT, RETRIEVER, cache_folder, load  # noqa: F401 (a fixture)

from rag_jax import data
from rag_jax.data import shapes
from rag_jax.data.shapes import Blocks, Lengths, Packed, block_tokens, blocks_of


def some_rows(tmp_path, num_rows=300, first="", **changes):
    """Passages of about 4 to 60 tokens, answers of 1 to 12; the first question begins with `first`."""
    rng = np.random.default_rng(0)
    rows = [
        (f"{'' if i else first}why {i}?", f"{i} " + "dog " * int(rng.integers(1, 15)), "so " * int(rng.integers(1, 5)))
        for i in range(num_rows)
    ]
    prompt = dataclasses.replace(PROMPT, passage_len=300, answer_len=30)
    retriever = dataclasses.replace(RETRIEVER, query_len=30, passage_len=300)
    return load(tmp_path, rows, **dict(prompt=prompt, retriever=retriever) | changes)[0]


def real_tokens(batch, blocks):
    """The most that a block of groups of 4 holds, by its masks."""
    devices, b = blocks.devices, len(batch.row) // blocks.devices
    slots = batch.pool.key.shape[1]

    def most(mask, at_a_time):
        of_device, groups = mask.reshape(devices, b // 4, -1), at_a_time // 4
        return max(
            int(np.count_nonzero(of_device[device, np.minimum(np.arange(start, start + groups), b // 4 - 1)]))
            for device in range(devices)
            for start in range(0, b // 4, groups)
        )

    read = blocks.num_rows(len(batch.row))["read_rows"]
    assert batch.pool.passage_mask.shape[1] == slots
    of_retriever = {"query": batch.query_mask, "passage": batch.pool.passage_mask}
    of_generator = {"prefix": batch.pool.prefix_mask, "suffix": batch.suffix_mask, "answer": batch.answer_mask}
    return {name: most(mask, b) for name, mask in of_retriever.items()} | {
        name: most(mask, read) for name, mask in of_generator.items()
    }


def test_blocks_are_even():
    assert blocks_of(8, 8).tolist() == [list(range(8))] == blocks_of(8, 100).tolist()
    assert blocks_of(8, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 7]]
    assert blocks_of(8, 1).shape == (8, 1) == blocks_of(8, 0).shape


def test_tokens_of_blocks_are_counted_by_device_and_group():
    """Two devices of three groups of two rows, of which two are read at a time: the last block holds the last twice."""
    blocks = Blocks(2, devices=2, groups_at_a_time=2)
    of_row = 10 ** np.arange(12)[None]
    tokens = block_tokens(blocks, dict.fromkeys(("query", "passage", "prefix", "suffix", "answer"), of_row))
    assert tokens["query"].tolist() == [111111000000]
    assert tokens["prefix"].tolist() == [2 * 110000000000]
    assert blocks.num_rows(12) == {"encoded_rows": 6, "read_rows": 4}
    apart = dataclasses.replace(blocks, encodes_all=False)
    assert set(block_tokens(apart, dict.fromkeys(("prefix", "suffix", "answer"), of_row))) == {
        "prefix", "suffix", "answer",
    }  # fmt: skip


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize(("devices", "at_a_time"), [(1, 1), (1, 3), (2, 2)])
def test_no_real_token_is_left_out_and_less_padding_is_read(tmp_path, devices, at_a_time, negatives):
    examples, blocks = some_rows(tmp_path), Blocks(4, devices, at_a_time)
    made = data.buckets(examples, 24, 3, negatives, blocks)
    assert made[-1] == data.longest(examples) and made[-1].packed == Packed() and len(made) > 1
    settings = dict(batch_size=24, seed=0, start_step=0, total_steps=40)
    if negatives:
        rng = np.random.default_rng(0)
        rows = np.array([data.order(300, 24, 0)[step] for step in range(40)])
        settings |= dict(planned=rows, brought=rng.integers(-1, 300, (40, 24, negatives)).astype(np.int32))
    batching = data.Batching(made, 4, negatives, blocks=blocks)
    padded = data.Batching(data.buckets(examples, 24, 3, negatives), 4, negatives)
    shares = []
    for batch, plain in zip(
        data.iterate(examples, batching, **settings), data.iterate(examples, padded, **settings), strict=True
    ):
        assert data.lengths(batch) in made
        for name, tokens in real_tokens(batch, blocks).items():
            assert not getattr(batch.packed, name) or tokens <= getattr(batch.packed, name), name
        shares.append([data.padding_share(batch, 3), data.padding_share(plain, 3)])
    packed_share, padded_share = np.mean(shares, axis=0)
    assert packed_share < 0.6 * padded_share


def test_padding_share_of_what_is_packed(tmp_path):
    examples, blocks = some_rows(tmp_path), Blocks(2)
    longest = data.longest(examples)
    packed = Packed(query=25, passage=80, encoded_rows=4, prefix=120, suffix=45, answer=0, read_rows=2)
    shape = dataclasses.replace(longest, packed=packed)
    batch = data.collate(examples, [0, 1, 2, 3], data.Batching([shape], 2, blocks=blocks))
    assert data.lengths(batch) == shape
    sums = [batch.query_mask.sum(), batch.pool.passage_mask.sum(), batch.pool.prefix_mask.sum()]
    read = 25 + 80 + 2 * 120 + 5 * 2 * 45
    assert data.padding_share(batch, 5) == pytest.approx(1 - (sum(sums) + 5 * batch.suffix_mask.sum()) / read)


def test_a_batch_of_more_tokens_takes_the_next_shape(tmp_path):
    examples, blocks = some_rows(tmp_path), Blocks(4)
    longest = data.longest(examples)
    rows = np.arange(4)
    (needed,) = block_tokens(
        blocks, {name: of[None] for name, of in shapes.tokens_of_rows(examples, rows, examples.own_key[rows]).items()}
    )["prefix"]
    for room, taken in ((needed, 0), (needed - 1, 1)):
        of = [dataclasses.replace(longest, packed=Packed(prefix=int(room), read_rows=4)), longest]
        batch = data.collate(examples, rows, data.Batching(of, 4, blocks=blocks))
        assert data.lengths(batch) == of[taken]


def test_what_is_shared_takes_a_smaller_shape(tmp_path):
    """Of rows that mine, nobody knows beforehand how many passages their groups share."""
    examples, blocks = some_rows(tmp_path), Blocks(8)
    made = data.buckets(examples, 16, 2, 3, blocks)
    tokens = [shape.packed.passage for shape in made[:-1]]
    assert tokens == sorted(tokens) and tokens[0] < 0.5 * tokens[-1]
    batching = data.Batching(made, 8, 3, blocks=blocks)
    few = data.collate(examples, np.arange(16), batching, brought=np.zeros((16, 3), np.int32))
    assert data.lengths(few) == made[0]


def test_one_long_question_takes_no_room_of_many_passages(tmp_path):
    examples, blocks = some_rows(tmp_path, first="who barks " * 3).without_prompts(), Blocks(8)
    made = data.buckets(examples, 16, 1, 3, blocks)
    assert made[0].query == made[-1].query > 8 and made[0].packed.query == made[-2].packed.query > 0
    few = data.collate(
        examples, np.arange(16), data.Batching(made, 8, 3, blocks=blocks), brought=np.zeros((16, 3), np.int32)
    )
    assert data.lengths(few) == made[0]
    for shape, larger in itertools.pairwise(made[:-1]):
        assert shape.packed.passage < larger.packed.passage and shape.packed.query <= larger.packed.query


def test_one_candidate_is_read_behind_what_each_row_has(tmp_path):
    examples = some_rows(tmp_path)
    assert all(shape.packed.prefix == 0 for shape in data.buckets(examples, 16, 1, 0, Blocks(8)))
    assert any(shape.packed.prefix for shape in data.buckets(examples, 16, 2, 0, Blocks(8)))


def test_shapes_are_lengths_by_name():
    assert Lengths.of({"prefix": 8, "query": 3}) == Lengths(query=3, prefix=8)
