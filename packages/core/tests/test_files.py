from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hotloop_core.errors import ExportError, OutputExistsError, SecurityError
from hotloop_core.files import Outputs, write_atomically


def names(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def fail_writes(monkeypatch: pytest.MonkeyPatch, after: int, code: int) -> None:
    """Every file opened for writing fails once it holds `after` bytes, as a full disk does."""
    real = Path.open

    def opened(self: Path, mode: str = "r", buffering: int = -1) -> Any:
        if not {"w", "x"} & set(mode):
            return real(self, mode, buffering)
        file = real(self, mode, 0)
        write = file.write
        total = 0

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, data: bytes) -> int:
                nonlocal total
                total += len(data)
                if total > after:
                    raise OSError(code, os.strerror(code))
                return write(data)

        return Full()

    monkeypatch.setattr(Path, "open", opened)


def test_files_appear_together_with_their_size_and_hash(tmp_path: Path) -> None:
    with Outputs(tmp_path) as outputs:
        with outputs.open("a.bin") as file:
            assert file.write(b"12") + file.write(memoryview(b"345")) == 5
            assert file.tell() == 5
        outputs.write("b.json", "{}")
        assert names(tmp_path) == {".a.bin.partial", ".b.json.partial"}
    assert names(tmp_path) == {"a.bin", "b.json"}
    first = outputs.files[0]
    assert (first.path, first.bytes) == (tmp_path / "a.bin", 5)
    assert first.sha256 == hashlib.sha256(b"12345").hexdigest()


def test_an_error_leaves_nothing_new_and_the_old_untouched(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), Outputs(tmp_path, overwrite=True) as outputs:
        outputs.write("a", "new")
        outputs.write("b", "new")
        raise RuntimeError
    assert names(tmp_path) == {"a"}
    assert (tmp_path / "a").read_text() == "old"


def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_writes(monkeypatch, after=10, code=errno.ENOSPC)
    with pytest.raises(ExportError, match="No space left"), Outputs(tmp_path) as outputs:
        outputs.write("small", b"12345")
        outputs.write("large", b"x" * 11)
    assert names(tmp_path) == set()


def test_a_read_only_directory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ExportError, match="Permission denied"), Outputs(tmp_path) as outputs:
        outputs.write("a", b"")


def test_a_fault_in_reading_is_not_called_a_fault_in_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Outputs(tmp_path) as outputs:
        outputs.copy(tmp_path / "missing")


def test_a_killed_export_leaves_no_whole_looking_file_and_can_be_repeated(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from hotloop_core.files import Outputs\n"
        "with Outputs(pathlib.Path(sys.argv[1])) as outputs:\n"
        "    outputs.write('first', b'whole')\n"
        "    with outputs.open('second') as file:\n"
        "        file.write(b'half'); os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode != 0
    assert all(name.endswith(".partial") for name in names(tmp_path))
    with Outputs(tmp_path) as outputs:
        outputs.write("first", b"1")
        outputs.write("second", b"2")
    assert names(tmp_path) == {"first", "second"}


def test_an_existing_output_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OutputExistsError, match="overwrite=True"), Outputs(tmp_path) as outputs:
        outputs.write("a", "new")
    assert (tmp_path / "a").read_text() == "old"
    with Outputs(tmp_path, overwrite=True) as outputs:
        outputs.write("a", "new")
    assert (tmp_path / "a").read_text() == "new"


def test_stale_files_go_only_when_the_new_ones_are_whole(tmp_path: Path) -> None:
    (tmp_path / "stale").write_text("old")
    with pytest.raises(OutputExistsError), Outputs(tmp_path) as outputs:
        outputs.replace(["stale"])
    with pytest.raises(RuntimeError), Outputs(tmp_path, overwrite=True) as outputs:
        outputs.replace(["stale"])
        raise RuntimeError
    assert names(tmp_path) == {"stale"}
    with Outputs(tmp_path, overwrite=True) as outputs:
        outputs.replace(["stale"])
        outputs.write("a", "new")
    assert names(tmp_path) == {"a"}


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "..", "", "a\\b"])
def test_a_name_that_leads_out_of_the_directory_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SecurityError), Outputs(tmp_path) as outputs:
        outputs.write(name, b"")


def test_one_name_cannot_be_written_twice(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="twice"), Outputs(tmp_path) as outputs:
        outputs.write("a", b"")
        outputs.write("a", b"")


def test_missing_space_is_found_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="GB free"):
        Outputs(tmp_path).require_space(2**62)


def test_what_a_crashed_export_left_counts_as_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    (tmp_path / ".a.partial").write_bytes(b"x" * 100)
    (tmp_path / ".other.partial").write_bytes(b"x" * 100)
    outputs = Outputs(tmp_path)
    outputs.check(["a", "b"])
    outputs.require_space(110)
    with pytest.raises(ExportError, match="GB free"):
        outputs.require_space(111)


def test_a_replaced_set_never_looks_whole_between_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("weights", "config"):
        (tmp_path / name).write_text("old")
    real = os.replace
    seen: list[set[str]] = []

    def replace(source: Path, target: Path) -> None:
        seen.append({f"{n}={(tmp_path / n).read_text()}" for n in names(tmp_path) if n[0] != "."})
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with Outputs(tmp_path, overwrite=True) as outputs:
        outputs.write("weights", "new")
        outputs.write("config", "new")
    assert seen == [{"weights=old"}, {"weights=new"}]
    assert {(tmp_path / name).read_text() for name in names(tmp_path)} == {"new"}


def test_a_directory_in_a_files_place_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    with pytest.raises(OutputExistsError, match="directory 'config'"):
        Outputs(tmp_path, overwrite=True).check(["weights", "config"])


def test_write_atomically_replaces_or_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    fail_writes(monkeypatch, after=3, code=errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "three")
    assert names(tmp_path) == {"a"}
    assert path.read_bytes() == b"two"
