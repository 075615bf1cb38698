r"""Finds the name of a byte-level BPE tokenizer's pre-tokenizer by what it does.

llama.cpp knows pre-tokenizers by name, a tokenizer.json holds them as code. Names are no evidence and
neither is the code's shape, since tokenizers are re-saved and extended. So each candidate, with the
tokenizer's own vocabulary and merges, tokenises texts on which the candidates differ, and must give the
tokenizer's own ids on all of them.

A candidate is a list of patterns, applied one after another to what the one before left, as
`src/llama-vocab.cpp` of llama.cpp lists them. Python's `re` has no \p{L}; but the texts are finite, so
a class is spelt out as those of their characters that are in it. So is white space, to which `re` counts
the separators U+001C to U+001F, and Unicode does not.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from hotloop_core.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(numbers: str, letters: str = r"\p{L}", not_symbols: str = r"\s\p{L}\p{N}") -> str:
    return (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{numbers}"
        rf"| ?[^{not_symbols}]+[\r\n]*|{_END}"
    )


def _cased(numbers: str, contraction: str) -> str:
    upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{upper}*{lower}+{contraction}|{start}{upper}+{lower}*{contraction}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_END}"
    )


_ASCII_SYMBOLS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK = (
    rf"{_ASCII_SYMBOLS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_END}"
)


_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@dataclass(frozen=True)
class PreTokenizer:
    """A name that llama.cpp knows, its patterns, and whether a piece that is a token skips the merges."""

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False


CANDIDATES = (
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("smollm", (r"\p{N}", _GPT2)),
    PreTokenizer("qwen2", (_words(r"\p{N}"),)),
    PreTokenizer("llama-bpe", (_words(r"\p{N}{1,3}"),), ignore_merges=True),
    PreTokenizer("smaug-bpe", (_words(r"\p{N}{1,3}"),)),
    PreTokenizer("tekken", (_cased(r"\p{N}", ""),), ignore_merges=True),
    PreTokenizer("gpt-4o", (_cased(r"\p{N}{1,3}", _CONTRACTION + "?"),)),
    PreTokenizer("deepseek-v3", (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK)),
    PreTokenizer(
        "deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
    ),
    PreTokenizer("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", _words(r"\p{N}+")), ignore_merges=True),
    PreTokenizer("qwen35", (_words(r"\p{N}", r"\p{L}\p{M}", r"\s\p{L}\p{M}\p{N}"),)),
)
"""In order of preference: where several give the same ids for every text, the first is taken."""

PROBES = (
    "Hello world, it's 3.14159 o'clock; I'LL you'Ve we'rE THEY'D can't HTTPServer getURLFor iPhone",
    "  two  spaces   three\t\ttabs \n new\r\n\r\nlines \n\n\n end   ",
    "1 12 123 1234 12345 1234567 v2.0.1 x86_64 2024-01-31T23:59 ½ ² Ⅷ ٣٤٥",
    "def f(x): return x**2 # comment\n    if (a[0] != b->c) { ++i; } /* note */ //end\n\n\t}",
    "don’t “quote” — dash… ¿qué? ¡hola! naïve café Ünïcödé straße Ελληνικά русский текст",
    "中文字符和标点。日本語のテキスト、カタカナ 한국어 문장 العربية हिन्दी में ไทย עברית",
    "🙂🙃👩‍👩‍👧‍👦 🇩🇪 ☃️ €100 £5 ¥7 a+b=c <tag/> ~tilde~ `code` ^caret^ |pipe| $var @user #tag",
    "\u200bzero\u00a0nbsp\u3000wide \u2003em x\u20dd\u20dd y",
)
_UNITS = (
    *("a", "Bc", "DE", "\u00e9", "1", "23", "4567", "!", "./", "'s", "'LL", "_", "$", "`"),
    *(" ", "  ", "\n", "\r\n", "\t", "\u4e2d", "\u20dd", "\U0001f642"),
)
"""One text per kind of character that some pattern tells apart; all triples of them are probed."""


def find(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    tokenize: Callable[[str], list[int]],
    *,
    ordinary: Iterable[str],
    added: Mapping[str, int],
) -> str:
    """The name of the pre-tokenizer.

    vocabulary: token -> id, byte-level characters. merges: pairs, best first. tokenize: the
    tokenizer itself, without special tokens. ordinary: tokens that are not added ones; those on
    which candidates differ are probed too, since only they show a difference in this vocabulary.
    added: text -> id of added tokens, which are cut out of a text before it is split.

    Raises:
        UnsupportedError: no candidate gives the tokenizer's ids.

    """
    # Composed, since some tokenizers compose first and llama.cpp does not: no matter of splitting.
    texts = [
        unicodedata.normalize("NFC", t) for t in (*PROBES, *triples(), *_telling(ordinary, merges))
    ]
    truth = [tokenize(text) for text in texts]
    bpe = _Bpe(vocabulary, merges)
    characters = "".join(sorted(set("".join(texts))))
    first_difference: dict[str, str] = {}
    for candidate in CANDIDATES:
        patterns = _compiled(candidate.patterns, characters)
        for text, expected in zip(texts, truth, strict=True):
            ids: list[int] = []
            for part in _apart(added, text):
                if part in added:
                    ids.append(added[part])
                else:
                    ids += bpe.encode(split(patterns, part), candidate.ignore_merges)
            if ids != expected:
                first_difference[candidate.name] = text
                break
        else:
            return candidate.name
    known = ", ".join(candidate.name for candidate in CANDIDATES)
    closest = max(first_difference, key=lambda name: texts.index(first_difference[name]))
    raise UnsupportedError(
        "the tokenizer splits text like none of the pre-tokenizers that llama.cpp knows and this "
        f"exporter checks ({known}); the closest is {closest!r}, which differs on "
        f"{first_difference[closest][:80]!r}. llama.cpp would read other ids than the model was trained "
        "on. Export as safetensors, or use a tokenizer of a known kind. If you changed "
        "the tokenizer after training, export with the one that it was trained with."
    )


def _apart(added: Mapping[str, int], text: str) -> list[str]:
    """The added tokens in a text, of those that overlap the longest, and what is between them."""
    if not added:
        return [text]
    longest_first = sorted(added, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return [part for part in parts if part]


def split(patterns: Sequence[re.Pattern[str]], text: str) -> list[str]:
    """The pieces of `text`: every pattern cuts what is left into its matches and the gaps between."""
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in _cut(pattern, piece)]
    return pieces


def _cut(pattern: re.Pattern[str], text: str) -> Iterable[str]:
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            yield text[end : match.start()]
        if match.group():
            yield match.group()
        end = match.end()
    if end < len(text):
        yield text[end:]


def _compiled(patterns: Iterable[str], characters: str) -> list[re.Pattern[str]]:
    return [re.compile(_spelt_out(pattern, characters)) for pattern in patterns]


@lru_cache
def _members(category: str, characters: str) -> str:
    found = (c for c in characters if unicodedata.category(c).startswith(category))
    # U+E000 is private and in no text: it keeps a class from being empty, which `re` refuses.
    return "\ue000" + "".join(map(re.escape, found))


def _spelt_out(pattern: str, characters: str) -> str:
    out: list[str] = []
    inside = False
    for token in re.findall(r"\\p\{\w+\}|\\.|.", pattern, flags=re.DOTALL):
        if token == r"\S":
            out.append(f"[^{_SPACE}]")
            continue
        if token.startswith(r"\p{") or token == r"\s":
            members = _SPACE if token == r"\s" else _members(token[3:-1], characters)
            out.append(members if inside else f"[{members}]")
            continue
        inside = (inside or token == "[") and token != "]"
        out.append(token)
    return "".join(out)


def triples() -> Iterable[str]:
    """A text for each kind of character, followed by all pairs of these."""
    for first in _UNITS:
        yield "".join(first + second + third for second in _UNITS for third in _UNITS)


_SAMPLED, _KEPT = 4000, 200


def _telling(ordinary: Iterable[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """Texts of tokens of the vocabulary on which candidates differ.

    Those that not all leave in one piece, and those that no merge makes, so that only a
    candidate that skips the merges can give them.
    """
    decode = {char: byte for byte, char in byte_characters().items()}
    made = {left + right for left, right in merges}
    texts: list[str] = []
    unmade: list[str] = []
    for token in ordinary:
        if len(token) > 1 and all(char in decode for char in token):
            text = bytes(decode[char] for char in token).decode("utf-8", errors="ignore")
            if len(text) > 1:
                (texts if token in made else unmade).append(text)
    texts = some(texts, _SAMPLED)
    characters = "".join(sorted(set("".join(texts))))
    compiled = [_compiled(candidate.patterns, characters) for candidate in CANDIDATES]
    telling = [
        text for text in texts if len({len(split(patterns, text)) for patterns in compiled}) > 1
    ]
    return some(telling, _KEPT) + some(unmade, _KEPT)


def some(texts: list[str], most: int) -> list[str]:
    """About `most` of them, evenly spread."""
    return texts[:: max(1, len(texts) // most)]


@lru_cache
def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 stands for itself; the other bytes, in order, for U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


class _Bpe:
    """Byte pair encoding (arXiv:1508.07909) of pieces, as llama.cpp does it."""

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        self._ids = vocabulary
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._known: dict[tuple[str, bool], list[int]] = {}

    def encode(self, pieces: Iterable[str], ignore_merges: bool) -> list[int]:
        return [token for piece in pieces for token in self._piece(piece, ignore_merges)]

    def _piece(self, piece: str, ignore_merges: bool) -> list[int]:
        key = (piece, ignore_merges)
        if key not in self._known:
            table = byte_characters()
            characters = "".join(table[byte] for byte in piece.encode())
            whole = ignore_merges and characters in self._ids
            parts = [characters] if whole else self._merged(list(characters))
            self._known[key] = [self._ids[part] for part in parts if part in self._ids]
        return self._known[key]

    def _merged(self, parts: list[str]) -> list[str]:
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(range(len(pairs)), key=lambda i: self._ranks.get(pairs[i], len(self._ranks)))
            if pairs[best] not in self._ranks:
                break
            parts[best : best + 2] = ["".join(pairs[best])]
        return parts
