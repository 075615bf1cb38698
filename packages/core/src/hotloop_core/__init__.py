"""The vocabulary of Hotloop: families, kernels, plans, packing and exporters, as types and laws."""

from .errors import HotloopError
from .exporter import (
    ExportedFile,
    ExporterSpec,
    ExportReport,
    ExportRequest,
    Importance,
    TensorEntry,
    TensorStream,
)
from .facts import ModelFacts, facts_of
from .family import (
    API,
    Attention,
    ConfigKeys,
    CustomBlock,
    ExportFacts,
    FamilySpec,
    Glu,
    LatentAttention,
    LayerSpec,
    MixtureOfExperts,
    Norms,
)
from .hooks import OpSpec, hookimpl, hookspec
from .plan import LayerPlan, Placement, Plan, SavedTensor, saved_tensors
from .registry import Plugin, Registry, discover

__all__ = [
    "API",
    "Attention",
    "ConfigKeys",
    "CustomBlock",
    "ExportFacts",
    "ExportReport",
    "ExportRequest",
    "ExportedFile",
    "ExporterSpec",
    "FamilySpec",
    "Glu",
    "HotloopError",
    "Importance",
    "LatentAttention",
    "LayerPlan",
    "LayerSpec",
    "MixtureOfExperts",
    "ModelFacts",
    "Norms",
    "OpSpec",
    "Placement",
    "Plan",
    "Plugin",
    "Registry",
    "SavedTensor",
    "TensorEntry",
    "TensorStream",
    "discover",
    "facts_of",
    "hookimpl",
    "hookspec",
    "saved_tensors",
]
