"""Causal attention over sequences: what is asked of a backend, what it can do, and what it is."""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from hotloop_core.errors import ConfigError, NoImplementationError
from torch import Tensor

if TYPE_CHECKING:
    from .sequences import Sequences

Gradients = tuple[Tensor, Tensor, Tensor]
"""dq_THK, dk_TGK, dv_TGK."""

HALF = frozenset({torch.float16, torch.bfloat16})
"""The dtypes of the tensor-core libraries."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a layer asks of attention. Hashable; the same for every batch of one kind.

    packed: sequences differ in length, so the batch is no dense [B, S] (or are single tokens,
        which backends for dense batches do not take).
    window: query i sees key j if i - window < j <= i, as transformers' `sliding_window`; None: all
        j <= i.
    softcap: scores become softcap * tanh(scale * qk / softcap).
    deterministic: the backward must give the same bits, run after run.
    fresh: the batch is of a shape for which it does not pay to prepare (see `Sequences.fresh`).
    """

    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_size: int
    packed: bool = False
    window: int | None = None
    softcap: float | None = None
    deterministic: bool = False
    fresh: bool = False

    @functools.cached_property
    def in_any_shape(self) -> Request:
        """The same for a batch of a shape that is prepared for."""
        return replace(self, fresh=False) if self.fresh else self

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} query heads over {self.kv_heads} key/value heads; expected a "
                "multiple."
            )
        if self.window is not None and self.window < 1:
            raise ConfigError(
                f"window={self.window}; expected at least 1 (the token itself), or None."
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ConfigError(f"softcap={self.softcap}; expected a positive number, or None.")


def request(
    q_THK: Tensor,
    k_TGK: Tensor,
    sequences: Sequences,
    *,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
) -> Request:
    """The request that these tensors make. A window that no sequence outgrows is no window."""
    _, heads, head_size = q_THK.shape
    key = (q_THK.dtype, heads, k_TGK.shape[1], head_size, window, softcap, deterministic)
    known = sequences.requests.get(key)
    if not isinstance(known, Request):
        sequences.requests[key] = known = Request(
            dtype=q_THK.dtype,
            heads=heads,
            kv_heads=k_TGK.shape[1],
            head_size=head_size,
            packed=sequences.dense_shape is None or sequences.longest == 1,
            window=None if window is None or window >= sequences.longest else window,
            softcap=softcap,
            deterministic=deterministic,
            fresh=sequences.fresh,
        )
    return known


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What a backend can do, and hence why it cannot do the rest.

    devices: where it runs.
    forced_on: devices where it runs only if named, being far slower than others there.
    compute_capability: the range of CUDA compute capabilities, both ends included.
    head_sizes: (smallest, largest, multiple of).
    deterministic: its backward can give the same bits every time, if asked to.
    plans: it prepares for each shape of batch, for longer than one batch gains.
    packages: importable modules that it needs beside torch.
    """

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    head_sizes: tuple[int, int, int]
    forced_on: frozenset[str] = field(default_factory=frozenset)
    compute_capability: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (99, 9))
    packed: bool = True
    window: bool = True
    softcap: bool = True
    deterministic: bool = True
    plans: bool = False
    packages: tuple[str, ...] = ()

    def missing(self, device: torch.device) -> str | None:
        """Why nothing at all runs on this device, or None."""
        if device.type not in self.devices:
            return f"runs on {names(self.devices)}, not on {device.type}"
        for package in self.packages:
            if not _importable(package):
                return f"needs the package {package}, which is not installed"
        if device.type == "cuda":
            low, high = self.compute_capability
            found = torch.cuda.get_device_capability(device)
            if not low <= found <= high:
                return (
                    f"needs compute capability {_version(low)} to {_version(high)}, "
                    f"found {_version(found)}"
                )
        return None

    def refusal(self, request: Request) -> str | None:
        """Why the request cannot run even where the backend itself does, or None."""
        smallest, largest, multiple = self.head_sizes
        size = request.head_size
        if request.dtype not in self.dtypes:
            return f"computes in {names(self.dtypes)}, not in {short_name(request.dtype)}"
        if not smallest <= size <= largest or size % multiple:
            return f"head sizes {smallest} to {largest} in steps of {multiple}, not {size}"
        if request.packed and not self.packed:
            return "sequences of one length only, and these differ"
        if request.window is not None and not self.window:
            return f"no sliding window ({request.window} asked for)"
        if request.softcap is not None and not self.softcap:
            return f"no soft cap ({request.softcap} asked for)"
        if request.deterministic and not self.deterministic:
            return "its backward is not deterministic"
        if request.fresh and self.plans:
            return "it would prepare for this shape of batch, which has not come often enough"
        return None


@dataclass(frozen=True, eq=False)
class Inputs:
    """What both passes of a backend are given; the options mean what they mean in `Request`."""

    q_THK: Tensor
    k_TGK: Tensor
    v_TGK: Tensor
    sequences: Sequences
    _: KW_ONLY
    scale: float
    window: int | None
    softcap: float | None
    deterministic: bool

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """(q_THK, k_TGK, v_TGK)."""
        return self.q_THK, self.k_TGK, self.v_TGK


class Backend(ABC):
    """One implementation of causal attention: an explicit forward and backward, without autograd.

    Equation, for each sequence and head   arXiv:1706.03762 eq. 1, arXiv:2205.14135 algorithms 1, 4:
    s_ij = scale q_i . k_j, soft-capped; p_ij = exp(s_ij - lse_i), j visible; o_i = sum_j p_ij v_j.

    q_THK, k_TGK, v_TGK: 3-D views with any token stride, such as columns of one wide buffer; H is a
        multiple of G. Where an implementation cannot take the strides, it copies.
    lse: fp32 (fp64 for fp64), about H x T numbers in a layout of the backend's own. With q, k, v
        and o it is all that backward needs.
    Forward and backward must get the same options. Only `out` is written to.
    """

    name: str
    capability: Capability

    def missing(self, device: torch.device) -> str | None:
        """Why nothing at all runs on this device, or None."""
        return self.capability.missing(device)

    def refusal(self, request: Request, device: torch.device) -> str | None:
        """Why the request cannot run on this device, or None."""
        return self.missing(device) or self.capability.refusal(request)

    def forward(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        sequences: Sequences,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        deterministic: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (o_THK, lse); o is `out`, a view like q with any token stride, or a new tensor.

        Raises:
            NoImplementationError: it cannot do what is asked; `choose` finds one that can.

        """
        given = Inputs(
            q_THK, k_TGK, v_TGK, sequences,
            scale=scale, window=window, softcap=softcap, deterministic=deterministic,
        )  # fmt: skip
        inputs = self._accepted(given)
        if sequences.tokens == 0:
            o_THK = torch.empty_like(q_THK) if out is None else out
            return o_THK, q_THK.new_empty(q_THK.shape[1], 0, dtype=torch.float32)
        o_THK, lse = self._forward(inputs, out)
        return into(o_THK, out), lse

    def backward(
        self,
        do_THK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        o_THK: Tensor,
        lse: Tensor,
        sequences: Sequences,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        deterministic: bool = False,
        out: Gradients | None = None,
    ) -> Gradients:
        """Returns (dq_THK, dk_TGK, dv_TGK) in the inputs' dtype: the views `out`, or new tensors.

        Raises:
            NoImplementationError: as forward.

        """
        given = Inputs(
            q_THK, k_TGK, v_TGK, sequences,
            scale=scale, window=window, softcap=softcap, deterministic=deterministic,
        )  # fmt: skip
        inputs = self._accepted(given)
        if sequences.tokens == 0:
            found = tuple(torch.empty_like(x) for x in inputs.qkv)
        else:
            found = self._backward(inputs, do_THK, o_THK, lse, out)
        dq, dk, dv = (into(x, target) for x, target in zip(found, out or (None,) * 3, strict=True))
        return dq, dk, dv

    def _accepted(self, given: Inputs) -> Inputs:
        """The same, without a window that no sequence outgrows."""
        asked = request(
            given.q_THK, given.k_TGK, given.sequences,
            window=given.window, softcap=given.softcap, deterministic=given.deterministic,
        )  # fmt: skip
        require(self, asked.in_any_shape, given.q_THK.device)
        return given if given.window == asked.window else replace(given, window=asked.window)

    @abstractmethod
    def _forward(self, inputs: Inputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """As forward, for an accepted request and one token or more; may leave `out` unused."""

    @abstractmethod
    def _backward(
        self, inputs: Inputs, do_THK: Tensor, o_THK: Tensor, lse: Tensor, out: Gradients | None
    ) -> Gradients:
        """As backward, for an accepted request and one token or more; may leave `out` unused."""


def into(value: Tensor, target: Tensor | None) -> Tensor:
    """`value` itself, or `target` with `value` in it."""
    if target is None or target is value:
        return value
    return target.copy_(value)


def unit_stride(x: Tensor) -> Tensor:
    """X itself where the values of a head lie side by side, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def is_aligned(x: Tensor) -> bool:
    """Whether 16-byte vector loads work: last stride 1, the other strides and the start aligned."""
    size = x.element_size()
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride and stride * size % 16 == 0 for stride in x.stride()[:-1])
    )


def aligned(x: Tensor) -> Tensor:
    """X itself where `is_aligned`, else a contiguous copy, which is."""
    if is_aligned(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@functools.cache
def require(backend: Backend, request: Request, device: torch.device) -> None:
    """Raises NoImplementationError, with the reason, where the backend refuses the request."""
    if reason := backend.refusal(request, device):
        raise NoImplementationError(
            f"attention backend {backend.name!r} cannot do {request} on {device}: {reason}."
        )


@functools.cache
def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def short_name(dtype: object) -> str:
    """A dtype without `torch.`; anything else as it is."""
    return str(dtype).removeprefix("torch.")


def names(values: frozenset[object] | frozenset[str] | frozenset[torch.dtype]) -> str:
    """Sorted, with commas between, for messages."""
    return ", ".join(sorted(short_name(value) for value in values))


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
