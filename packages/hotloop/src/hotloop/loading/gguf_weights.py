"""The weights of a GGUF file under transformers' names, as the family's description maps them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hotloop_core import CustomBlock
from hotloop_core.errors import UnsupportedError
from hotloop_core.gguf import NAMES, gguf_name

from .stored import Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from hotloop_core import FamilySpec, ModelFacts
    from torch import Tensor

    from .gguf_file import GgufFile

_INVERSES: dict[str, Callable[[Tensor, ModelFacts], Tensor]] = {
    "rope_interleave_q": lambda tensor, facts: _halves(tensor, facts.heads),
    "rope_interleave_k": lambda tensor, facts: _halves(tensor, facts.kv_heads),
    "add_one": lambda tensor, _: tensor - 1.0,
}
"""What undoes a transform that a family's `ExportFacts.transforms` name."""

_NOT_WEIGHTS = frozenset(
    {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
)
"""Tensors that the config holds."""


def gguf_tensors(
    file: GgufFile, spec: FamilySpec, facts: ModelFacts, dtype: torch.dtype
) -> dict[str, Stored]:
    """Every tensor of the file by state-dict key, each dequantised to `dtype` on the host when it is loaded.

    A tensor that the family has no place for keeps its own name, so that it is reported as surplus.

    Raises:
        UnsupportedError: the family does not say how it is kept in a GGUF file.

    """
    exported = spec.exports.get("gguf")
    if exported is None:
        raise UnsupportedError(
            f"family {spec.name!r} does not say how it is kept in a GGUF file "
            "(FamilySpec.exports); load the model's original folder"
        )
    places: dict[str, tuple[str, str | None]] = {}
    for role, layer, path in _paths(spec, facts):
        name = gguf_name(exported, role, layer)
        if name is None:
            continue
        for part in ("weight", "bias"):
            key = f"{name}.{part}"
            places[key] = (f"{path}.{part}", exported.transforms.get(role))
    found: dict[str, Stored] = {}
    for name, tensor in file.tensors.items():
        if name in _NOT_WEIGHTS:
            continue
        key, transform = places.get(name, (name, None))
        if transform is not None and transform not in _INVERSES:
            raise UnsupportedError(
                f"family {spec.name!r}: the transform {transform!r} of {name} cannot be undone "
                f"here; known are {', '.join(_INVERSES)}"
            )
        make = partial(_dequantised, file, name, transform, facts, dtype)
        found[key] = Stored(key, tensor.shape, dtype, make=make)
    return found


def _dequantised(
    file: GgufFile, name: str, transform: str | None, facts: ModelFacts, dtype: torch.dtype
) -> Tensor:
    import torch

    tensor = torch.from_numpy(file.dequantise(name))
    if transform is not None:
        tensor = _INVERSES[transform](tensor, facts)
    return tensor.to(dtype)


def _paths(spec: FamilySpec, facts: ModelFacts) -> Iterator[tuple[str, int | None, str]]:
    """(role, layer, module path) of everything that a description names."""
    yield "embedding", None, spec.embedding
    yield "final_norm", None, spec.final_norm
    yield "head", None, spec.head
    for index in range(facts.layers):
        layer = spec.layer_spec(facts.config, index)
        for part in (layer.norms, layer.attention, layer.mlp):
            fields = part.projections if isinstance(part, CustomBlock) else vars(part)
            for role in NAMES.keys() & fields.keys():
                path = fields[role]
                if isinstance(path, str):
                    yield role, index, f"{spec.layers}.{index}.{path}"


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from even/odd pairs to two halves; [heads * head_dim, ...]."""
    size = tensor.shape[0] // heads // 2
    pairs = tensor.reshape(heads, size, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
