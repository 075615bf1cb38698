"""Which role of a family's description each module of a model plays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotloop_core import (
    Attention,
    CustomBlock,
    FamilySpec,
    Glu,
    LatentAttention,
    LayerSpec,
    MixtureOfExperts,
    Norms,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotloop_core.family import Config

_ROLES: dict[type, tuple[str, ...]] = {
    Norms: ("before_attention", "before_mlp", "after_attention", "after_mlp"),
    Attention: ("q", "k", "v", "qkv", "o", "q_norm", "k_norm"),
    Glu: ("gate", "up", "gate_up", "down"),
    LatentAttention: ("q", "q_down", "q_up", "q_norm", "kv_down", "kv_up", "kv_norm", "o"),
    MixtureOfExperts: ("router", "experts_gate_up", "experts_down"),
}
"""The fields of each part of a description that are module paths, which are also the names of the roles."""


@dataclass(frozen=True)
class Place:
    """A role and its layer; `layer` is None outside the layers."""

    role: str
    layer: int | None


class Places:
    """The places of a model's modules, by their path (or a parameter's own, for fused experts)."""

    def __init__(self, family: FamilySpec, config: Config, layers: int) -> None:
        self._by_path = {
            family.embedding: Place("embedding", None),
            family.final_norm: Place("final_norm", None),
            family.head: Place("head", None),
        }
        for index in range(layers):
            for path, role in _paths(family.layer_spec(config, index)):
                self._by_path[f"{family.layers}.{index}.{path}"] = Place(role, index)

    def find(self, name: str) -> tuple[Place, str]:
        """The place and the part ("weight", "bias", ...) of the tensor `name`; role "other" where it has none."""
        if name in self._by_path:
            return self._by_path[name], "weight"
        path, _, part = name.rpartition(".")
        return self._by_path.get(path, Place("other", None)), part


def _paths(layer: LayerSpec) -> Iterator[tuple[str, str]]:
    mlp = layer.mlp
    for part in (layer.norms, layer.attention, mlp):
        yield from _fields(part)
    if isinstance(mlp, MixtureOfExperts) and mlp.shared is not None:
        yield from ((path, f"shared_{role}") for path, role in _fields(mlp.shared))


def _fields(part: object) -> Iterator[tuple[str, str]]:
    if isinstance(part, CustomBlock):
        yield from ((path, role) for role, path in part.projections.items())
    for role in _ROLES.get(type(part), ()):
        path: str | None = getattr(part, role)
        if path is not None:
            yield path, role
