"""From a recipe's data section to rows of tokens: read, rendered, measured, split into trained and held out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotloop_core.errors import DataError

from .render import Renderer, Row, fields_of, find_form
from .rows import Record, read_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from .recipe import DataSection, Recipe


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of the rows. Tokens are counted after cutting; `trained` of them have a label.

    overlong: rows longer than max_seq_len, before anything was done about them. fingerprint: SHA-256 of all tokens
    and labels in order, so that a resumed run can tell that its data is the same.
    """

    form: str
    rows: int
    held_out_rows: int
    overlong: int
    dropped_rows: int
    dropped_tokens: int
    tokens: int
    trained_tokens: int
    longest: int
    fingerprint: str

    def __str__(self) -> str:
        lines = [
            f"{self.rows:,} rows ({self.form}) to train on, {self.held_out_rows:,} held out; "
            f"{self.tokens:,} tokens, {self.trained_tokens:,} of them trained; longest row {self.longest:,}"
        ]
        if self.overlong:
            lines.append(
                f"{self.overlong:,} rows were longer than max_seq_len: {self.dropped_rows:,} rows and "
                f"{self.dropped_tokens:,} tokens left out"
            )
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Records:
    """The rows as they were read and checked, before any tokenizer. held_out: the rows of a file of their own."""

    form: str
    rows: list[Record]
    held_out: list[Record]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The rows of a run in tokens."""

    train: list[Row]
    held_out: list[Row]
    report: DataReport


def read(data: DataSection) -> Records:
    """Reads all rows of a recipe.

    Raises:
        DataError: no rows, or rows without the named fields, listed by number.

    """
    rows = read_rows(data.path, split=data.split)
    form = find_form(data, rows[0])
    needed = (*fields_of(data, form), *([data.weight_field] if data.weight_field else []))
    _require_fields(rows, needed, data.path)
    held_out: list[Record] = []
    if isinstance(data.held_out, str):
        held_out = read_rows(data.held_out, split=data.split)
        _require_fields(held_out, needed, data.held_out)
    return Records(form=form, rows=rows, held_out=held_out)


def prepare(recipe: Recipe, records: Records, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Renders the records with the tokenizer, which gets the recipe's chat template if it names one, and splits them.

    Raises:
        DataError: rows without a trained token, or too long, each listed by number; too few to split.

    """
    data = recipe.data
    if data.chat_template is not None:
        from hotloop.chat_templates import get_chat_template

        tokenizer = get_chat_template(tokenizer, data.chat_template)
    renderer = Renderer(tokenizer, data, records.form)
    fitter = _Fitter(data.overlong, recipe.model.max_seq_len)
    fitted = fitter.fit(_render(renderer, records.rows, data.path), data.path)
    if isinstance(data.held_out, str):
        sides = [False] * len(fitted)
        extra = fitter.fit(_render(renderer, records.held_out, data.held_out), data.held_out)
    else:
        sides = held_out_sides(records.rows, data.held_out, seed=data.shuffle_seed)
        extra = []
    train = [
        piece for pieces, held in zip(fitted, sides, strict=True) if not held for piece in pieces
    ]
    held_out = [
        piece for pieces, held in zip(fitted, sides, strict=True) if held for piece in pieces
    ]
    held_out += [piece for pieces in extra for piece in pieces]
    if not train:
        raise DataError(
            f"{data.path}: no row is left to train on; {fitter.dropped_rows} were too long. Raise model.max_seq_len."
        )
    report = DataReport(
        form=records.form,
        rows=len(train),
        held_out_rows=len(held_out),
        overlong=fitter.overlong,
        dropped_rows=fitter.dropped_rows,
        dropped_tokens=fitter.dropped_tokens,
        tokens=sum(len(row) for row in train),
        trained_tokens=sum(row.trained for row in train),
        longest=max(len(row) for row in [*train, *held_out]),
        fingerprint=_fingerprint([*train, *held_out]),
    )
    return Prepared(train=train, held_out=held_out, report=report)


def held_out_sides(records: Sequence[Record], share: float, *, seed: int) -> list[bool]:
    """For each record whether it is held out; at least one is, where `share` is above 0.

    A record's side depends on its content, the seed and the set alone: reordered rows stay on their sides, and equal
    rows are on the same side, so that nothing held out was trained on.

    Raises:
        DataError: all records are equal.

    """
    if share == 0:
        return [False] * len(records)
    keys = [_key(record, seed) for record in records]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise DataError(
            "a single distinct row cannot be split; set data.held_out = 0, or name a file of held-out rows"
        )
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    held = set(distinct[:count])
    return [key in held for key in keys]


def _key(record: Record, seed: int) -> str:
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(f"{seed} {text}".encode()).hexdigest()


def _render(renderer: Renderer, records: Sequence[Record], path: str) -> list[Row]:
    rows = [renderer(record, f"{path}, row {number}") for number, record in enumerate(records, 1)]
    _refuse(path, "no token to train on", rows, lambda row: row.trained == 0, _NOTHING_TRAINED)
    return rows


class _Fitter:
    """Does with overlong rows what the recipe says, and counts what it did."""

    def __init__(self, policy: str, longest: int) -> None:
        self.policy, self.longest = policy, longest
        self.overlong = self.dropped_rows = self.dropped_tokens = 0

    def fit(self, rows: Sequence[Row], path: str) -> list[list[Row]]:
        """For each row, what of it is used: itself, pieces of it, or nothing."""
        if self.policy == "error":
            _refuse(
                path,
                f"more than max_seq_len = {self.longest} tokens",
                rows,
                lambda row: len(row) > self.longest,
                'Raise model.max_seq_len, or set data.overlong to "cut", "drop" or "split".',
            )
        return [self._pieces(row) for row in rows]

    def _pieces(self, row: Row) -> list[Row]:
        if len(row) <= self.longest:
            return [row]
        self.overlong += 1
        starts = range(0, len(row), self.longest) if self.policy == "split" else [0]
        pieces = [] if self.policy == "drop" else [row[at : at + self.longest] for at in starts]
        kept = [piece for piece in pieces if piece.trained]
        self.dropped_rows += not kept
        self.dropped_tokens += len(row) - sum(len(piece) for piece in kept)
        return kept


_NOTHING_TRAINED = 'A chat needs an assistant message and a completion must not be empty; or set data.loss_on = "all".'


def _refuse(
    path: str, what: str, rows: Sequence[Row], bad: Callable[[Row], bool], advice: str
) -> None:
    numbers = [number for number, row in enumerate(rows, start=1) if bad(row)]
    if numbers:
        longest = max(len(row) for row in rows)
        raise DataError(
            f"{path}: {_count(numbers, len(rows))} with {what} (rows {_listed(numbers)}; longest row {longest} "
            f"tokens). {advice}"
        )


def _require_fields(records: Sequence[Record], fields: Sequence[str], path: str) -> None:
    bad = [n for n, record in enumerate(records, 1) if any(record.get(f) is None for f in fields)]
    if bad:
        found = ", ".join(map(repr, records[bad[0] - 1])) or "nothing"
        raise DataError(
            f"{path}: {_count(bad, len(records))} without {' and '.join(map(repr, fields))} (rows {_listed(bad)}; "
            f"row {bad[0]} has {found}). Correct them, or name the fields in the data section."
        )


def _count(numbers: Sequence[int], of: int) -> str:
    return f"{len(numbers):,} of {of:,} rows"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (" ..." if len(numbers) > 10 else "")


def _fingerprint(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.ids.tobytes())
        digest.update(row.labels.tobytes())
        if row.weights is not None:
            digest.update(row.weights.tobytes())
    return digest.hexdigest()
