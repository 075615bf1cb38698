"""Byte-fallback tokenizers: what llama.cpp would read otherwise is refused, what it reads alike is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hotloop_core.errors import UnsupportedError
from hotloop_gguf.tokenizer import Tokenizer as Written
from tokenizers import Tokenizer, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

TEXT = ["it is 12345 times 1234, and the 345 others are 12 the same", "Hello, world: x86_64!"]
MARK = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
NFKC = normalizers.Sequence([normalizers.NFKC(), MARK])


def trained(normalizer: Any = MARK, pre_tokenizer: Any = None, extra: tuple[str, ...] = ()) -> Any:
    """A BPE with byte fallback trained on TEXT; the pre-tokenizer is there only when it is used."""
    draft = Tokenizer(models.BPE())
    draft.normalizer = MARK
    draft.train_from_iterator(TEXT * 3, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(draft.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"], *extra]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(pair) for pair in learned["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    return made


def keys(made: Any) -> dict[str, Any]:
    read = Written(json.loads(made.to_str()), {})
    tokenize = lambda text: made.encode(text, add_special_tokens=False).ids  # noqa: E731
    return read.metadata(made.get_vocab_size(), tokenize, None)


@pytest.mark.parametrize(
    "made",
    [
        trained(),
        trained(normalizers.Replace(" ", "▁")),
        trained(normalizers.Replace(" ", "▁"), pre.Split(" ", "merged_with_previous")),
        trained(None, pre.Metaspace(prepend_scheme="first", split=False)),
    ],
    ids=["llama-2", "gemma", "gemma-split", "mistral"],
)
def test_what_llama_cpp_reads_alike_is_written(made: Any) -> None:
    assert keys(made)["tokenizer.ggml.model"] == "llama"


@pytest.mark.parametrize(
    "made",
    [
        trained(MARK, pre.Digits(individual_digits=True)),
        trained(MARK, pre.Punctuation()),
        trained(NFKC),
        trained(normalizers.Sequence([normalizers.Lowercase(), MARK])),
        trained(None),
        trained(extra=("zq",)),
    ],
    ids=["digits", "punctuation", "nfkc", "lowercase", "no-mark", "a-token-no-pair-makes"],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(made: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"where llama\.cpp would find.*Export as safetens"):
        keys(made)


def test_a_token_that_no_pair_makes_comes_last() -> None:
    made = trained(extra=("zqj",))
    scores = keys(made)["tokenizer.ggml.scores"]
    ids = made.get_vocab()
    merges = json.loads(made.to_str())["model"]["merges"]
    assert scores[ids["zqj"]] == -len(merges) < min(scores[ids["".join(m)]] for m in merges)


def test_the_first_difference_is_shown() -> None:
    with pytest.raises(UnsupportedError) as error:
        keys(trained(MARK, pre.Digits(individual_digits=True)))
    text = str(error.value)
    assert "the tokenizer finds" in text and len(text) < 700
