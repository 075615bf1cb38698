"""The tokenizer of a GGUF file, from tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import CheckpointError, ExportError, UnsupportedError

from . import pretokenizers, sentencepiece
from .sentencepiece import SPACE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .writer import Value

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types, as ggml numbers them."""

_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # llama.cpp spells it so
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
_KNOWN_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>"),
}
"""Ends of generation that llama.cpp recognises by their text."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's saved files. definition: tokenizer.json; config: tokenizer_config.json."""

    definition: dict[str, Any]
    config: dict[str, Any]
    generation: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(source: Path) -> Tokenizer:
        """The files of a directory.

        Raises:
            ExportError: there is no tokenizer.json.

        """
        if not (source / "tokenizer.json").exists():
            raise ExportError(
                "a GGUF file holds its tokenizer, and none was given that saves a tokenizer.json. "
                "Pass the model's tokenizer (a fast one, as AutoTokenizer gives)."
            )
        names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
        return Tokenizer(*(_json(source / name) for name in names))

    @cached_property
    def _model(self) -> dict[str, Any]:
        return self.definition["model"]

    @cached_property
    def _added(self) -> dict[int, dict[str, Any]]:
        return {token["id"]: token for token in self.definition.get("added_tokens", [])}

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs that merge, best first (both spellings of tokenizer.json)."""
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in self._model["merges"])
        return [(left, right) for left, right in pairs]

    @cached_property
    def tokens(self) -> list[str | None]:
        """The text of every id, None in gaps."""
        by_id = {id_: token for token, id_ in self._model["vocab"].items()}
        by_id |= {id_: token["content"] for id_, token in self._added.items()}
        return [by_id.get(i) for i in range(max(by_id) + 1)]

    @property
    def bos(self) -> str:
        """The text of the token that begins a text; empty where there is none."""
        id_ = self._id(self.config.get("bos_token"))
        return "" if id_ is None else self.tokens[id_] or ""

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts that token before every text."""
        id_ = self._id(self.config.get("bos_token"))
        return id_ is not None and self._template_ends()[0] == id_

    @property
    def stops(self) -> list[str]:
        """The texts of the tokens that end an answer: the tokenizer's, then the generation config's."""
        ends = self.generation.get("eos_token_id")
        ids = [
            self._id(self.config.get("eos_token")),
            *(ends if isinstance(ends, list) else [ends]),
        ]
        texts = [self.tokens[id_] for id_ in ids if id_ in range(len(self.tokens))]
        return [text for text in dict.fromkeys(texts) if text]

    @property
    def notes(self) -> list[str]:
        """What llama.cpp does otherwise with added tokens than the tokenizer."""
        greedy = [
            token["content"]
            for token in self._added.values()
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        ]
        marked = [
            token["content"]
            for token in self._added.values()
            if self._model.get("byte_fallback") and token.get("normalized") and not token["special"]
        ]
        found: list[str] = []
        if greedy:
            found.append(
                f"{len(greedy)} added tokens, the first is {greedy[0]!r}, take the white space beside them with them "
                "or are found as whole words only; llama.cpp does that only for files with phi-3 in their name, so "
                "where one stands beside a space or inside a word it gives other ids"
            )
        if marked:
            found.append(
                f"{len(marked)} added tokens, the first is {marked[0]!r}, are normalised like text before they are "
                "looked for; llama.cpp looks for them as they are, so where one stands beside a space it may give "
                "other ids"
            )
        return found

    def metadata(
        self, rows: int, tokenize: Callable[[str], list[int]], chat_template: str | None
    ) -> dict[str, Value]:
        """Every `tokenizer.*` key.

        rows: rows of the embedding; more rows than tokens are padded with unused tokens.

        Raises:
            CheckpointError: more tokens than rows.
            UnsupportedError: a kind of tokenizer, or a pre-tokenizer, that llama.cpp does not have.

        """
        if len(self.tokens) > rows:
            raise CheckpointError(
                f"the tokenizer has {len(self.tokens)} tokens, the embedding {rows} rows: ids from "
                f"{rows} on have no vector. Use the tokenizer that the model was trained with, or "
                f"model.resize_token_embeddings({len(self.tokens)}) before training."
            )
        if self._model.get("type") != "BPE":
            raise UnsupportedError(
                f"tokenizer.json holds a {self._model.get('type')!r} model; BPE (byte-level or "
                "SentencePiece-like) is written to GGUF. Export as safetensors."
            )
        byte_fallback = bool(self._model.get("byte_fallback"))
        kind = self._sentencepiece(tokenize) if byte_fallback else self._byte_level(tokenize)
        texts = [t if t is not None else f"[PAD{i}]" for i, t in enumerate(self.tokens)]
        texts += [f"[PAD{i}]" for i in range(len(texts), rows)]
        types = self._types(byte_fallback) + [UNUSED] * (rows - len(self.tokens))
        if byte_fallback:
            texts = [
                text.replace(SPACE, " ") if type_ == USER_DEFINED else text
                for text, type_ in zip(texts, types, strict=True)
            ]
            scores = self._scores() + [0.0] * (rows - len(self.tokens))
            kind["tokenizer.ggml.scores"] = scores
        keys = kind | {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
        keys |= self._specials()
        if chat_template:
            keys["tokenizer.chat_template"] = chat_template
        return keys | self.further_templates

    def _byte_level(self, tokenize: Callable[[str], list[int]]) -> dict[str, Value]:
        vocabulary: dict[str, int] = self._model["vocab"]
        added = {token["content"]: id_ for id_, token in self._added.items() if token["content"]}
        ordinary = [token for token in vocabulary if token not in added]
        pre = pretokenizers.find(vocabulary, self.merges, tokenize, ordinary=ordinary, added=added)
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.merges": [f"{left} {right}" for left, right in self.merges],
        }

    def _sentencepiece(self, tokenize: Callable[[str], list[int]]) -> dict[str, Value]:
        first = tokenize("a")[:1]
        spaced = bool(first) and (self.tokens[first[0]] or "").startswith(SPACE)
        ids = {text: id_ for id_, text in enumerate(self.tokens) if text is not None}
        added = [token["content"] for token in self._added.values()]
        sentencepiece.require_same_ids(ids, self._scores(), tokenize, added=added, prefixed=spaced)
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": spaced,
        }

    def _scores(self) -> list[float]:
        """-(merge rank) of the pair that makes a token: the order in which SentencePiece merges.

        A tokenizer.json keeps no scores, and only their order counts: what no pair makes comes last.
        """
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(self.merges):
            ranks.setdefault(left + right, rank)
        return [-float(ranks.get(token or "", len(self.merges))) for token in self.tokens]

    def _types(self, byte_fallback: bool) -> list[int]:
        unknown = self._model.get("unk_token")
        types: list[int] = []
        for id_, token in enumerate(self.tokens):
            added = self._added.get(id_)
            if token is None:
                types.append(UNUSED)
            elif byte_fallback and token == unknown:
                types.append(UNKNOWN)
            elif added is not None:
                types.append(CONTROL if added["special"] else USER_DEFINED)
            elif byte_fallback and len(token) == 6 and token.startswith("<0x"):
                types.append(BYTE)
            else:
                types.append(NORMAL)
        return types

    def _specials(self) -> dict[str, Value]:
        keys: dict[str, Value] = {}
        for name, key in _SPECIAL.items():
            id_ = self._id(self.config.get(f"{name}_token"))
            if id_ is not None:
                keys[f"tokenizer.ggml.{key}"] = id_
        eos = keys.get("tokenizer.ggml.eos_token_id")
        keys["tokenizer.ggml.add_bos_token"] = self.adds_bos
        keys["tokenizer.ggml.add_eos_token"] = eos is not None and self._template_ends()[1] == eos
        turn_end = self._turn_end(eos)
        if turn_end is not None:
            keys["tokenizer.ggml.eot_token_id"] = turn_end
        return keys

    @property
    def further_templates(self) -> dict[str, Value]:
        """Chat templates beside the default one, which tokenizer_config.json lists by name ("tool_use")."""
        listed = self.config.get("chat_template")
        further = {
            re.sub(r"[^0-9A-Za-z]", "_", each["name"]): each["template"]
            for each in (listed if isinstance(listed, list) else ())
            if each["name"] != "default"
        }
        if not further:
            return {}
        keys: dict[str, Value] = {"tokenizer.chat_templates": list(further)}
        return keys | {f"tokenizer.chat_template.{name}": text for name, text in further.items()}

    def _id(self, token: Any) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str):
            return None
        added = (id_ for id_, entry in self._added.items() if entry["content"] == text)
        return next(added, self._model["vocab"].get(text))

    def _template_ends(self) -> tuple[int | None, int | None]:
        """Ids that the post-processor puts before and after a text."""
        processor = self.definition.get("post_processor") or {}
        for step in processor.get("processors", [processor]):
            if step.get("type") == "TemplateProcessing" and step["single"]:
                ends = (step["single"][0], step["single"][-1])
                first, last = (end.get("SpecialToken", {}).get("id") for end in ends)
                return self._id(first), self._id(last)
        return None, None

    def _turn_end(self, eos: Value | None) -> int | None:
        """The first further end of the generation config that llama.cpp would not know by its text; the
        format has room for one.
        """
        ends = self.generation.get("eos_token_id")
        for id_ in ends if isinstance(ends, list) else [ends]:
            if id_ is None or id_ == eos or id_ not in range(len(self.tokens)):
                continue  # a padded row ends nothing
            if self.tokens[id_] not in _KNOWN_ENDS:
                return id_
        return None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
