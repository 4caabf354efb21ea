"""Small tokenizers whose output can be written by hand, for the tests of data."""

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

BOS, EOS = 256, 257


def byte_tokenizer(*, bos: bool = True, eos: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Token b is the byte b; 256 and 257 are <bos> and <eos>; as with GPT-2, a plain call adds neither."""
    pieces = {chr(point): byte for byte, point in enumerate(_byte_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=pieces, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    names = {"bos_token": "<bos>"} if bos else {}
    names |= {"eos_token": "<eos>"} if eos else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def word_tokenizer(words: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Token 3 + i is the i-th word; 0 is [UNK], and a plain call puts [CLS] = 1 and [SEP] = 2 around."""
    vocab = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *words])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]")


def _byte_alphabet() -> list[int]:
    """The code point that stands for each byte: itself if it prints, else the next one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [byte if byte in printable else next(others) for byte in range(256)]
