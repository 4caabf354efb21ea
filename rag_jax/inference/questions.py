"""Questions with answers that a generator writes from passages, and which of them hold.

What holds goes round: the retriever finds the passage again by the question, and the generator finds the answer more
likely behind the passage than behind none (round-trip consistency; Alberti et al., 2019; Dai et al., 2023).

**P** passages and **B** = P N rows of a block: N questions of each passage, which is read once for all of them.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rag_jax import data, files
from rag_jax.data import segments
from rag_jax.distributed import fingerprint, sharding
from rag_jax.documents import copies
from rag_jax.errors import UserError
from rag_jax.inference import answering, decoding, evidence, programs, search
from rag_jax.inference.trained import Trained
from rag_jax.progress import Counter

INSTRUCTION = """Read this text:

{passage}

Ask a question that this text answers, as somebody would who has not read it. Then give the answer in a few words, in \
the form
Question: ...
Answer: ..."""
# Words that questions begin with: each passage's first question with another one, in turn.
OPENINGS = ("What", "Why", "Who", "How", "Where", "When")
FORM = re.compile(r"(?:question\s*:)?\s*(?P<question>[^\n]+?\?)\s*(?:short\s+)?answer\s*:\s*(?P<answer>[^\n]+)", re.I)
# Blocks of passages that are written down together; in a block are as many questions as `eval.batch_size`.
BLOCKS = 4
# Tokens of an opening word, and of question and answer together.
OPENING_LEN, WRITTEN_LEN = 16, 64
FEWEST_WORDS = 4


@dataclasses.dataclass(frozen=True)
class Writing:
    """How questions are asked for."""

    num: int  # N, of a passage
    instruction: str = INSTRUCTION  # with {passage}
    openings: tuple[str, ...] = OPENINGS  # with which the generator is made to begin; ("",): as it likes
    temperature: float = 0.7  # 0: the likeliest
    top_p: float = 0.9
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Question:
    """One that was written, and what became of it."""

    passage: int  # which of the passages it was written from
    opening: str
    question: str = ""
    answer: str = ""
    rank: int = 0  # of its passage for the retriever, 1: the nearest; 0: not among those that were looked at
    gain: float = 0.0  # nats a token by which the answer is likelier behind the passage than behind none
    dropped: str = ""  # why; "": it is kept


def write(trained: Trained, passages: Sequence[str], writing: Writing, folder: pathlib.Path) -> list[Question]:
    """N questions of each passage, in their order, those without the form of one among them.

    A passage's questions are a function of the seed, its text and its place. What is written is kept in `folder`, so
    that it may be stopped.
    """
    prompt, params = writing_prompt(trained, writing), trained.params
    shards = programs.placement(params, "generator").shards
    at_a_time = -(-max(trained.opened.config.eval.batch_size // writing.num, 1) // shards) * shards
    about = [dataclasses.asdict(writing), fingerprint.of_params(params["generator"]), prompt.passage, prompt.query]
    found: list[Question] = []
    with Counter("questions", len(passages) * writing.num) as counter:
        for start in range(0, len(passages), at_a_time * BLOCKS):
            part = list(passages[start : start + at_a_time * BLOCKS])
            path = folder / f"questions-{files.content_key(about, start, part)[:24]}.jsonl"
            if not path.is_file():
                texts = [
                    text
                    for i in range(0, len(part), at_a_time)
                    for text in _written(trained, prompt, part[i : i + at_a_time], start + i, at_a_time, writing)
                ]
                files.write_whole(path, "".join(json.dumps(text) + "\n" for text in texts), errors="replace")
            texts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found += [parsed(start + i // writing.num, *text) for i, text in enumerate(texts)]
            counter.update(len(texts))
    return found


def writing_prompt(trained: Trained, writing: Writing) -> data.Prompt:
    """`[template][passage]` and `[instruction][template][opening]`: the tokenizer's chat template, if it has one."""
    own = trained.opened.prompt
    if own is None:
        raise UserError("generator.path=None: a generator writes the questions; give one")
    tokenizer, marks = own.tokenizer, ("\x00passage\x00", "\x00opening\x00")
    if writing.instruction.count("{passage}") != 1:
        raise UserError("the instruction must hold {passage} once, where the passage is to stand")
    asked = writing.instruction.replace("{passage}", marks[0])
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": asked}]
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        asked = asked.removeprefix(tokenizer.bos_token or "")  # it is put before every prompt
    else:
        asked += "\n\n"
    before, found, after = asked.partition(marks[0])
    if not found:
        raise UserError(
            f"generator.path={trained.opened.config.generator.path!r}: its chat template changes what it is given"
        )
    # An opening word and what stands before it are one text: "Question: Who".
    ending = f"Question: {marks[1]}" if any(writing.openings) else marks[1]
    query = _literal(after + ending).replace(marks[1], "{query}")
    num_before, num_after = (len(tokenizer.encode(text, add_special_tokens=False)) for text in (before, after + ending))
    lengths = own.passage_len + num_before, num_after + OPENING_LEN
    config, path = trained.opened.sources["generator"].model_config, trained.opened.config.generator.path
    if sum(lengths) + WRITTEN_LEN > config.max_positions:
        raise UserError(
            f"data.prompt_passage_len={own.passage_len}: with an instruction of {num_before + num_after} tokens and "
            f"{WRITTEN_LEN} to write, more than the {config.max_positions} positions that generator.path={path!r} has; "
            "lower it"
        )
    return data.Prompt(tokenizer, f"{_literal(before)}{{passage}}", query, own.answer, *lengths, 0)


def _literal(text: str) -> str:
    """As a template that stands for itself."""
    return text.replace("{", "{{").replace("}", "}}")


def _written(
    trained: Trained,
    prompt: data.Prompt,
    passages: list[str],
    first: int,
    at_a_time: int,
    writing: Writing,
) -> list[tuple[str, str]]:
    """Of each question its opening and the text from there on, N a passage; `first`: the number of the first one."""
    N, num, shards = writing.num, len(passages), programs.placement(trained.params, "generator").shards
    tokenizer, eos_id = prompt.tokenizer, segments.eos_id(prompt.tokenizer)
    # As special tokens' names are read in a template, they must not be in what anybody may have written.
    clean = [_without_special(tokenizer, text) for text in passages]
    (prefixes, _), (queries, _) = data.prompt_segments(prompt, clean, writing.openings)
    opening = (first + np.arange(at_a_time)[:, None] + np.arange(N)) % len(writing.openings)
    names = [f"{n} {passages[i % num]}" for i in range(at_a_time) for n in range(N)]
    prefix_len = search.size_for(int(prefixes.lengths.max()), prompt.passage_len)
    ids = decoding.answer_ids(
        trained.opened.model,
        trained.params,
        segments.pad(prefixes, np.arange(at_a_time) % num, prefix_len),
        segments.pad(queries, opening.ravel(), segments.round_up(int(queries.lengths.max()))),
        np.repeat(np.arange(at_a_time, dtype=np.int32) % (at_a_time // shards), N)[:, None],  # of a device's own
        np.zeros((at_a_time * N, 1), np.float32),
        num_tokens=WRITTEN_LEN,
        eos_id=eos_id,
        sampling=decoding.Sampling(
            answering.question_keys(writing.seed, names), temperature=writing.temperature, top_p=writing.top_p
        ),
    )
    texts = [decoding.text(tokenizer, row) for row in sharding.to_host(ids)[: num * N]]
    openings = [writing.openings[i] for i in opening.ravel()[: num * N]]
    return [(begun, f"{begun} {text}".strip()) for begun, text in zip(openings, texts, strict=True)]


def _without_special(tokenizer: Any, text: str) -> str:
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, " ")
    return text


def parsed(passage: int, opening: str, text: str) -> Question:
    """The question and the answer of a text; without both of them it is dropped."""
    form = FORM.match(text)
    if form is None:
        return Question(passage, opening, text, dropped="not of the form")
    question, answer = (" ".join(form[part].split()) for part in ("question", "answer"))
    answer = re.sub(r"^(?:short\s+)?answer\s*:\s*", "", answer, flags=re.I)  # said twice
    says_something = re.search(r"\w", answer) and not re.search(r"[?\[\]]", answer)  # not "...", "[the answer]"
    dropped = "" if len(question.split()) >= FEWEST_WORDS and says_something else "not of the form"
    return Question(passage, opening, question, answer, dropped=dropped)


def checked(
    trained: Trained, passages: Sequence[str], written: Sequence[Question], found_within: int
) -> list[Question]:
    """The same questions with rank and gain, and why those that do not hold are dropped."""
    every = list(written)
    asked = [i for i, one in enumerate(every) if not one.dropped]
    for i, why in zip(asked, _unfit(trained, [every[i] for i in asked]), strict=True):
        every[i] = dataclasses.replace(every[i], dropped=why)
    asked = [i for i in asked if not every[i].dropped]
    if not asked:
        return every
    own = np.array([every[i].passage for i in asked])
    trained.use(passages)
    own_texts = [passages[every[i].passage] for i in asked]
    ranks = _ranks(trained, own_texts, [every[i].question for i in asked], found_within)
    gains = _gains(trained, passages, [every[i] for i in asked], own)
    for i, rank, gain in zip(asked, ranks.tolist(), gains.tolist(), strict=True):
        why = "" if rank else f"whose passage is not among the {found_within} nearest"
        why = why or ("" if gain > 0 else "whose answer is no likelier behind the passage than behind none")
        every[i] = dataclasses.replace(every[i], rank=rank, gain=gain, dropped=why)
    return every


def _unfit(trained: Trained, asked: Sequence[Question]) -> list[str]:
    """Why questions are dropped before the models look at them, "": they are not."""
    prompt = trained.opened.prompt
    assert prompt is not None
    if not asked:
        return []
    is_first = copies.firsts(
        np.stack([copies.signature(one.question) for one in asked]),
        b"".join(copies.digest(one.question) for one in asked),
    )
    lengths = data.answer_segments(prompt, [one.answer for one in asked]).lengths
    return [
        "nearly an earlier one" if not first else "with too long an answer" if length > prompt.answer_len else ""
        for first, length in zip(is_first, lengths, strict=True)
    ]


def _ranks(trained: Trained, own: Sequence[str], questions: Sequence[str], most: int) -> Int[np.ndarray, " n"]:
    """Where each question's own passage stands among the nearest ones, from 1; 0: not among the first `most`."""
    found = trained.retrieve(questions, min(most, len(trained.passages)))
    nearest = [[one.passage for one in each] for each in found]
    ranks = [texts.index(text) + 1 if text in texts else 0 for text, texts in zip(own, nearest, strict=True)]
    return np.array(ranks, np.int64)


def _gains(
    trained: Trained, passages: Sequence[str], asked: Sequence[Question], own: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Nats a token by which each answer is likelier behind its own passage than behind none."""
    prompt, opened = trained.opened.prompt, trained.opened
    assert prompt is not None
    used, place = np.unique(own, return_inverse=True)
    texts = [*(passages[i] for i in used), ""]
    (prefixes, _), (queries, _) = data.prompt_segments(prompt, texts, [one.question for one in asked])
    answers = data.answer_segments(prompt, [one.answer for one in asked])
    rows = np.arange(len(asked))
    with Counter("likelihood of answers", 2 * len(asked)) as counter:
        sums = evidence.part_sums(
            opened.model,
            trained.params,
            (prefixes, queries, answers),
            np.tile(rows, 2),
            np.concatenate([place, np.full(len(asked), len(used))]),
            ("answer",),
            opened.config.eval.batch_size * 4,
            counter,
        )
    behind, without = np.split(sums[:, evidence.PARTS.index("answer")], 2)
    return (behind - without) / answers.lengths
