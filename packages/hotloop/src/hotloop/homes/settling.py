"""`settle`: carries out what a plan says of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hotloop_core import FamilySpec, Plan, Registry, discover
from hotloop_core.errors import PlanError

from .classes import HOME
from .homes import Homes

if TYPE_CHECKING:
    import torch
    from torch import nn


def settle(
    model: nn.Module,
    plan: Plan,
    *,
    device: torch.device | None = None,
    family: str | None = None,
    registry: Registry | None = None,
) -> Homes:
    """Moves the weights of a loaded model to the homes that a plan gives them; adapters may be there or come later.

    Before `wire`. What the plan does not put on the host is left where it is.

    Args:
        model: a ...ForCausalLM, or a PEFT model over one.
        plan: `embedding_on_host`, `head_on_host` and each layer's `streamed` are read.
        device: where the model computes; None: where its last norm is.
        family: which family describes the model, where several plugins claim it.
        registry: what is installed; None looks.

    Raises:
        PlanError: the model is settled or wired, a weight that is to move trains, or the plan is for another model.
        UnsupportedError: a module that cannot live on the host, by its path.
        BudgetError: the host cannot lock that much memory.
    """
    root: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    spec = (discover() if registry is None else registry).match(
        root.config.to_dict(), family=family
    )
    homes = prepare(root, plan, spec, device or _device(root, spec))
    try:
        homes.move(plan)
    except BaseException:
        homes.undo()
        raise
    return homes


def move_more(root: Any, plan: Plan, spec: FamilySpec) -> Homes:
    """Carries out a plan that has more weights on the host than now, for a wired model.

    Raises:
        PlanError, UnsupportedError, BudgetError: as `settle`.
    """
    homes = homes_of(root) or Homes(root, plan, spec, _device(root, spec))
    homes.move(plan)
    return homes


def carried_out(homes: Homes | None, plan: Plan) -> bool:
    """Whether all that a plan has on the host is there."""
    return not plan.has_weights_on_host if homes is None else homes.hold(plan)


def prepare(root: Any, plan: Plan, spec: FamilySpec, device: torch.device) -> Homes:
    """The homes of a model none of whose weights has moved yet; they may still be to be read."""
    if HOME in root.__dict__:
        raise PlanError(
            "this model's weights have their homes; undo them first: homes_of(model).undo()"
        )
    if "_hotloop" in root.__dict__:
        raise PlanError(
            "this model is wired; settle its weights before that, or undo the wiring: receipt_of(model).undo()"
        )
    count = len(root.get_submodule(spec.layers))
    if len(plan.layers) != count:
        raise PlanError(
            f"the plan is for {len(plan.layers)} layers, the model has {count}; make one for this model: "
            "hotloop.plan(model, tokens=...)"
        )
    return Homes(root, plan, spec, device)


def homes_of(model: Any) -> Homes | None:
    """The homes of a model (or of the model under PEFT); None where all its weights are where torch keeps them."""
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    return root.__dict__.get(HOME)


def _device(root: Any, spec: FamilySpec) -> torch.device:
    return next(root.get_submodule(spec.final_norm).parameters()).device
