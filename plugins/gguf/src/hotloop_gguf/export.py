"""Writes GGUF files, several quantisations in one pass over the weights, in blocks of rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hotloop_core.errors import ExportError, UnsupportedError
from hotloop_core.exporter import ExportReport, Importance
from hotloop_core.files import Outputs

from . import adapter, metadata
from .encoders import encode
from .imatrix import FILES, IMATRIX, imatrix_bytes, read_imatrix
from .mixes import BLOCKS, MIXES, Choice, Mix, storage
from .modelfile import modelfiles
from .names import tensor_name
from .pipeline import Planned, plan_output, write_outputs
from .tokenizer import Tokenizer
from .transforms import transform_named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hotloop_core import ExportFacts, ExportRequest, TensorEntry
    from torch import Tensor

    from .pipeline import Encoder
    from .writer import Value


@dataclass(frozen=True)
class Quantisation:
    """What one file holds. name: as in its file name. number: llama.cpp's `general.file_type`.

    choose: tensor -> storage type, among `hotloop_gguf.mixes.BLOCKS`.
    """

    name: str
    number: int
    choose: Callable[[TensorEntry], Choice]


def export(request: ExportRequest) -> ExportReport:
    """Writes one file for each of the quantisations that `request` asks for, or the adapter alone.

    Raises:
        UnsupportedError: the family says nothing of GGUF, or the format cannot hold this model.
        CheckpointError: tokenizer and embedding disagree.
        OutputExistsError, ExportError: see `hotloop_core.files.Outputs`.

    """
    facts = _export_facts(request)
    if request.contents == "adapter":
        return adapter.export(request, facts)
    return write(request, [_of_mix(MIXES[q], request) for q in request.quants if q in MIXES])


def write(
    request: ExportRequest, quantisations: Sequence[Quantisation], *, encoder: Encoder = encode
) -> ExportReport:
    """Writes the merged model in quantisations of the caller's making: `export` for those that are not in `MIXES`.

    encoder: makes the bytes; another may search better within the same storage types.

    Raises:
        UnsupportedError, CheckpointError, OutputExistsError, ExportError: as `export`.

    """
    facts = _export_facts(request)
    importance, found_in = _importance(request, facts)
    choices = [[q.choose(entry) for q in quantisations] for entry in request.tensors]
    planned = _plan(request, facts, choices, importance)
    tokenizer = Tokenizer.read(request.source)
    shared = metadata.hyperparameters(request.facts, facts) | _tokenizer(request, tokenizer)
    files = []
    for i, quantisation in enumerate(quantisations):
        keys = metadata.general(request, facts, quantisation.number) | shared | found_in
        infos = [tensor.info(i) for tensor in planned]
        stem = f"{request.name}-{quantisation.name.upper()}"
        files.append((stem, plan_output(stem, keys, infos, request.max_shard_bytes)))
    small, notes = modelfiles(request, tokenizer, [(stem, [*o.files]) for stem, o in files])
    for kind in FILES:
        if kind in request.quants:
            suffix = "gguf" if kind == IMATRIX else "dat"
            small[f"{request.name}-imatrix.{suffix}"] = imatrix_bytes(request, facts, kind)
    names = [name for _, output in files for name in output.files] + [*small]
    with Outputs(request.directory, overwrite=request.overwrite) as outputs:
        outputs.check(names)
        outputs.require_space(sum(output.bytes for _, output in files))
        for name, content in small.items():
            outputs.write(name, content)
        if files:
            plans = [output for _, output in files]
            write_outputs(outputs, plans, planned, request.progress, encoder)
    return ExportReport(
        format="gguf",
        quants=request.quants,
        files=tuple(sorted(outputs.files, key=lambda file: names.index(file.path.name))),
        tensors=len(planned),
        notes=(
            *metadata.notes(request.facts, facts),
            *(note for i, q in enumerate(quantisations) for note in _narrowed(q.name, i, choices)),
            *_unweighted(request, choices, importance),
            *tokenizer.notes,
            *notes,
        ),
    )


def _of_mix(mix: Mix, request: ExportRequest) -> Quantisation:
    model, measured = request.facts, request.importance is not None

    def choose(entry: TensorEntry) -> Choice:
        return storage(mix, entry, model, tied=model.tied, imatrix=measured)

    return Quantisation(mix.name, mix.number, choose)


def _export_facts(request: ExportRequest) -> ExportFacts:
    facts = request.family.exports.get("gguf")
    if facts is None:
        raise UnsupportedError(
            f"the family {request.family.name!r} does not say how it is written to GGUF. "
            "Export as safetensors, or add ExportFacts for 'gguf' to the family."
        )
    return facts


def _plan(
    request: ExportRequest,
    facts: ExportFacts,
    choices: Sequence[Sequence[Choice]],
    importance: Importance | None,
) -> list[Planned]:
    columns = {} if importance is None else importance.columns
    planned = [
        Planned(
            name=tensor_name(entry, facts),
            source=entry.name,
            shape=entry.shape,
            blocks=tuple(choice.block for choice in chosen),
            parts=_parts(entry, facts.transforms.get(entry.role), request),
            importance=columns.get(entry.name),
        )
        for entry, chosen in zip(request.tensors, choices, strict=True)
    ]
    for name, factors in metadata.rope_factors(request.facts).items():
        planned.insert(0, _rope_factors(name, factors, len(choices[0])))
    repeated = [name for name, count in Counter(p.name for p in planned).items() if count > 1]
    if repeated:
        raise ExportError(f"two tensors map to {repeated[0]!r}; correct the family's ExportFacts")
    for tensor in planned:
        weights = tensor.importance
        if weights is not None and weights.shape[-1] != tensor.shape[-1]:
            raise ExportError(
                f"the importance matrix has {weights.shape[-1]} columns for {tensor.source}, which has "
                f"{tensor.shape[-1]}: it was measured on another model. Measure it on this one."
            )
    return planned


def _parts(
    entry: TensorEntry, transform: str | None, request: ExportRequest
) -> Callable[[int], Iterator[tuple[int, Tensor]]]:
    if transform is None:
        return entry.parts
    apply, model = transform_named(transform), request.facts

    def parts(elements: int) -> Iterator[tuple[int, Tensor]]:
        for start, part in entry.parts(elements, multiple=model.head_dim):
            yield start, apply(part, model)

    return parts


def _rope_factors(name: str, factors: list[float], outputs: int) -> Planned:
    def parts(_: int) -> Iterator[tuple[int, Tensor]]:
        import torch

        yield 0, torch.tensor(factors)

    return Planned(name, name, (len(factors),), (BLOCKS["F32"],) * outputs, parts)


def _importance(
    request: ExportRequest, facts: ExportFacts
) -> tuple[Importance | None, dict[str, Value]]:
    """The importance by the names of the model's tensors, and what the file says of it."""
    given = request.importance
    if given is None:
        return None, {}
    if isinstance(given, Path):
        names = {tensor_name(entry, facts): entry.name for entry in request.tensors}
        given = read_imatrix(given, names)
    return given, {
        "quantize.imatrix.dataset": given.source,
        "quantize.imatrix.entries_count": len(given.columns),
    }


def _tokenizer(request: ExportRequest, tokenizer: Tokenizer) -> dict[str, Value]:
    rows = [entry.shape[0] for entry in request.tensors if entry.role == "embedding"]
    if request.tokenize is None or len(rows) != 1:
        raise ExportError(
            "a GGUF file needs the model's tokenizer and exactly one embedding; found "
            f"{'no' if request.tokenize is None else 'a'} tokenizer and {len(rows)} embeddings"
        )
    return tokenizer.metadata(rows[0], request.tokenize, request.chat_template)


def _unweighted(
    request: ExportRequest, choices: Sequence[Sequence[Choice]], importance: Importance | None
) -> list[str]:
    """Embedding and head go without, as in llama.cpp; of the layers' tensors the user should know."""
    if importance is None:
        return []
    without = [
        entry.name
        for entry, chosen in zip(request.tensors, choices, strict=True)
        if entry.layer is not None and entry.name not in importance.columns
        if any(choice.block.values > 1 for choice in chosen)
    ]
    if not without:
        return []
    return [
        f"{len(without)} tensors are quantised without importance, which was not measured for them; the "
        f"first is {without[0]}"
    ]


def _narrowed(name: str, output: int, choices: Sequence[Sequence[Choice]]) -> list[str]:
    chosen = [row[output] for row in choices if row[output].wanted]
    counts = Counter((choice.wanted, choice.block.name) for choice in chosen)
    return [
        f"{name}: {count} tensors are {used} instead of {wanted}, whose blocks do not divide their width"
        for (wanted, used), count in counts.items()
    ]
