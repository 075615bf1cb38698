"""What an exporter receives and returns. An exporter sees core only: no transformers, no PEFT, no model object."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .errors import ConfigError, ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, dtype

    from .facts import ModelFacts
    from .family import FamilySpec

Contents = Literal["merged", "adapter"]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a model, loaded when asked for.

    name: the state-dict key (for an adapter: PEFT's key). role: the place in the family's description ("q", "gate",
    "before_attention", "embedding", "final_norm", "head", "q_norm", ...), or "other". part: "weight", "bias", or
    "lora_A" / "lora_B". layer: its index, None outside the layers. dtype: the live model's, by torch name ("bfloat16";
    of a 4-bit weight, the one that it is dequantised to).
    load(): the tensor on the host or a device, finite, and never rounded on the way: in `dtype`, or in float32 where an
    adapter was merged in, so that the exporter rounds once, to what it writes. It may share memory with the live model:
    read it, drop it before the next, never write to it.
    rows(start, stop): the same for those rows of the first dimension alone; None where only the whole can be had.
    """

    name: str
    role: str
    part: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor]
    rows: Callable[[int, int], Tensor] | None = None

    def parts(self, elements: int, *, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """The tensor in blocks of rows, each with the index of its first row, so that memory stays bounded.

        elements: about the most in a block. multiple: a block's rows are a multiple of it (the last may end sooner).

        Raises:
            ExportError: what was loaded has another shape than announced.

        """
        if not self.shape:
            yield 0, self._checked(self.load(), ())
            return
        take = self.rows or self._slices()
        step = max(1, elements // max(1, prod(self.shape[1:])) // multiple) * multiple
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield start, self._checked(take(start, stop), (stop - start, *self.shape[1:]))

    def _slices(self) -> Callable[[int, int], Tensor]:
        whole = self._checked(self.load(), self.shape)
        return lambda start, stop: whole[start:stop]

    def _checked(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != shape:
            raise ExportError(
                f"{self.name} was announced with shape {shape} and loaded with {tuple(tensor.shape)}; "
                "this is a fault of the tensor stream"
            )
        return tensor


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What each input column of a weight counts for: an importance matrix, measured on data.

    columns: tensor name -> mean of the squared inputs, float32, [columns] ([experts, columns] for stacked experts).
    tokens: how many rows of inputs the means are over. source: what data, for the file that keeps it.
    """

    columns: Mapping[str, Tensor]
    tokens: int
    source: str = ""


class TensorStream(Protocol):
    """Every tensor to export, once, in checkpoint order. It can be iterated again (several quantisations)."""

    def __iter__(self) -> Iterator[TensorEntry]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export and where.

    directory: exists; the exporter puts its files into it, each under a temporary name until all is whole.
    source: a directory with config.json, generation_config.json, tokenizer files, and for an adapter
        adapter_config.json, as transformers and PEFT save them. chat_template: Jinja text or None.
    tokenize: text -> ids without special tokens added, by the model's own tokenizer.
    render: (messages, whether the assistant's turn is opened) -> text, by the model's own chat template; it raises what
        the template raises. None where there is no template.
    quants: names that the exporter declared, one output each. contents: the merged model, or the adapter alone.
    overwrite: replace existing outputs. max_shard_bytes: largest file, where the user asked for one; else the format's
        own habit. importance: measured, or a file of the format's own kind.
    progress: called with (tensors done, tensors in all, name).
    metadata: what a model card says (base model, data, licence ...), plain values.
    """

    family: FamilySpec
    facts: ModelFacts
    tensors: TensorStream
    directory: Path
    source: Path
    name: str
    quants: tuple[str, ...]
    contents: Contents = "merged"
    tokenize: Callable[[str], list[int]] | None = None
    chat_template: str | None = None
    render: Callable[[Sequence[Mapping[str, str]], bool], str] | None = None
    overwrite: bool = False
    max_shard_bytes: int | None = None
    importance: Importance | Path | None = None
    progress: Callable[[int, int, str], None] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """A file that was written: path, size in bytes, and its SHA-256 in hexadecimal."""

    path: Path
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote. dropped: names of tensors left out, with the reason. notes: what a user should know."""

    format: str
    quants: tuple[str, ...]
    files: tuple[ExportedFile, ...]
    tensors: int
    dropped: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(f.bytes for f in self.files)

    def __str__(self) -> str:
        lines = [
            f"{self.format} {', '.join(self.quants)}: {self.tensors} tensors, {self.bytes:,} bytes"
        ]
        lines += [f"  {f.path.name}  {f.bytes:,} bytes  sha256 {f.sha256}" for f in self.files]
        lines += [f"  left out: {name} ({why})" for name, why in self.dropped.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass(frozen=True, kw_only=True)
class ExporterSpec:
    """An export format. target: "package.module:function", a function of ExportRequest that returns ExportReport.

    quants: what a user can ask for, each with one line of explanation; the first is the default. aliases: other names
    for them. adapter_quants: those of them that write the adapter alone.
    """

    api: int
    name: str
    target: str
    summary: str
    quants: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    adapter_quants: frozenset[str] = frozenset()

    def resolve(self, quant: str) -> str:
        """The declared name behind `quant`, which is that name or an alias, in any case.

        Raises:
            ConfigError: the format has no such quantisation.

        """
        lowered = quant.lower()
        name = self.aliases.get(lowered, lowered)
        if name in self.quants:
            return name
        near = difflib.get_close_matches(lowered, [*self.quants, *self.aliases], n=1)
        raise ConfigError(
            f"format {self.name!r} has no quantisation {quant!r}"
            + (f"; did you mean {near[0]!r}? " if near else ". ")
            + f"It has {', '.join(self.quants)}."
        )


def round_tensor(tensor: Tensor, to: dtype, name: str) -> Tensor:
    """`tensor` in the dtype `to`, rounded once to nearest even.

    Raises:
        ExportError: a value is too large for `to` (float16 ends at 65,504).

    """
    from torch import finfo

    if to.is_floating_point and to.itemsize < tensor.dtype.itemsize and tensor.numel():
        low, high = (float(end) for end in tensor.aminmax())
        if max(-low, high) > finfo(to).max:
            raise ExportError(
                f"{name}: a value of {max(-low, high):.3g} does not fit {to}. "
                "Export as bfloat16 or float32 instead."
            )
    return tensor.to(to)
