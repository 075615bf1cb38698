"""The suite that an exporter passes: whole files or none, exact reports, a few tensors at a time."""

# ruff: noqa: D102 - the name of a check is its claim

from __future__ import annotations

import hashlib
import weakref
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hotloop_core.errors import ExportError, OutputExistsError

from .conformance import Conformance, assert_import_is_light, module_of, plugin_with
from .tiny import build, tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from hotloop_core import ExporterSpec, ExportReport, ExportRequest, TensorEntry

VOCABULARY = 320


class ExporterConformance(Conformance, kit=True):
    """Checks one exporter on a tiny Llama.

        class TestNumpy(ExporterConformance):
            spec = NUMPY

    spec: as the installed plugin offers it. quant: which of its quantisations; None: its default.
    """

    spec: ClassVar[ExporterSpec]
    quant: ClassVar[str | None] = None

    def test_the_plugin_is_installed_and_its_import_is_light(self) -> None:
        assert_import_is_light(module_of(plugin_with("exporters", self.spec)))

    def test_every_alias_stands_for_a_quantisation(self) -> None:
        assert self.spec.quants, "an exporter has at least one quantisation"
        assert {self.spec.resolve(name) for name in self.spec.aliases} <= set(self.spec.quants)
        assert self.spec.adapter_quants <= set(self.spec.quants)

    def test_the_report_is_what_lies_on_the_disk(self, tmp_path: Path) -> None:
        report = self._export(tmp_path)
        assert report.format == self.spec.name and report.quants == (self._quant(),)
        assert {f.path for f in report.files} == {f for f in tmp_path.rglob("*") if f.is_file()}
        for file in report.files:
            data = file.path.read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
        assert report.tensors > 0

    def test_the_same_model_gives_the_same_bytes(self, tmp_path: Path) -> None:
        first, second = (self._export(tmp_path / name) for name in ("a", "b"))
        assert [f.sha256 for f in first.files] == [f.sha256 for f in second.files]

    def test_an_existing_output_is_kept_unless_it_may_be_replaced(self, tmp_path: Path) -> None:
        before = {f.path: f.sha256 for f in self._export(tmp_path).files}
        with pytest.raises(OutputExistsError):
            self._export(tmp_path)
        found = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in before}
        assert found == before
        again = self._export(tmp_path, change=lambda request: replace(request, overwrite=True))
        assert {f.path: f.sha256 for f in again.files} == before

    def test_a_failure_in_the_middle_leaves_nothing(self, tmp_path: Path) -> None:
        def broken(entry: TensorEntry, index: int) -> torch.Tensor:
            if index == 5:
                raise ExportError("the sixth tensor cannot be read")
            return entry.load()

        with pytest.raises(ExportError, match="sixth"):
            self._export(tmp_path, change=_loading(broken))
        assert not list(tmp_path.rglob("*"))

    def test_a_few_tensors_are_held_at_a_time(self, tmp_path: Path) -> None:
        alive: list[weakref.ref[torch.Tensor]] = []
        most = 0

        def counted(entry: TensorEntry, _: int) -> torch.Tensor:
            nonlocal most
            most = max(most, sum(ref() is not None for ref in alive))
            tensor = entry.load().clone()
            alive.append(weakref.ref(tensor))
            return tensor

        self._export(tmp_path, change=_loading(counted))
        # One in use, one read ahead, one being written and one waiting for that.
        assert most <= 4, f"{most} earlier tensors were alive while the next was loaded"

    def test_progress_counts_every_tensor(self, tmp_path: Path) -> None:
        calls: list[tuple[int, int, str]] = []

        def watched(request: ExportRequest) -> ExportRequest:
            def note(done: int, total: int, name: str) -> None:
                calls.append((done, total, name))

            return replace(request, progress=note)

        self._export(tmp_path, change=watched)
        assert [done for done, _, _ in calls] == list(range(1, len(calls) + 1))
        assert calls and {total for _, total, _ in calls} == {len(calls)}

    def _quant(self) -> str:
        return next(iter(self.spec.quants)) if self.quant is None else self.spec.resolve(self.quant)

    def _export(
        self, directory: Path, change: Callable[[ExportRequest], ExportRequest] = lambda r: r
    ) -> ExportReport:
        """Exports through `hotloop.export`, with the request as `change` makes it on the way to the exporter."""
        from hotloop.exporting import export
        from transformers import LlamaConfig

        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            bos_token_id=0,
            eos_token_id=1,
        )
        module, _, function = self.spec.target.partition(":")
        holder: Any = import_module(module)
        write = getattr(holder, function)

        def changed(request: ExportRequest) -> ExportReport:
            return write(change(request))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(holder, function, changed)
            return export(
                build(config),
                tokenizer(VOCABULARY),
                directory,
                format=self.spec.name,
                quant=self._quant(),
                name="tiny",
            )


class _Stream:
    """A tensor stream whose tensors are loaded by `load(entry, index)`."""

    def __init__(self, entries: Any, load: Callable[[TensorEntry, int], torch.Tensor]) -> None:
        self.entries, self.load = entries, load

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[TensorEntry]:
        for index, entry in enumerate(self.entries):
            yield replace(entry, load=lambda e=entry, i=index: self.load(e, i), rows=None)


def _loading(
    load: Callable[[TensorEntry, int], torch.Tensor],
) -> Callable[[ExportRequest], ExportRequest]:
    return lambda request: replace(request, tensors=_Stream(request.tensors, load))
