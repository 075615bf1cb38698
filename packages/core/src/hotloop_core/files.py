"""Files that are either whole or not there: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, BinaryIO, Generic, TypeVar

from .errors import ExportError, OutputExistsError, SecurityError
from .exporter import ExportedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from pathlib import Path

_PARTIAL = ".partial"
T = TypeVar("T")


class HashingFile:
    """A binary file that only grows: counts its bytes and keeps their SHA-256 as they pass."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Appends `data` (any contiguous buffer).

        Raises:
            ExportError: the disk is full, or the file cannot be written for another reason.

        """
        view = memoryview(data).cast("B")
        with _reported(self._path):
            self._file.write(view)
        self._hash.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    @property
    def sha256(self) -> str:
        """The SHA-256 of everything written, in hexadecimal."""
        return self._hash.hexdigest()


class Outputs:
    """The files of one export: all appear under their names together at the end, or none do.

    Use as a context manager. A crash leaves at most files that end in `.partial`, which the next export of the same
    names replaces. Renames of several files are one after another: the last name given to `open` is renamed last, and
    one of that name that was there goes first, so write what makes the set look whole (an index, a config) last.
    """

    def __init__(self, directory: Path, *, overwrite: bool = False) -> None:
        self.directory = directory
        self.overwrite = overwrite
        self.files: list[ExportedFile] = []
        self._names: list[str] = []
        self._checked: set[str] = set()
        self._stale: set[str] = set()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            with _reported(self.directory):
                # An older set without its last file looks as little whole as this one until it is.
                for name in sorted(self._stale.difference(self._names)) + self._names[-1:]:
                    (self.directory / name).unlink(missing_ok=True)
                for name in self._names:
                    os.replace(self._partial(name), self.directory / name)
                _sync_directory(self.directory)
        except BaseException:
            self._discard()
            raise

    @contextmanager
    def open(self, name: str) -> Generator[HashingFile]:
        """A new file `name`.

        Raises:
            OutputExistsError: it exists and `overwrite` is off.
            SecurityError: the name leads out of the directory.
            ExportError: the disk is full or the directory cannot be written.

        """
        self._claim(name)
        path = self.directory / name
        with _reported(path):
            raw = _new(self._partial(name), buffering=1 << 20)
        file = HashingFile(raw, path)
        try:
            yield file
            with _reported(path):
                raw.flush()
                os.fsync(raw.fileno())
        finally:
            _close(raw)
        self.files.append(ExportedFile(path=path, bytes=file.bytes, sha256=file.sha256))

    def write(self, name: str, data: bytes | str) -> None:
        """A small file, whole."""
        with self.open(name) as file:
            file.write(data.encode() if isinstance(data, str) else data)

    def copy(self, source: Path, name: str | None = None) -> None:
        """A copy of `source`, under its own name unless another is given."""
        with self.open(name or source.name) as file, source.open("rb") as original:
            while block := original.read(1 << 22):
                file.write(block)

    def check(self, names: Iterable[str]) -> None:
        """Raises OutputExistsError now, before any work, where one of `names` exists and may not be replaced."""
        names = set(names)
        self._checked |= names
        existing = [n for n in names if (self.directory / n).exists()]
        folders = [n for n in existing if (self.directory / n).is_dir()]
        if folders:
            raise OutputExistsError(
                f"{self.directory} has a directory {min(folders)!r}, where a file of that name is to be. "
                "Choose another directory, or move that one."
            )
        if existing and not self.overwrite:
            raise OutputExistsError(
                f"{self.directory} already has {', '.join(sorted(existing))}. "
                "Choose another directory, or pass overwrite=True (--overwrite)."
            )

    def replace(self, names: Iterable[str]) -> None:
        """Names of an older export that must not stay beside this one: they go when this export is whole.

        Raises:
            OutputExistsError: one of them exists and `overwrite` is off.

        """
        names = set(names)
        self.check(names)
        self._stale |= names

    def require_space(self, needed_bytes: int) -> None:
        """Raises ExportError where the disk has less than `needed_bytes` free.

        What a crashed export left under the names that were checked counts as free: it is replaced.
        """
        free = shutil.disk_usage(self.directory).free
        leftovers = (self._partial(name) for name in self._checked)
        free += sum(file.stat().st_size for file in leftovers if file.is_file())
        if free < needed_bytes:
            raise ExportError(
                f"{self.directory} has {free / 1e9:.2f} GB free; this export needs {needed_bytes / 1e9:.2f} GB. "
                "Free space, choose another directory or a smaller quantisation."
            )

    def _claim(self, name: str) -> None:
        if not re.fullmatch(r"[^/\\\0]+", name) or name in {".", ".."}:
            raise SecurityError(f"file name {name!r} is not a plain name inside {self.directory}")
        self.check([name])
        if name in self._names:
            raise ExportError(
                f"{name!r} was written twice in one export; this is a fault of the exporter"
            )
        self._names.append(name)

    def _partial(self, name: str) -> Path:
        return self.directory / f".{name}{_PARTIAL}"

    def _discard(self) -> None:
        for name in self._names:
            self._partial(name).unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replaces `path` by `data`, whole or not at all."""
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        with _new(partial) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def ahead(items: Iterable[T], depth: int = 1) -> Generator[T]:
    """`items`, each made by another thread while the one before it is used; an error comes in its place.

    depth: how many wait, finished; so with the one in use and the one in the making, `depth` + 2 exist at most.
    Close it (`contextlib.closing`) where the loop may end early: its thread then ends too.
    """
    waiting: Queue[T | _End] = Queue(depth)
    abandoned = Event()

    def offer(item: T | _End) -> bool:
        while not abandoned.is_set():
            with suppress(Full):
                waiting.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            source = iter(items)
            while True:
                try:
                    item = next(source)
                except StopIteration:
                    break
                if not offer(item):
                    return
                del item  # nothing here keeps it alive while the next is made
        except BaseException as error:
            offer(_End(error))
        else:
            offer(_End(None))

    thread = Thread(target=work, name="hotloop-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
            del item
    finally:
        abandoned.set()
        thread.join()


class Behind(Generic[T]):
    """Calls `work` with each item that is put, in order, in another thread; a context manager that waits for the last.

    An error of `work` is raised by the next `put`, or at the end. depth: how many items wait at most.
    """

    def __init__(self, work: Callable[[T], object], depth: int = 2) -> None:
        self._work = work
        self._waiting: Queue[T | _End] = Queue(depth)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="hotloop-behind", daemon=True)

    def __enter__(self) -> Behind[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:
            with suppress(Empty):
                while True:
                    self._waiting.get_nowait()
        self._waiting.put(_End(None))
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def put(self, item: T) -> None:
        """Hands `item` over; waits while too many do."""
        if self._error is not None:
            raise self._error
        self._waiting.put(item)

    def _run(self) -> None:
        while True:
            item = self._waiting.get()
            if isinstance(item, _End):
                return
            if self._error is None:
                try:
                    self._work(item)
                except BaseException as error:
                    self._error = error
            del item


@contextmanager
def _reported(path: Path) -> Generator[None]:
    """Only around our own writing, so that a fault in reading a source is never called a full disk."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror or error}. "
            "No partial file was left; free space or choose another directory."
        ) from error


def _new(path: Path, buffering: int = -1) -> BinaryIO:
    """A file that was not there before: one left over goes, and a link that lies in its place is not followed."""
    path.unlink(missing_ok=True)
    return path.open("xb", buffering=buffering)


def _close(raw: BinaryIO) -> None:
    """After a failed write the buffer still holds data and closing tries once more: the first error is reported."""
    with suppress(OSError):
        raw.close()


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
