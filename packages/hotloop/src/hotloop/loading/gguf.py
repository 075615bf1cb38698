"""What transformers leaves out when it reads a GGUF file: rope factors, and how text is split before BPE.

transformers (5.17 to 5.23) ignores the tensor `rope_freqs.weight`, which holds Llama 3.1's rope scaling, and the key
`tokenizer.ggml.pre`, so that a model read by it alone rotates and tokenises otherwise than the one that was written.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import CheckpointError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    import gguf
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

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
"""`tokenizer.ggml.pre` -> the pattern of the tokenizer that it names, as that model's own tokenizer.json has it."""

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
        CheckpointError: the file is truncated. UnsupportedError: transformers cannot read its architecture.

    """
    from transformers import AutoConfig

    reader = _reader(path)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    except ValueError as error:
        raise UnsupportedError(f"{path.name}: {error}") from error
    config.pop("quantization_config", None)
    scaling = _llama3_scaling(reader, config)
    if scaling is not None:
        config["rope_parameters"] = {**config["rope_parameters"], **scaling}
    return config


def fix_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Gives a tokenizer that transformers made from a GGUF the file's own pre-tokenizer and its BOS rule.

    SentencePiece vocabularies (`tokenizer.ggml.model` is "llama") need nothing of this.

    Raises:
        UnsupportedError: the file names a pre-tokenizer that is not known here.

    """
    from tokenizers import processors

    reader = _reader(path)
    if _value(reader, "tokenizer.ggml.model") != "gpt2":
        return
    pre = _value(reader, "tokenizer.ggml.pre")
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, path)
    if pre in _KEEPS_WHOLE_WORDS:
        tokenizer.model.ignore_merges = True
    bos = _value(reader, "tokenizer.ggml.bos_token_id")
    adds = _value(reader, "tokenizer.ggml.add_bos_token")
    byte_level = processors.ByteLevel(trim_offsets=False)
    if bos is None or not (pre in _ADDS_BOS if adds is None else adds):
        tokenizer.post_processor = byte_level
        return
    token = tokenizer.id_to_token(bos)
    template = processors.TemplateProcessing(
        single=[token, "$A"],
        pair=[token, "$A", f"{token}:1", "$B:1"],
        special_tokens=[(token, bos)],
    )
    tokenizer.post_processor = processors.Sequence([byte_level, template])


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
            f"{path.name}: tokenizer.ggml.pre is {pre!r}, so how it splits text is not known; known are {known}. "
            "Load the model's original folder, or pass one with its tokenizer.json."
        )
    split = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bytes_only])


@lru_cache(maxsize=1)
def _reader(path: Path) -> gguf.GGUFReader:
    """The parsed file; the last one is kept, since parsing takes seconds and a load asks three times."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "reading a GGUF file needs the package gguf: `uv add 'hotloop[gguf]'`"
        ) from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or no GGUF file ({error}); copy or download it again"
        ) from error


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _llama3_scaling(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, Any] | None:
    """Rope parameters from `rope_freqs.weight`, which divides each frequency (Llama 3.1).

    The file holds the divisors, not what made them. Meta's models all have low 1, high 4 and 8,192 original positions;
    the divisors that follow from these and the largest one are compared with the file's.
    """
    stored = next((t.data for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    if stored is None:
        return None
    divisors = [float(d) for d in stored.reshape(-1)]
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
            "rope_freqs.weight holds frequency divisors other than Llama 3.1's; load the model's original folder, whose "
            "config.json says how its rope is scaled."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
