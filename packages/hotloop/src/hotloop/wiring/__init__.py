"""Puts the engine underneath one transformers model, module by module, and takes it out again."""

from __future__ import annotations

from math import isclose
from typing import TYPE_CHECKING, Any

from hotloop_core import (
    Attention,
    CustomBlock,
    FamilySpec,
    Glu,
    LayerSpec,
    ModelFacts,
    Plan,
    Registry,
    discover,
    facts_of,
)
from hotloop_core.errors import UnsupportedError, WireError
from hotloop_core.plan import KEEP_ALL

from hotloop.homes import homes_of

from . import masks, optimizer
from .classes import STATE, wired_class
from .layer import LayerState, Shared, check_modules, module_paths
from .norm import NormState, leaf_norms
from .receipt import Receipt, Swap, check_plan
from .root import RootState
from .targets import load_target
from .views import EXCEPTIONS, Refusal, check_path, linear_view, plain_module, refuse

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import nn

__all__ = ["EXCEPTIONS", "Receipt", "receipt_of", "wire"]


def wire(
    model: nn.Module,
    plan: Plan | None = None,
    allow_eager: Collection[str] = (),
    *,
    family: str | None = None,
    ops: Mapping[str, str] | None = None,
    attention: str | None = None,
    deterministic: bool = False,
    cuda_graphs: bool = True,
    registry: Registry | None = None,
) -> Receipt:
    """Replaces what runs underneath a transformers model; the model, its parameters and its API stay.

    Args:
        model: a ...ForCausalLM, or a PEFT model over one. Adapters may come before or after.
        plan: where the tensors that backward needs live; None keeps all (`hotloop.plan` makes one that fits).
        allow_eager: one name or several of what may run through the model's own code where a block cannot do it (see
            EXCEPTIONS); anything else is refused.
        family: which family describes the model, where several plugins claim it.
        ops: op name -> implementation name ("reference", "triton", a plugin's); the rest is chosen by the device.
        attention: a backend's name, instead of the fastest that can.
        deterministic: only attention backends whose backward gives the same bits every time.
        cuda_graphs: whether layers are recorded as CUDA graphs, once batches that divide alike have come eight times,
            where memory for it is free. Small batches are then not bound by the host; the bits are the same.
        registry: what is installed; None looks.

    Returns:
        A receipt: what was replaced, and `undo()`.

    Raises:
        NoFamilyError: no installed plugin describes the model.
        WireError: the model is wired, is not what its family describes, or has something that the blocks do not do;
            or an argument names what there is not.
        PlanError: the plan is for another model.
    """
    allowed = {allow_eager} if isinstance(allow_eager, str) else set(allow_eager)
    unknown = allowed - set(EXCEPTIONS)
    if unknown:
        raise WireError(
            f"allow_eager: no exception is called {', '.join(sorted(unknown))}; expected some of "
            + "; ".join(f"{name} ({what})" for name, what in EXCEPTIONS.items())
        )
    root = _root(model)
    if STATE in root.__dict__:
        raise WireError("this model is wired; undo it first: receipt_of(model).undo()")
    registry = discover() if registry is None else registry
    config = root.config.to_dict()  # type: ignore[union-attr]
    spec = registry.match(config, family=family)
    facts = facts_of(spec, config)
    _register_ops(registry)
    _check_ops(ops or {}, registry)
    if plan is None:
        plan = Plan(layers=(KEEP_ALL,) * facts.layers, tokens=0, longest=0)
    check_plan(plan, facts.layers)
    shared = Shared(
        facts,
        plan,
        frozenset(allowed),
        dict(ops or {}),
        attention,
        deterministic,
        homes=homes_of(root),
        cuda_graphs=cuda_graphs,
    )
    layers = _layers(root, spec, facts)
    left_alone = _check(root, layers, spec, shared, config)
    return _swap(root, spec, shared, layers, left_alone)


def receipt_of(model: nn.Module) -> Receipt | None:
    """The receipt of a wired model (or of the model under PEFT), None where it is not wired."""
    state = _root(model).__dict__.get(STATE)
    return None if state is None else state.receipt


def _root(model: Any) -> Any:
    """The transformers model itself, under PEFT and torch.compile where they are there."""
    model = getattr(model, "_modules", {}).get("_orig_mod", model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(inner, "config") or not hasattr(inner, "get_output_embeddings"):
        raise WireError(
            f"expected a transformers ...ForCausalLM (or a PEFT model over one), found {type(model).__name__}. "
            "Pass the model itself, not a wrapper such as DDP."
        )
    return inner


_registered_ops: set[tuple[str, str]] = set()


def _register_ops(registry: Registry) -> None:
    """Makes plugins' op implementations known to the engine; each once per process."""
    from functools import partial

    from hotloop_engine.ops._select import register

    for op in registry.ops:
        if (op.op, op.name) not in _registered_ops:
            register(op.op, op.name, partial(load_target, op.target), op.devices)
            _registered_ops.add((op.op, op.name))


def _check_ops(ops: Mapping[str, str], registry: Registry) -> None:
    """Refuses a name that no op has: it would change nothing."""
    from hotloop_engine.ops._select import ENGINE_OPS

    known = {*ENGINE_OPS, *(op.op for op in registry.ops)}
    if unknown := ops.keys() - known:
        raise WireError(
            f"ops: no op is called {', '.join(sorted(unknown))}; expected some of {', '.join(sorted(known))}"
        )


def _layers(root: Any, spec: FamilySpec, facts: ModelFacts) -> list[LayerState | Any]:
    try:
        layers = list(root.get_submodule(spec.layers))
        root.get_submodule(spec.final_norm)
    except AttributeError as error:
        raise WireError(
            f"family {spec.name!r} says that the layers are at {spec.layers!r} and the last norm at "
            f"{spec.final_norm!r}; {type(root).__name__} has no such module ({error}). Load the ...ForCausalLM class "
            "of this model."
        ) from None
    if len(layers) != facts.layers:
        raise WireError(
            f"config says {facts.layers} layers, {spec.layers} has {len(layers)}; set the config to what the model has"
        )
    return layers


def _check(
    root: Any, layers: list[Any], spec: FamilySpec, shared: Shared, config: Mapping[str, Any]
) -> dict[str, str]:
    """Refuses what cannot be wired; returns what stays with the model's own code, by path."""
    if not config.get("is_causal", True):
        raise WireError(
            "config.is_causal is False: this model attends in both directions, the blocks do not"
        )
    if "forward" in root.__dict__:
        raise WireError(
            "the model's forward was replaced on the instance (by a trainer, TRL or accelerate), so wiring would be "
            "passed by. Wire the model before you hand it to a trainer."
        )
    left_alone: dict[str, str] = {}
    for index, layer in enumerate(layers):
        path = f"{spec.layers}.{index}"
        try:
            check_layer(path, layer, spec.layer_spec(config, index))
            _check_modules(path, layer, spec.layer_spec(config, index), shared)
        except Refusal as refusal:
            if refusal.name not in shared.allow_eager:
                raise refuse(path, refusal) from None
            left_alone[path] = f"runs the model's own code: {refusal}"
    return left_alone


def check_layer(path: str, layer: nn.Module, spec: LayerSpec) -> None:
    """Whether a layer is what its description says: every module is there, every parameter claimed, none twice.

    Raises:
        WireError, UnsupportedError: what is missing, left over or not supported, by path.
        Refusal: PEFT stands around a whole block.
    """
    attention, mlp = spec.attention, spec.mlp
    if not (isinstance(attention, Attention | CustomBlock) and isinstance(mlp, Glu | CustomBlock)):
        raise UnsupportedError(
            f"{path}: {type(attention).__name__} with {type(mlp).__name__}; the engine has blocks for Attention and "
            "Glu, and takes a family's own as CustomBlock. Train this model without wiring it."
        )
    q_k = isinstance(attention, Attention) and (attention.q_norm or attention.k_norm)
    if spec.norms.kind == "layer" and q_k:
        raise UnsupportedError(
            f"{path}: norms over q and k that are layer norms; the engine has RMS norms there. Train this model "
            "without wiring it."
        )
    paths = module_paths(spec)
    doubled = {p for p in paths.values() if list(paths.values()).count(p) > 1}
    if doubled:
        raise WireError(f"{path}: the description claims {', '.join(sorted(doubled))} twice")
    for inner in paths.values():
        check_path(layer, inner)
    names = {name for name, _ in layer.named_modules()}
    missing = {role: p for role, p in paths.items() if p not in names}
    if missing:
        raise WireError(
            f"{path}: {type(layer).__name__} has no "
            + ", ".join(f"{p} ({role})" for role, p in missing.items())
            + ". The family's description does not fit this model; see docs/write-a-family.md"
        )
    claimed = tuple(f"{p}." for p in paths.values())
    left = [name for name, _ in layer.named_parameters() if not f"{name}.".startswith(claimed)]
    if left:
        raise WireError(
            f"{path}: parameters that the description does not claim: {', '.join(left[:8])}. They would be passed "
            "by; extend the family's description."
        )


def _check_modules(path: str, layer: nn.Module, spec: LayerSpec, shared: Shared) -> None:
    if "forward" in layer.__dict__ or "_hf_hook" in layer.__dict__:
        raise Refusal("offload", f"{path}: accelerate hooks the layer's forward")
    if isinstance(spec.attention, Attention):
        _check_scale(path, layer, spec.projections["o"], shared.facts.attention_scale)
    check_modules(layer)
    for role, name in module_paths(spec).items():
        if role in spec.projections:
            linear_view(layer.get_submodule(name))
        else:
            plain_module(layer.get_submodule(name))


def _check_scale(path: str, layer: nn.Module, o: str, expected: float) -> None:
    """The scale of the scores is the config's; transformers' modules hold one of their own, that somebody may set."""
    found = getattr(layer.get_submodule(o.rpartition(".")[0]), "scaling", expected)
    if isinstance(found, float) and not isclose(found, expected, rel_tol=1e-6):
        raise WireError(
            f"{path}: its attention scales by {found}, config says {expected}. Set the config to what the model does."
        )


def _swap(
    root: Any, spec: FamilySpec, shared: Shared, layers: list[Any], left_alone: dict[str, str]
) -> Receipt:
    original = root.config._attn_implementation or "eager"
    name = masks.register(original)
    receipt = Receipt(root, spec, shared, [], (original, name), left_alone)
    config = shared.facts.config
    norms = spec.layer_spec(config, 0).norms

    def swap(path: str, module: nn.Module, role: str, state: object) -> None:
        receipt.swaps.append(Swap(path, module, type(module), role))
        module.__dict__[STATE] = state
        module.__class__ = wired_class(type(module), role)

    for index, layer in enumerate(layers):
        path = f"{spec.layers}.{index}"
        if path not in left_alone:
            swap(
                path,
                layer,
                "layer",
                LayerState(path, index, spec.layer_spec(config, index), shared),
            )
    for path, norm in leaf_norms(spec.final_norm, root.get_submodule(spec.final_norm)):
        swap(path, norm, "norm", NormState(norms, shared))
    swap("", root, "root", RootState(spec, shared, receipt))
    root.config._attn_implementation = name
    optimizer.attend(root)
    return receipt
