"""Reading rows: JSONL, JSON, CSV and Parquet files, and data sets on the hub, each row as a mapping."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

from hotloop_core.errors import DataError, SecurityError, UnsupportedError

Record = dict[str, Any]

_PICKLED = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz"}


def read_rows(path: str, *, split: str = "train") -> list[Record]:
    """Every row of a file, by its suffix, or of a data set on the hub.

    Raises:
        DataError: nothing there, not well-formed (with the line), or no rows at all.
        SecurityError: a kind of file that is, or can hold, pickled objects.
        UnsupportedError: the file needs the package `datasets`, which is not installed.

    """
    file = Path(path)
    if file.suffix.lower() in _PICKLED:
        raise SecurityError(
            f"{path}: {file.suffix} files can run code when they are read. "
            "Save the rows as JSONL, CSV or Parquet instead."
        )
    reader = _READERS.get(file.suffix.lower())
    if reader is not None:
        if not file.is_file():
            raise DataError(
                f"{path} does not exist. Paths in a recipe are relative to the recipe's folder."
            )
        rows = reader(file)
    elif file.exists():
        known = ", ".join(sorted(_READERS))
        raise DataError(
            f"{path}: expected a file that ends in {known}, or the id of a data set on the hub"
        )
    else:
        rows = _from_hub(path, split)
    if not rows:
        raise DataError(f"{path} has no rows. Expected at least one.")
    return rows


def _read_jsonl(file: Path) -> list[Record]:
    rows: list[Record] = []
    # Not splitlines(): a JSON string may hold U+2028 and others that it would split at.
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if line.strip():
            rows.append(_record(_parse(line, f"{file}, line {number}"), f"{file}, line {number}"))
    return rows


def _read_json(file: Path) -> list[Record]:
    values = _parse(_text(file), str(file))
    if not isinstance(values, list):
        raise DataError(
            f"{file} holds a {type(values).__name__}, expected a list of objects (or use .jsonl)"
        )
    return [_record(value, f"{file}, row {number}") for number, value in enumerate(values, start=1)]


def _read_csv(file: Path) -> list[Record]:
    text = _text(file)
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text)))  # 128 KiB by default; a document may be longer
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise DataError(f"{file}: two columns have one name; the header is {', '.join(names)}")
        return [_csv_record(file, number, row) for number, row in enumerate(reader, start=2)]
    except csv.Error as error:
        raise DataError(f"{file} is not well-formed CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _csv_record(file: Path, number: int, row: dict[Any, Any]) -> Record:
    if None in row or None in row.values():
        found = len(row.get(None) or ()) + sum(value is not None for value in row.values())
        raise DataError(
            f"{file}, record {number}: {found} fields do not match the header's columns"
        )
    return dict(row)


def _read_parquet(file: Path) -> list[Record]:
    _require_datasets(str(file))
    import pyarrow
    import pyarrow.parquet

    try:
        return [_present(row) for row in pyarrow.parquet.read_table(file).to_pylist()]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a whole Parquet file: {error}") from error


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _from_hub(name: str, split: str) -> list[Record]:
    _require_datasets(name)
    import datasets

    try:
        return [_present(row) for row in datasets.load_dataset(name, split=split).to_list()]
    except Exception as error:  # the hub's client has many; all mean that there are no rows
        raise DataError(
            f"{name!r} is no file here, and as a data set on the hub it failed "
            f"({type(error).__name__}: {error}). Check the path, the id and the split {split!r}."
        ) from error


def _present(value: Any) -> Any:
    """Without the keys that are None: in columns, every message has every key that any message has."""
    if isinstance(value, dict):
        return {key: _present(part) for key, part in value.items() if part is not None}
    return [_present(part) for part in value] if isinstance(value, list) else value


def _require_datasets(what: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise UnsupportedError(
            f"reading {what} needs the package datasets: `uv add 'hotloop[train]'`, or use JSONL or CSV"
        )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not well-formed JSON: {error}. A .jsonl file has one object a line, a .json file one list."
        ) from error


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(
            f"{where} holds a {type(value).__name__}, expected an object with named fields"
        )
    return value
