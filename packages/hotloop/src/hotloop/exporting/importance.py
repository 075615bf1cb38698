"""An importance matrix, measured: how large the inputs of each linear layer are, column by column, on the user's data.

    w_k = mean over tokens of x_k^2

which is the diagonal of the Gram matrix that rounding a row of W by e costs: E[(e x)^2] is about sum_k e_k^2 w_k.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hotloop_core import Importance
from hotloop_core.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn


def measure_importance(
    model: Any, batches: Iterable[Mapping[str, Any]], *, source: str = ""
) -> Importance:
    """Runs `batches` through the model, its own forward, and keeps the mean squared inputs of its linear layers.

    Args:
        model: a transformers or PEFT model, wired or not; it is read and left as it was.
        batches: keyword arguments of its forward, on any device; `input_ids` of [rows, tokens] and, where rows are
            padded, `attention_mask`, whose zeros are left out.
        source: what data this is, for the file.

    Raises:
        DataError: no token. UnsupportedError: a linear layer that the forward does not call.

    """
    import torch

    from .merging import effective_tensors

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    wanted = {tensor.name.removesuffix(".weight") for tensor in effective_tensors(base)}
    sums: dict[str, Tensor] = {}
    seen = _Tokens()
    training = model.training
    with ExitStack() as hooks:
        names: list[str] = []
        for name, module in _linears(base):
            if name in wanted and name != "lm_head":
                names.append(name)
                handle = module.register_forward_pre_hook(_adding(name, sums, seen))
                hooks.callback(handle.remove)
        model.eval()
        hooks.callback(model.train, training)
        device = next(base.parameters()).device
        with torch.no_grad():
            for batch in batches:
                seen.begin(batch, device)
                inputs = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
                # A cache is what sends a wired model through its own layers, whose inputs the hooks see.
                model(**{**inputs, "use_cache": True})
    if not seen.count:
        raise DataError("no token to measure importance on; give batches with input_ids")
    missing = sorted(set(names) - sums.keys())
    if missing:
        raise UnsupportedError(
            f"{missing[0]} and {len(missing) - 1} more linear layers are not called by the model's forward; "
            "importance cannot be measured for them"
        )
    columns = {f"{name}.weight": (total / seen.count).float().cpu() for name, total in sums.items()}
    return Importance(columns=columns, tokens=seen.count, source=source)


class _Tokens:
    """Which tokens of the batch at hand count, and how many did so far."""

    def __init__(self) -> None:
        self.count = 0
        self.kept: Tensor | None = None

    def begin(self, batch: Mapping[str, Any], device: Any) -> None:
        mask = batch.get("attention_mask")
        self.kept = None if mask is None else mask.to(device).bool().reshape(-1)
        self.count += int(batch["input_ids"].numel() if mask is None else mask.sum())


def _linears(base: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Linear layers by the path that they have without PEFT's wrappers."""
    import torch

    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name:
            yield name.replace(".base_layer", ""), module


def _adding(name: str, sums: dict[str, Tensor], seen: _Tokens) -> Callable[..., None]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        import torch

        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        if seen.kept is not None:
            x = x[seen.kept]
        total = x.double().square().sum(0) if x.device.type == "cpu" else x.float().square().sum(0)
        sums[name] = sums.get(name, torch.zeros_like(total, dtype=torch.float64)) + total

    return add
