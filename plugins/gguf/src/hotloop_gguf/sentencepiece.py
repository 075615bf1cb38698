"""Whether llama.cpp, which merges as SentencePiece does, gives a byte-fallback BPE tokenizer's own ids.

llama.cpp has one way for all of them: spaces become a mark, one more may go before the text, and of two neighbours that
are a token together those with the best score merge. It knows no pre-tokenizer and no other normaliser here, and a
tokenizer.json may have both. So that way is gone on texts, and must give what the tokenizer gives.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from hotloop_core.errors import UnsupportedError

from .pretokenizers import PROBES, some, triples

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

SPACE = "\u2581"
_SAMPLED, _LENGTH = 4000, 64
"""How many tokens are texts too, and how long a text is: going llama.cpp's way costs the square of it."""


def require_same_ids(
    ids: Mapping[str, int],
    scores: Sequence[float],
    tokenize: Callable[[str], list[int]],
    *,
    added: Collection[str],
    prefixed: bool,
) -> None:
    """ids: token -> id. scores: of each id. added: texts of added tokens. prefixed: a space goes before every text.

    Left out are texts in which llama.cpp is known to put a space more than transformers: those that begin with one, and
    what follows an added token.

    Raises:
        UnsupportedError: the tokenizer gives other ids for some text.

    """
    ordinary = [token.replace(SPACE, " ") for token in ids if not token.startswith("<0x")]
    composed = [unicodedata.normalize("NFC", text) for text in (*PROBES, *triples())]
    texts = [t[i : i + _LENGTH] for t in composed for i in range(0, len(t), _LENGTH)]
    parts = [text for text in added if text]
    for text in (*texts, *some(ordinary, _SAMPLED)):
        spaced = text.replace(SPACE, " ")
        if not text or (prefixed and spaced[0] == " ") or any(part in spaced for part in parts):
            continue
        marked = (" " * prefixed + spaced).replace(" ", SPACE)
        expected, found = tokenize(text), _encoded(marked, ids, scores)
        if expected != found:
            at = next(
                i for i in range(len(expected) + 1) if expected[i : i + 1] != found[i : i + 1]
            )
            here = slice(max(0, at - 2), at + 4)
            raise UnsupportedError(
                f"in {text!r} the tokenizer finds {_shown(expected[here], ids)}, where llama.cpp would find "
                f"{_shown(found[here], ids)}: it has neither pre-tokenizers nor other normalisers for tokenizers with "
                "byte fallback, and would read other ids than the model was trained on. Export as safetensors, or with "
                "the tokenizer that the model was trained with, if you changed it after training."
            )


def _encoded(marked: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[int]:
    parts = list(marked)
    while True:
        pairs = (parts[i] + parts[i + 1] for i in range(len(parts) - 1))
        made = [(-scores[ids[pair]], i) for i, pair in enumerate(pairs) if pair in ids]
        if not made:
            break
        _, best = min(made)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else _bytes(part, ids)
    return found


def _bytes(character: str, ids: Mapping[str, int]) -> list[int]:
    named = (f"<0x{byte:02X}>" for byte in character.encode("utf-8", errors="surrogatepass"))
    return [ids[name] for name in named if name in ids]


def _shown(found: Sequence[int], ids: Mapping[str, int]) -> list[str]:
    texts = {id_: token for token, id_ in ids.items()}
    return [texts.get(id_, str(id_)) for id_ in found]
