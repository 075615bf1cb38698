from __future__ import annotations

import re
from typing import Any

import pytest
from hotloop_core.errors import CheckpointError, ExportError, UnsupportedError
from hotloop_gguf import pretokenizers
from hotloop_gguf.tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, Tokenizer
from tokenizers import Regex, pre_tokenizers

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def hugging_face(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = (
    CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%(c)s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%(c)s"
    r"|%(n)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED = {
    "llama-bpe": hugging_face(WORDS % r"\p{N}{1,3}"),
    "qwen2": hugging_face(WORDS % r"\p{N}"),
    "tekken": hugging_face(CASED % {"c": "", "n": r"\p{N}"}),
    "gpt-4o": hugging_face(CASED % {"c": CONTRACTION + "?", "n": r"\p{N}{1,3}"}),
}
"""What the tokenizer.json of these models holds."""


def compiled(name: str, text: str) -> list[re.Pattern[str]]:
    candidate = next(c for c in pretokenizers.CANDIDATES if c.name == name)
    return pretokenizers._compiled(candidate.patterns, "".join(sorted(set(text))))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_candidate_splits_as_the_published_tokenizer_does(name: str) -> None:
    for text in (*pretokenizers.PROBES, *pretokenizers.triples()):
        expected = [piece for piece, _ in PUBLISHED[name].pre_tokenize_str(text)]
        assert pretokenizers.split(compiled(name, text), text) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_candidate_takes_for_white_space_what_the_published_tokenizer_does(name: str) -> None:
    for number in (*range(1, 33), 0x85, 0xA0, 0x180E, 0x200B, 0x2028, 0x3000, 0xFEFF):
        text = "a{0}!{0}{0}b {0}1".format(chr(number))
        expected = [piece for piece, _ in PUBLISHED[name].pre_tokenize_str(text)]
        assert pretokenizers.split(compiled(name, text), text) == expected, hex(number)


def test_the_probes_tell_every_two_candidates_apart_that_split_differently() -> None:
    texts = (*pretokenizers.PROBES, *pretokenizers.triples())
    splits: dict[tuple[Any, ...], str] = {}
    for candidate in pretokenizers.CANDIDATES:
        pieces = [pretokenizers.split(compiled(candidate.name, text), text) for text in texts]
        key = (str(pieces), candidate.ignore_merges)
        assert key not in splits, (splits.get(key), candidate.name)
        splits[key] = candidate.name


def byte_level_vocabulary(*tokens: str) -> dict[str, int]:
    alphabet = pretokenizers.byte_characters().values()
    return {token: i for i, token in enumerate([*alphabet, *tokens])}


def find(vocabulary: dict[str, int], merges: list[tuple[str, str]], tokenize: Any) -> str:
    return pretokenizers.find(vocabulary, merges, tokenize, ordinary=vocabulary, added={})


def tokenizer_of(name: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """A tokenizer that splits as the candidate `name`."""
    candidate = next(c for c in pretokenizers.CANDIDATES if c.name == name)
    bpe = pretokenizers._Bpe(vocabulary, merges)
    return lambda text: bpe.encode(
        pretokenizers.split(compiled(name, text), text), candidate.ignore_merges
    )


@pytest.mark.parametrize("name", [c.name for c in pretokenizers.CANDIDATES])
def test_a_found_pre_tokenizer_gives_the_tokenizers_ids(name: str) -> None:
    merges = [("1", "2"), ("12", "3"), ("Ġ", "Ġ"), ("Ġ", "a"), ("!", "!"), ("'", "s"), ("Ċ", "Ċ")]
    vocabulary = byte_level_vocabulary(*(left + right for left, right in merges), "abc")
    tokenize = tokenizer_of(name, vocabulary, merges)
    found = tokenizer_of(find(vocabulary, merges, tokenize), vocabulary, merges)
    for text in ("12 123 1234", "a  b!!\n\n", "it's abc\r\n", "  12", "!!'s"):
        assert found(text) == tokenize(text)


def test_a_token_that_no_merge_reaches_decides_whether_merges_are_skipped() -> None:
    vocabulary = byte_level_vocabulary("world")
    skipping = {c.name: c.ignore_merges for c in pretokenizers.CANDIDATES}
    for name in ("llama-bpe", "smaug-bpe"):
        found = find(vocabulary, [], tokenizer_of(name, vocabulary, []))
        assert skipping[found] == skipping[name]


def test_added_tokens_in_a_probe_do_not_hide_the_pre_tokenizer() -> None:
    merges = [("1", "2"), ("!", "a")]
    vocabulary = byte_level_vocabulary("12", "!a")
    plain = tokenizer_of("qwen2", vocabulary, merges)
    added = {"\n\n": 300, "two": 301, "two  spaces": 302, "Ünï": 303}

    def tokenize(text: str) -> list[int]:
        parts = re.split(r"(\n\n|two  spaces|two|Ünï)", text)
        return [i for part in parts for i in ([added[part]] if part in added else plain(part))]

    found = pretokenizers.find(vocabulary, merges, tokenize, ordinary=vocabulary, added=added)
    assert found == "qwen2"


def test_an_unknown_pre_tokenizer_is_refused_with_what_to_do() -> None:
    vocabulary = byte_level_vocabulary("ab")
    whole = pretokenizers._Bpe(vocabulary, [("a", "b")])
    with pytest.raises(UnsupportedError, match=r"gpt-2, smollm.*safetensors"):
        find(vocabulary, [("a", "b")], lambda text: whole.encode([text[::-1]], False))


def test_the_byte_alphabet_is_gpt_2s() -> None:
    assert set(pretokenizers.byte_characters().values()) == set(pre_tokenizers.ByteLevel.alphabet())
    for text in ("a b", "é\n", "\u200b中"):
        ((piece, _),) = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        ).pre_tokenize_str(text)
        assert "".join(pretokenizers.byte_characters()[b] for b in text.encode()) == piece


def saved(vocabulary: dict[str, int], added: dict[int, tuple[str, bool]], **extra: Any) -> Any:
    definition = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["Ġ", "a"]]},
        "added_tokens": [
            {"id": i, "content": text, "special": special} for i, (text, special) in added.items()
        ],
    }
    definition["model"] |= extra.pop("model", {})
    return Tokenizer(definition | extra.pop("definition", {}), **extra)


VOCABULARY = byte_level_vocabulary("Ġa")
PLAIN = tokenizer_of("gpt-2", VOCABULARY, [("Ġ", "a")])


def test_token_types_say_what_is_special_added_and_unused() -> None:
    size = len(VOCABULARY)
    tokenizer = saved(
        VOCABULARY,
        {size: ("<s>", True), size + 2: ("<user>", False)},
        config={"bos_token": {"content": "<s>"}, "eos_token": None, "pad_token": "<user>"},
    )
    keys = tokenizer.metadata(size + 4, PLAIN, "{{ template }}")
    assert keys["tokenizer.ggml.tokens"][-4:] == [
        "<s>",
        f"[PAD{size + 1}]",
        "<user>",
        f"[PAD{size + 3}]",
    ]
    assert keys["tokenizer.ggml.token_type"][-5:] == [NORMAL, CONTROL, UNUSED, USER_DEFINED, UNUSED]
    assert keys["tokenizer.ggml.bos_token_id"] == size
    assert keys["tokenizer.ggml.padding_token_id"] == size + 2
    assert "tokenizer.ggml.eos_token_id" not in keys
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == "{{ template }}"
    assert keys["tokenizer.ggml.merges"] == ["Ġ a"]


def test_an_end_of_generation_that_is_no_token_is_left_out() -> None:
    ends = {"eos_token_id": [len(VOCABULARY) + 7, -1, None]}
    tokenizer = saved(VOCABULARY, {}, config={}, generation=ends)
    assert "tokenizer.ggml.eot_token_id" not in tokenizer.metadata(400, PLAIN, None)
    assert tokenizer.stops == []


@pytest.mark.parametrize(
    "changes, fallback, notes",
    [
        ({}, False, 0),
        ({"rstrip": True}, False, 1),
        ({"lstrip": True}, True, 1),
        ({"single_word": True}, False, 1),
        ({"normalized": True}, False, 0),
        ({"normalized": True}, True, 1),
        ({"normalized": True, "special": True}, True, 0),
    ],
)
def test_added_tokens_that_llama_cpp_finds_otherwise_are_noted(
    changes: dict[str, bool], fallback: bool, notes: int
) -> None:
    tokenizer = saved(
        VOCABULARY, {300: ("<x>", False)}, config={}, model={"byte_fallback": fallback}
    )
    tokenizer.definition["added_tokens"][0] |= changes
    assert len(tokenizer.notes) == notes and all("'<x>'" in note for note in tokenizer.notes)


def test_more_tokens_than_embedding_rows_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"257 tokens.*256 rows.*resize_token_embeddings"):
        saved(VOCABULARY, {}, config={}).metadata(256, PLAIN, None)


def test_another_kind_of_tokenizer_is_refused_by_name() -> None:
    tokenizer = saved(VOCABULARY, {}, config={}, model={"type": "Unigram"})
    with pytest.raises(UnsupportedError, match="'Unigram'"):
        tokenizer.metadata(300, PLAIN, None)


def test_a_missing_tokenizer_is_refused_with_what_to_pass(tmp_path: Any) -> None:
    with pytest.raises(ExportError, match=r"tokenizer\.json"):
        Tokenizer.read(tmp_path)
