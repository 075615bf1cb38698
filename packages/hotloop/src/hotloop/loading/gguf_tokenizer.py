"""The tokenizer of a GGUF file.

transformers (5.17 to 5.23) ignores the key `tokenizer.ggml.pre` and may add an unknown token that the
embedding has no row for: byte-level BPE read by it alone splits text otherwise than the one that was
written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hotloop_core.errors import CheckpointError, UnsupportedError

from .gguf_file import read_gguf, reads_metadata

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tokenizers.pre_tokenizers import PreTokenizer
    from tokenizers.processors import PostProcessor
    from transformers import PreTrainedTokenizerBase

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""Kinds of token in `tokenizer.ggml.token_type`."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{end}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{end}"
    r"|\p{N}{digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_TEKKEN = _CASED.replace("{end}", "").replace("{digits}", "")
_GPT4O = _CASED.replace("{end}", f"{_CONTRACTIONS}?").replace("{digits}", "{1,3}")

_PATTERNS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "chatglm-bpe": _LLAMA3,
    "glm4": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "stablelm2": _QWEN2,
    "tekken": _TEKKEN,
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
}
"""`tokenizer.ggml.pre` -> the pattern of the tokenizer that it names, as that model's own
tokenizer.json has it."""

_GPT2 = frozenset({"gpt-2", "phi-2", "olmo", "mpt", "exaone4", "trillion"})
_GPT2_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
"""Digits split one by one, then GPT-2's own pattern."""

_ADDS_BOS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
_KEEPS_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
"""A word that is in the vocabulary is taken whole, whatever the merges say."""


@reads_metadata
def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file: byte-level BPE is built here, SentencePiece-like ones by
    transformers.

    Its `model_max_length` is the file's context length.

    Raises:
        UnsupportedError: the file names a pre-tokenizer that is not known here, or a kind of tokenizer
            that transformers cannot read.
        CheckpointError: its metadata is damaged.

    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    values = read_gguf(path).metadata
    if values.get("tokenizer.ggml.model") != "gpt2":
        try:
            return AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            )
        except ValueError as error:
            raise UnsupportedError(f"{path.name}: its tokenizer cannot be read: {error}") from error
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    pre = values.get("tokenizer.ggml.pre")
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(pair.split(" ")) for pair in values["tokenizer.ggml.merges"]],
        ignore_merges=pre in _KEEPS_WHOLE_WORDS,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, path)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(values, tokens, adds_bos=pre in _ADDS_BOS)
    kinds = values.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: values.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    unknown = {role: i for role, i in ids.items() if i is not None and i not in range(len(tokens))}
    if unknown:
        raise CheckpointError(
            f"{path.name} has {len(tokens)} tokens, and the ids of its special tokens are beyond them: {unknown}; "
            "copy or download it again"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=values.get("tokenizer.chat_template"),
        model_max_length=values[f"{values['general.architecture']}.context_length"],
        **{f"{role}_token": tokens[index] for role, index in ids.items() if index is not None},
    )


def _post_processor(
    values: Mapping[str, Any], tokens: list[str], *, adds_bos: bool
) -> PostProcessor:
    """Puts the beginning-of-sequence token first where the file, or else its pre-tokenizer's habit,
    says so.
    """
    from tokenizers import processors

    byte_level = processors.ByteLevel(trim_offsets=False)
    bos = values.get("tokenizer.ggml.bos_token_id")
    if bos is None or not values.get("tokenizer.ggml.add_bos_token", adds_bos):
        return byte_level
    token = tokens[bos]
    template = processors.TemplateProcessing(
        single=[token, "$A"],
        pair=[token, "$A", f"{token}:1", "$B:1"],
        special_tokens=[(token, bos)],
    )
    return processors.Sequence([byte_level, template])


def _pre_tokenizer(pre: str | None, path: Path) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _GPT2:
        return byte_level
    if pre in _GPT2_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    if pre not in _PATTERNS:
        known = ", ".join(sorted(_GPT2 | _GPT2_DIGITS | _PATTERNS.keys()))
        raise UnsupportedError(
            f"{path.name}: tokenizer.ggml.pre is {pre!r}, so how it splits text is not known; "
            f"known are {known}. Load the model's original folder, or pass one with its "
            "tokenizer.json."
        )
    split = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bytes_only])
