"""What a GGUF file says of its config and tokenizer, beyond what transformers reads from it.

transformers (5.17 to 5.23) ignores the tensor `rope_freqs.weight`, which holds Llama 3.1's rope
scaling, and the key `tokenizer.ggml.pre`, and may add an unknown token that the embedding has no
row for: a model read by it alone rotates and tokenises otherwise than the one that was written.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import UnsupportedError

from .gguf_file import GgufFile, read_gguf

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


def gguf_config(path: Path) -> dict[str, Any]:
    """The transformers config of a GGUF file, rope scaling included, as a mapping.

    Raises:
        CheckpointError: the file is truncated. UnsupportedError: transformers cannot read its
            architecture.

    """
    from transformers import AutoConfig

    file = read_gguf(path)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    except ValueError as error:
        raise UnsupportedError(f"{path.name}: {error}") from error
    config.pop("quantization_config", None)
    scaling = _llama3_scaling(file, config)
    if scaling is not None:
        config["rope_parameters"] = {**config["rope_parameters"], **scaling}
    return config


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file: byte-level BPE is built here, SentencePiece-like ones by
    transformers.

    Raises:
        UnsupportedError: the file names a pre-tokenizer that is not known here.

    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    values = read_gguf(path).metadata
    if values.get("tokenizer.ggml.model") != "gpt2":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=values.get("tokenizer.chat_template"),
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


def _llama3_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """Rope parameters from `rope_freqs.weight`, which divides each frequency (Llama 3.1).

    The file holds the divisors, not what made them. Meta's models all have low 1, high 4 and 8,192
    original positions; the divisors that follow from these and the largest one are compared with
    the file's.
    """
    if "rope_freqs.weight" not in file.tensors:
        return None
    divisors = [float(divisor) for divisor in file.dequantise("rope_freqs.weight")]
    low, high, original, factor = 1.0, 4.0, 8192, max(divisors)
    theta = float(config["rope_parameters"]["rope_theta"])
    expected: list[float] = []
    for index in range(len(divisors)):
        turns = original / (2 * math.pi * theta ** (index / len(divisors)))
        if turns <= low or turns >= high:
            expected.append(factor if turns <= low else 1.0)
            continue
        smooth = (turns - low) / (high - low)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if any(abs(a - b) > 1e-3 * b for a, b in zip(divisors, expected, strict=True)):
        raise UnsupportedError(
            "rope_freqs.weight holds frequency divisors other than Llama 3.1's; load the model's "
            "original folder, whose config.json says how its rope is scaled."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
