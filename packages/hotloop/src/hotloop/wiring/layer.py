"""The forward of a wired decoder layer: reads the layer's modules, builds the two blocks, runs them by the plan."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core import Attention, CustomBlock, LayerSpec, ModelFacts, Plan
from hotloop_core.errors import DataError, UnsupportedError
from hotloop_core.plan import RECORDED_SHARE, recorded_bytes
from hotloop_engine.attention import Sequences
from hotloop_engine.blocks import Recorder, Surroundings, run_blocks, run_recorded
from hotloop_engine.ops.lora_linear import LinearGroup
from torch import Tensor, nn

from .build import Builder
from .classes import STATE, role
from .masks import LazyMask
from .projection import Projection
from .views import FourBitCache, Refusal, check_path, refuse
from .waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from hotloop.homes import Homes

SEQUENCES = "hotloop_sequences"
"""The keyword by which the wired root hands the batch's sequences to every layer."""
CACHES = "hotloop_caches"
"""The keyword by which the wired root says that in training, too, the caller wants the cache filled."""


@dataclass(eq=False)
class Shared:
    """What all wired layers of one model share: the plan, the choices, and the sequences of the batch at hand."""

    facts: ModelFacts
    plan: Plan
    allow_eager: frozenset[str]
    ops: Mapping[str, str]
    backend: str | None
    deterministic: bool
    homes: Homes | None = None
    cuda_graphs: bool = True
    waiting: Waiting = field(init=False)
    recorder: Recorder = field(init=False, repr=False)
    _known: tuple[tuple[Any, ...], Sequences] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.waiting = Waiting(self)
        self.recorder = Recorder(self._room, self._need)

    def sequences(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Sequences:
        """How the tokens of this batch divide; worked out by the first layer, then remembered."""
        given = kwargs.get(SEQUENCES)
        if given is not None:
            return given
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        padding = mask.padding if isinstance(mask, LazyMask) else mask
        offsets = kwargs.get("cu_seq_lens_q")
        sources = (padding, positions, offsets)
        if self._known is not None and _same(self._known[0], sources, hidden.shape[:2]):
            return self._known[1]
        try:
            found = sequences_of(
                hidden.shape[0], hidden.shape[1], hidden.device, padding, positions, offsets
            )
        except UnsupportedError as error:
            raise Refusal("mask", str(error)) from error
        self._known = (_identity(sources, hidden.shape[:2]), found)
        return found

    def _room(self, device: torch.device) -> int:
        """Bytes that recordings may take: a share of the card, of what is free half, and what a budget leaves."""
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = min(total // RECORDED_SHARE, free // 2)
        plan = self.plan
        return room if plan.budget is None else min(room, plan.budget - plan.peak_bytes)

    def _need(self, tokens: int) -> int:
        return recorded_bytes(self.facts, tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}


def sequences_of(
    batch: int,
    length: int,
    device: torch.device,
    padding: Tensor | None,
    positions: Tensor | None,
    offsets: Tensor | None,
) -> Sequences:
    """Packing by offsets, else padding by a mask, else packing by restarting positions, else dense.

    As transformers does, positions count only where there is no mask.

    Raises:
        DataError: a mask or positions of another size than the batch: tokens would be left out.
    """
    for name, given, rows in (
        ("attention_mask", padding, (batch,)),
        ("position_ids", positions, (1, batch)),
    ):
        if given is None or given.dim() != 2:
            continue
        if given.shape[0] not in rows or given.shape[1] != length:
            raise DataError(
                f"{name} of shape {tuple(given.shape)} for a batch of {(batch, length)}; give one entry for each token"
            )
    if offsets is not None:
        return Sequences.from_cu_seqlens(offsets, tokens=batch * length)
    if padding is not None:
        return Sequences.from_padding_mask(padding)
    if positions is not None:
        return Sequences.from_position_ids(positions, batch=batch)
    return Sequences.dense(batch, length, device)


def _identity(sources: tuple[Tensor | None, ...], shape: torch.Size) -> tuple[Any, ...]:
    parts = [None if s is None else (weakref.ref(s), s._version) for s in sources]
    return (tuple(shape), *parts)


def _same(known: tuple[Any, ...], sources: tuple[Tensor | None, ...], shape: torch.Size) -> bool:
    if known[0] != tuple(shape):
        return False
    return all(
        (k is None and s is None)
        or (k is not None and s is not None and k[0]() is s and k[1] == s._version)
        for k, s in zip(known[1:], sources, strict=True)
    )


@dataclass(eq=False)
class LayerState:
    """A wired layer's own part."""

    path: str
    index: int
    spec: LayerSpec
    shared: Shared
    four_bit: FourBitCache = field(default_factory=FourBitCache)
    made: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    guard: Guard | None = None

    def __post_init__(self) -> None:
        self.paths = module_paths(self.spec)

    def give_room(self) -> None:
        """Drops weights that stay dequantised: a cache comes, and the model's own path does not read them."""
        if self.shared.plan.layers[self.index].dequantised:
            for _, made in self.made.values():
                if isinstance(made, LinearGroup):
                    made.operand.keep(False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "guard": None, "made": {}}


def module_paths(spec: LayerSpec) -> dict[str, str]:
    """Role -> path within the layer, for every module with parameters that the description claims.

    The other modules of a family's own block have no role; they go by their path.
    """
    norms = spec.norms
    paths = {
        "before_attention": norms.before_attention,
        "after_attention": norms.after_attention,
        "before_mlp": norms.before_mlp,
        "after_mlp": norms.after_mlp,
        **spec.projections,
    }
    for part in (spec.attention, spec.mlp):
        if isinstance(part, Attention):
            paths |= {"q_norm": part.q_norm, "k_norm": part.k_norm}
        elif isinstance(part, CustomBlock):
            paths |= {path: path for path in part.parameters}
    return {role: path for role, path in paths.items() if path is not None}


@role("layer")
def forward(
    layer: nn.Module,
    own_forward: Callable[..., Any],
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """One decoder layer. A KV cache or `output_attentions` takes the model's own forward."""
    state: LayerState = layer.__dict__[STATE]
    if args:
        kwargs = {**_names(own_forward, hidden_states, args), **kwargs}
    if _needs_own_path(layer, state, kwargs):
        state.give_room()
        return _run_own(own_forward, hidden_states, kwargs)
    waiting = state.shared.waiting
    fetch = waiting.fetch(state.index)
    if fetch is not None:
        fetch(False)  # before the weights are read, so that the next layer's set out at once
    waiting.start_head(state.index)
    try:
        guard = _check_call(layer, state, kwargs)
        recorded = _recorded(layer, state, guard, hidden_states, kwargs)
        if recorded is not None:
            waiting.passed(recorded, None)
            return recorded
        blocks = Builder(state, guard, hidden_states, kwargs).blocks()
    except Refusal as refusal:
        if refusal.name not in state.shared.allow_eager:
            raise refuse(state.path, refusal) from None
        return _run_own(own_forward, hidden_states, kwargs)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    around = Surroundings(
        where=state.path,
        store=waiting.store(hidden_states),
        fetch=fetch,
        below=waiting.below(hidden_states),
    )
    y_TD, run = run_blocks(blocks, flat, state.shared.plan.layers[state.index], around)
    y = y_TD.view(hidden_states.shape)
    waiting.passed(y, run)
    return y


def _recorded(
    layer: nn.Module, state: LayerState, guard: Guard, hidden: Tensor, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """What the layer gives, by its recording; None where this pass, or this layer, is not recorded."""
    kind = state.shared.recorder.now
    if kind is None or _somebody_keeps(layer):
        return None
    blocks = Builder(state, guard, hidden, kwargs, kind).blocks()
    flat = hidden.reshape(-1, hidden.shape[-1])
    y_TD = run_recorded(kind.layer(state.index), blocks, state.path, flat)
    return None if y_TD is None else y_TD.view(hidden.shape)


def _somebody_keeps(layer: nn.Module) -> bool:
    """Whether a hook sees what the layer gives or saves, which the next pass overwrites."""
    saving = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    return saving is not None or _foreign_hook(layer) is not None


def _needs_own_path(layer: nn.Module, state: LayerState, kwargs: Mapping[str, Any]) -> bool:
    """A cache that is read or filled. transformers makes one by default: in training it stays empty, as under its own
    checkpointing, unless the model was called with one or with use_cache=True."""
    if kwargs.get("output_attentions"):
        return True
    cache = kwargs.get("past_key_values")
    if cache is None:
        return False
    if kwargs.get(CACHES):
        return True
    trains = layer.training and torch.is_grad_enabled()
    return not (trains and cache.get_seq_length(state.index) == 0)


def _run_own(own_forward: Callable[..., Any], hidden_states: Tensor, kwargs: dict[str, Any]) -> Any:
    return own_forward(hidden_states, **{k: v for k, v in kwargs.items() if k not in _OURS})


def _names(
    own_forward: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...]
) -> dict[str, Any]:
    bound = inspect.signature(own_forward).bind(hidden, *args)
    return dict(list(bound.arguments.items())[1:])


_OURS = (SEQUENCES, CACHES)
_CAPTURE = "transformers.utils.output_capturing"  # sees outputs that a wired layer leaves to the model's own path
_PUT_ON = ("forward", "_hf_hook")
"""What trainers and accelerate put on a module itself, in front of its class's forward."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _check_call(layer: nn.Module, state: LayerState, kwargs: Mapping[str, Any]) -> Guard:
    """Refuses what this call cannot have; returns the layer's guard, which holds."""
    shared = state.shared
    mask = kwargs.get("attention_mask")
    if isinstance(mask, LazyMask):
        if mask.custom:
            raise Refusal("mask", "the causal mask was combined with another mask function")
    elif isinstance(mask, Tensor) and mask.dim() != 2:
        raise Refusal(
            "mask",
            f"an attention mask of shape {tuple(mask.shape)}, which a caller gave in place of [batch, length] or "
            "set_attn_implementation brought after wiring",
        )
    elif mask is not None and not isinstance(mask, Tensor):
        raise Refusal("mask", f"an attention mask of type {type(mask).__name__}")
    if layer.training and shared.facts.attention_dropout:
        raise Refusal("attention-dropout", f"attention_dropout={shared.facts.attention_dropout}")
    if state.guard is None or not state.guard.holds(layer):
        check_modules(layer)
        for path in state.paths.values():
            check_path(layer, path)
        state.guard = Guard(layer, state.paths, state.spec.projections.keys(), state.four_bit)
    return state.guard


class Guard:
    """Remembers that `check_modules` found nothing: no module came or went, no hook or forward was added since.

    modules: the module of each role, which so are still those. projections: those that multiply.
    """

    def __init__(
        self,
        layer: nn.Module,
        paths: Mapping[str, str],
        projections: Iterable[str],
        four_bit: FourBitCache,
    ) -> None:
        self._layer = weakref.ref(layer)
        self.modules = {role: layer.get_submodule(path) for role, path in paths.items()}
        self.projections = {role: Projection(self.modules[role], four_bit) for role in projections}
        inner = [module for module in layer.modules() if module is not layer]
        self._own = [module.__dict__ for module in inner]
        self._hooks = [own[kind] for own in self._own for kind in _HOOKS if not own[kind]]
        self._children = [layer._modules, *(module._modules for module in inner)]
        self._tree = self._identities()

    def holds(self, layer: nn.Module) -> bool:
        """Whether `layer` is the one (replicas share a state), its modules are the same and as bare as they were."""
        if self._layer() is not layer or any(self._hooks) or self._identities() != self._tree:
            return False
        return not any(any(map(dict.__contains__, self._own, repeat(name))) for name in _PUT_ON)

    def _identities(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self._children))))


def check_modules(layer: nn.Module) -> None:
    """Refuses hooks, replaced forwards and offloading on modules whose forward the blocks pass by.

    Raises:
        Refusal: the first that was found.
    """
    for name, module in layer.named_modules():
        if module is layer:
            continue
        own = module.__dict__
        if "_hf_hook" in own:
            raise Refusal("offload", f"{name}: accelerate's {type(own['_hf_hook']).__name__}")
        if "forward" in own:
            raise Refusal("hooks", f"{name}: a forward that somebody put on the instance")
        hook = _foreign_hook(module)
        if hook is not None:
            raise Refusal("hooks", f"{name}: a hook {getattr(hook, '__qualname__', hook)!r}")


def _foreign_hook(module: nn.Module) -> Callable[..., Any] | None:
    """The first hook on a module that is not transformers' own."""
    own = module.__dict__
    hooks = chain.from_iterable(own[kind].values() for kind in _HOOKS)
    foreign = (h for h in hooks if not getattr(h, "__module__", "").startswith(_CAPTURE))
    return next(foreign, None)
