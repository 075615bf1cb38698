"""Tensors that are made when somebody looks at them: logits beside a fused loss, a T x T mask that nothing needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from collections.abc import Callable

_CHEAP = {"shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_sparse"}
_CHEAP_METHODS = {
    "size",
    "dim",
    "is_floating_point",
    "numel",
    "is_complex",
    "__len__",
    "element_size",
}


class LazyTensor(Tensor):
    """A tensor of known shape, dtype and device whose values are computed at the first operation on it.

    Autograd works as if it had been computed there. float(), to(dtype) and detach() stay lazy, because wrappers around
    a model apply them to every output (accelerate's conversion to fp32) whether or not anybody reads it.
    """

    _make: Callable[[], Tensor]
    _made: Tensor | None

    def __new__(
        cls,
        make: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """`make` returns the values; it is called at most once."""
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._make, self._made = make, None
        return self

    def materialise(self) -> Tensor:
        """The plain tensor."""
        if self._made is None:
            self._made = self._make().to(self.dtype)
            self._make = _spent
        return self._made

    def lazily(
        self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> LazyTensor:
        """Another lazy tensor of the same shape, made from this one."""
        return LazyTensor(
            lambda: change(self.materialise()), tuple(self.shape), dtype or self.dtype, self.device
        )

    def float(self) -> LazyTensor:  # type: ignore[override]
        """In fp32, still lazy."""
        return self.lazily(Tensor.float, torch.float32)

    def detach(self) -> LazyTensor:  # type: ignore[override]
        """Without gradient, still lazy."""
        return self.lazily(Tensor.detach)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialise().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        if (name == "__get__" and owner in _CHEAP) or name in _CHEAP_METHODS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs or {}))
        return func(*plain_args, **plain_kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs or {}))
        return func(*plain_args, **plain_kwargs)


def _plain(value: Any) -> Any:
    return value.materialise() if isinstance(value, LazyTensor) else value


def _spent() -> Tensor:
    raise AssertionError("a lazy tensor is made once")
