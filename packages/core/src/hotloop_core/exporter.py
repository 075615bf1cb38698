"""What an exporter receives and returns. An exporter sees core only: no transformers, no PEFT, no model object."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .errors import ConfigError, ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
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
    """

    name: str
    role: str
    part: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor]


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
    quants: names that the exporter declared, one output each. contents: the merged model, or the adapter alone.
    overwrite: replace existing outputs. progress: called with (tensors done, tensors in all, name).
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
    overwrite: bool = False
    max_shard_bytes: int = 5 * 10**9
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
