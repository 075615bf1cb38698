"""Writes GGUF files, several quantisations in one pass over the weights, one tensor at a time."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotloop_core.errors import ExportError, UnsupportedError
from hotloop_core.exporter import ExportReport
from hotloop_core.files import Outputs

from . import metadata
from .encoders import encode
from .mixes import BLOCKS, MIXES, Choice, Mix, storage
from .names import tensor_name
from .tokenizer import Tokenizer
from .transforms import transform_named
from .writer import GgufWriter, TensorInfo, data_bytes, header

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hotloop_core import ExportFacts, ExportRequest
    from torch import Tensor

    from .writer import Value

_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Planned:
    """A tensor of the file: its storage type in each of the mixes, and how to get it."""

    name: str
    source: str
    shape: tuple[int, ...]
    choices: tuple[Choice, ...]
    load: Callable[[], Tensor]

    def info(self, mix: int) -> TensorInfo:
        """Its place in the file of mix number `mix`."""
        return TensorInfo(self.name, self.shape, self.choices[mix].block)


def export(request: ExportRequest) -> ExportReport:
    """Writes one file for each of the quantisations that `request` asks for.

    Raises:
        UnsupportedError: the family says nothing of GGUF, or the format cannot hold this model.
        CheckpointError: tokenizer and embedding disagree.
        OutputExistsError, ExportError: see `hotloop_core.files.Outputs`.

    """
    facts = _export_facts(request)
    mixes = [MIXES[name] for name in request.quants]
    planned = _plan(request, facts, mixes)
    shared = metadata.hyperparameters(request.facts, facts) | _tokenizer(request)
    names = [f"{request.name}-{mix.name.upper()}.gguf" for mix in mixes]
    with Outputs(request.directory, overwrite=request.overwrite) as outputs:
        outputs.check(names)
        files = [
            (metadata.general(request, facts, mix.number) | shared, [p.info(i) for p in planned])
            for i, mix in enumerate(mixes)
        ]
        outputs.require_space(sum(len(header(*f)) + data_bytes(f[1]) for f in files))
        _write(request, outputs, names, files, planned)
    return ExportReport(
        format="gguf",
        quants=request.quants,
        files=tuple(sorted(outputs.files, key=lambda file: names.index(file.path.name))),
        tensors=len(planned),
        notes=(*metadata.notes(request.facts, facts), *_narrowed(mixes, planned)),
    )


def _export_facts(request: ExportRequest) -> ExportFacts:
    facts = request.family.exports.get("gguf")
    if facts is None:
        raise UnsupportedError(
            f"the family {request.family.name!r} does not say how it is written to GGUF. "
            "Export as safetensors, or add ExportFacts for 'gguf' to the family."
        )
    if request.contents != "merged":
        raise UnsupportedError("GGUF files are written of merged models")
    return facts


def _plan(request: ExportRequest, facts: ExportFacts, mixes: Sequence[Mix]) -> list[Planned]:
    model = request.facts
    planned = [
        Planned(
            name=tensor_name(entry, facts),
            source=entry.name,
            shape=entry.shape,
            choices=tuple(storage(mix, entry, model, tied=model.tied) for mix in mixes),
            load=_transformed(entry.load, facts.transforms.get(entry.role), request),
        )
        for entry in request.tensors
    ]
    factors = metadata.rope_factors(model)
    if factors is not None:
        planned.insert(0, _rope_factors(factors, len(mixes)))
    repeated = [name for name, count in Counter(p.name for p in planned).items() if count > 1]
    if repeated:
        raise ExportError(f"two tensors map to {repeated[0]!r}; correct the family's ExportFacts")
    return planned


def _transformed(
    load: Callable[[], Tensor], transform: str | None, request: ExportRequest
) -> Callable[[], Tensor]:
    if transform is None:
        return load
    apply = transform_named(transform)
    return lambda: apply(load(), request.facts)


def _rope_factors(factors: list[float], mixes: int) -> Planned:
    def load() -> Tensor:
        import torch

        return torch.tensor(factors)

    choice = Choice(BLOCKS["F32"])
    return Planned(_ROPE_FACTORS, _ROPE_FACTORS, (len(factors),), (choice,) * mixes, load)


def _tokenizer(request: ExportRequest) -> dict[str, Value]:
    tokenizer = Tokenizer.read(request.source)
    rows = [entry.shape[0] for entry in request.tensors if entry.role == "embedding"]
    if request.tokenize is None or len(rows) != 1:
        raise ExportError(
            "a GGUF file needs the model's tokenizer and exactly one embedding; found "
            f"{'no' if request.tokenize is None else 'a'} tokenizer and {len(rows)} embeddings"
        )
    return tokenizer.metadata(rows[0], request.tokenize, request.chat_template)


def _write(
    request: ExportRequest,
    outputs: Outputs,
    names: Sequence[str],
    files: Sequence[tuple[Mapping[str, Value], Sequence[TensorInfo]]],
    planned: Sequence[Planned],
) -> None:
    with ExitStack() as opened:
        writers = [
            GgufWriter(opened.enter_context(outputs.open(name)), *file)
            for name, file in zip(names, files, strict=True)
        ]
        for done, tensor in enumerate(planned, 1):
            _write_tensor(writers, tensor)
            if request.progress is not None:
                request.progress(done, len(planned), tensor.source)


def _write_tensor(writers: Sequence[GgufWriter], tensor: Planned) -> None:
    value = tensor.load()
    if tuple(value.shape) != tensor.shape:
        raise ExportError(
            f"{tensor.source} was announced with shape {tensor.shape} and loaded with "
            f"{tuple(value.shape)}; this is a fault of the tensor stream"
        )
    for writer, choice in zip(writers, tensor.choices, strict=True):
        writer.write(tensor.name, encode(value, choice.block, tensor.source))


def _narrowed(mixes: Sequence[Mix], planned: Sequence[Planned]) -> list[str]:
    notes: list[str] = []
    for i, mix in enumerate(mixes):
        counts = Counter(
            (p.choices[i].wanted, p.choices[i].block.name) for p in planned if p.choices[i].wanted
        )
        notes += [
            f"{mix.name}: {count} tensors are {used} instead of {wanted}, whose blocks do not "
            "divide their width"
            for (wanted, used), count in counts.items()
        ]
    return notes
