"""The step of bitsandbytes' 8-bit AdamW, where it trains a wired model: every tensor at once, by the op `adamw_8bit`.

bitsandbytes updates one tensor after another and waits for the card after each. torch calls hooks around every
optimizer's step; ours updates what it can (see `_takes`) before the step begins, and hides those gradients while
bitsandbytes' own code does the rest: the first step, in which it makes the state, and small tensors with 32-bit state.
State, its keys and its layout stay bitsandbytes'. Paged optimizers, subclasses, optimizers of other models, and (unless
`wire(ops=...)` names an implementation) tensors on a CPU are passed by. See docs/decisions/0021-the-optimizers-step.md.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from hotloop_core.kernels import AdamWOptions, EightBitTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .classes import STATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

CLASSES = ("AdamW8bit", "AdamW", "Adam8bit", "Adam")
"""Names in `bitsandbytes.optim` whose step is this equation."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_wired: WeakSet[nn.Module] = WeakSet()
_hooks: list[RemovableHandle] = []
_hidden: WeakKeyDictionary[Optimizer, list[tuple[Tensor, Tensor | None]]] = WeakKeyDictionary()
_known: WeakKeyDictionary[Optimizer, tuple[list[int], dict[int, str | None]]] = WeakKeyDictionary()
"""For each optimizer, for its parameters' ids: those of wired models, with the op's implementation."""


def attend(root: nn.Module) -> None:
    """From now on, steps of optimizers that train this wired model are taken at once."""
    _wired.add(root)
    _known.clear()
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before))
        _hooks.append(register_optimizer_step_post_hook(_after))


def release(root: nn.Module) -> None:
    """The opposite; without any wired model, torch's optimizers have no hook of ours."""
    _wired.discard(root)
    _known.clear()
    if not _wired:
        while _hooks:
            _hooks.pop().remove()


def _before(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(given is not None for given in (*args[1:], *kwargs.values())):
        return  # a closure makes the gradients within the step; args[0] is the optimizer
    module = sys.modules.get("bitsandbytes.optim")
    if module is None or type(optimizer) not in [getattr(module, name) for name in CLASSES]:
        return
    ours = {} if optimizer.is_paged else _parameters(optimizer)
    if not ours:
        return
    if not optimizer.initialized:  # as its own step would, for state that was loaded
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
    sets: dict[tuple[Any, ...], list[tuple[Tensor, dict[str, Any]]]] = {}
    for parameter, state, settings in _taken(optimizer, ours):
        step = state["step"] + 1
        key = (*settings, step, ours[id(parameter)], parameter.device, parameter.dtype)
        sets.setdefault(key, []).append((parameter, state))
    for (lr, betas, eps, decay, step, implementation, device, _), members in sets.items():
        options = AdamWOptions(
            lr=float(lr), beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=decay, step=step
        )
        _update(device, implementation, options, members)
    taken = [parameter for members in sets.values() for parameter, _ in members]
    _hidden[optimizer] = [(parameter, parameter.grad) for parameter in taken]
    for parameter in taken:
        parameter.grad = None


def _after(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for parameter, gradient in _hidden.pop(optimizer, ()):
        parameter.grad = gradient


def _parameters(optimizer: Optimizer) -> dict[int, str | None]:
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    known = _known.get(optimizer)
    if known is None or known[0] != trained:
        among = set(trained)
        found: dict[int, str | None] = {}
        for root in list(_wired):
            named = root.__dict__[STATE].shared.ops.get("adamw_8bit")
            found |= {id(p): named for p in root.parameters() if id(p) in among}
        known = _known[optimizer] = (trained, found)
    return known[1]


def _taken(
    optimizer: Any, ours: dict[int, str | None]
) -> Iterator[tuple[Tensor, dict[str, Any], tuple[Any, ...]]]:
    """(parameter, state, settings) of what has a gradient, and state that bitsandbytes holds in 8 bits."""
    manager, states = optimizer.mng, optimizer.state
    for g, group in enumerate(optimizer.param_groups):
        of_group = None
        for i, parameter in enumerate(group["params"]):
            gradient = parameter.grad
            if gradient is None or id(parameter) not in ours:
                continue
            if not (ours[id(parameter)] or parameter.device.type == "cuda"):
                continue
            state = states.get(parameter)
            if not state or not _takes(parameter, gradient, state):
                continue
            if id(parameter) in manager.pid2config or (g, i) in manager.index2config:
                settings = _settings(optimizer.get_config(g, i, group))
            else:
                if of_group is None:
                    of_group = _settings(optimizer.get_config(g, i, group))
                settings = of_group
            if settings:
                yield parameter, state, settings


def _settings(found: dict[str, Any]) -> tuple[Any, ...]:
    """(learning rate, betas, eps, weight decay); nothing where the step is another equation."""
    if found["max_unorm"] > 0.0 or found["skip_zeros"]:
        return ()
    return found["lr"], tuple(found["betas"]), found["eps"], found["weight_decay"]


def _takes(parameter: Tensor, gradient: Tensor, state: dict[str, Any]) -> bool:
    """Whether the op can update this one: plain dense tensors on one device, with 8-bit state."""
    plain = type(parameter) in (torch.nn.Parameter, torch.Tensor) and type(gradient) is torch.Tensor
    return (
        plain
        and state["state1"].dtype == torch.uint8
        and parameter.dtype in _DTYPES
        and gradient.dtype == parameter.dtype
        and gradient.layout is torch.strided
        and gradient.device == parameter.device == state["state1"].device
        and parameter.is_contiguous()
        and gradient.is_contiguous()
    )


def _update(
    device: torch.device,
    implementation: str | None,
    options: AdamWOptions,
    members: list[tuple[Tensor, dict[str, Any]]],
) -> None:
    from hotloop_engine.ops._select import implementation as find

    tensors: list[EightBitTensor] = []
    for parameter, state in members:
        assert parameter.grad is not None
        tensors.append(
            EightBitTensor(
                parameter=parameter.detach(),
                gradient=parameter.grad,
                m_codes=state["state1"],
                v_codes=state["state2"],
                m_absmax=state["absmax1"],
                v_absmax=state["absmax2"],
            )
        )
        state["step"] += 1
    tables = members[0][1]["qmap1"], members[0][1]["qmap2"]
    find("adamw_8bit", device, implementation).update_(tensors, *tables, options)
