"""The weights that a model computes with: dequantised, and with the active adapters merged in, one tensor at a time.

    W' = W + sum over active adapters of s B A            LoRA, arXiv:2106.09685 eq. 3
    W' = m V / ||V||_row, V = W + s B A                   DoRA, arXiv:2402.09353 eq. 5

All in float32, rounded by nobody here. The live model is only read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ExportError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Effective:
    """A tensor that the model computes with, under the name that it has in a plain checkpoint.

    shared: the live parameter where the tensor is that parameter, unchanged, or with trained tokens that its tie has
    too, those; so that ties are seen. Else None.
    rows: those rows of the first dimension alone, as `load` gives the whole; None where it cannot be had in parts.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    shared: Tensor | None
    rows: Callable[[int, int], Tensor] | None = None


def effective_tensors(
    module: nn.Module, device: torch.device | None = None, prefix: str = ""
) -> Iterator[Effective]:
    """Every tensor of `module`'s plain state dict, in its order, adapters merged away.

    device: where they are brought and merged; None: where each is.

    Raises:
        UnsupportedError: an adapter or a quantisation that cannot be merged exactly, by the path of its module.
        ExportError: adapters that are merged into the live weights and disabled, so that neither is what it computes.

    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from effective_tensors(_active_module(module, prefix), device, prefix)
    elif isinstance(module, LoraLayer):
        yield from _lora_tensors(module, device, prefix)
    elif isinstance(module, TrainableTokensLayer):
        yield from _token_tensors(module, device, prefix)
    elif isinstance(module, BaseTunerLayer):
        raise UnsupportedError(
            f"{prefix[:-1]}: adapters of type {type(module).__module__}.{type(module).__name__} are not merged; "
            "LoRA, DoRA and trainable tokens are. Merge it first with PEFT (merge_and_unload)."
        )
    else:
        yield from _own_tensors(module, device, prefix)
        for name, child in module.named_children():
            yield from effective_tensors(child, device, f"{prefix}{name}.")


def dequantised(parameter: Tensor, name: str) -> Tensor:
    """The weight as it is computed with: a bitsandbytes 4-bit one in its quant state's dtype, others as they are."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        _refuse_unreadable(parameter, name)
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.detach(), state)


def _own_tensors(
    module: nn.Module, device: torch.device | None, prefix: str
) -> Iterator[Effective]:
    transient: set[str] = module._non_persistent_buffers_set
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in transient:
            yield _plain(tensor, device, f"{prefix}{name}")


def _plain(tensor: Tensor, device: torch.device | None, name: str) -> Effective:
    state: Any = getattr(tensor, "quant_state", None)
    if state is None:
        _refuse_unreadable(tensor, name)
    return Effective(
        name=name,
        shape=tuple(tensor.shape if state is None else state.shape),
        dtype=tensor.dtype if state is None else state.dtype,
        load=lambda: _moved(dequantised(tensor, name), device),
        shared=tensor,
        rows=None
        if state is not None or not tensor.ndim
        else lambda start, stop: _moved(tensor.detach()[start:stop], device),
    )


def _moved(tensor: Tensor, device: torch.device | None) -> Tensor:
    return tensor if device is None else tensor.to(device)


def _refuse_unreadable(tensor: Tensor, name: str) -> None:
    if tensor.device.type == "meta":
        raise ExportError(
            f"{name} is on the meta device: its values are offloaded or were never loaded. "
            "Load the model onto a real device (no disk offload) and export again."
        )
    if type(tensor).__name__ == "Int8Params":
        raise UnsupportedError(
            f"{name} is a bitsandbytes 8-bit weight, which cannot be exported. Load with bits=4 or bits=16."
        )


def _active_module(wrapper: Any, prefix: str) -> nn.Module:
    """What PEFT's wrapper of `modules_to_save` or of trainable tokens computes with now."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(wrapper, TrainableTokensWrapper):
        return wrapper.token_adapter
    if not isinstance(wrapper, ModulesToSaveWrapper):
        raise UnsupportedError(f"{prefix[:-1]}: PEFT's {type(wrapper).__name__} is not exported")
    active = wrapper.active_adapters
    if wrapper.disable_adapters or any(name not in wrapper.modules_to_save for name in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]] if active else wrapper.original_module


def _active_adapters(layer: Any, path: str) -> list[str]:
    """Adapters to add to the base weights: none where they are merged into them already, as in PEFT's forward."""
    if layer.merged and layer.disable_adapters:
        raise ExportError(
            f"{path}: adapters {layer.merged_adapters} are merged into the weights and disabled. "
            "Unmerge them (model.unmerge_adapter()) or enable them, then export."
        )
    return [] if layer.merged or layer.disable_adapters else list(layer.active_adapters)


def _token_tensors(layer: Any, device: torch.device | None, prefix: str) -> Iterator[Effective]:
    active = _active_adapters(layer, prefix[:-1])
    for base in effective_tensors(layer.base_layer, device, prefix):
        if base.name != f"{prefix}weight" or not active:
            yield base
            continue
        yield Effective(
            name=base.name,
            shape=base.shape,
            dtype=base.dtype,
            load=lambda: _moved(layer.get_merged_weights(active).detach(), device),
            shared=layer.trainable_tokens_delta[active[0]] if len(active) == 1 else None,
        )


def _lora_tensors(layer: Any, device: torch.device | None, prefix: str) -> Iterator[Effective]:
    from peft.tuners.lora import Embedding, Linear

    path = prefix[:-1]
    embedding = isinstance(layer, Embedding)
    if not embedding and not isinstance(layer, Linear) and type(layer).__name__ != "Linear4bit":
        raise UnsupportedError(
            f"{path}: LoRA on {type(layer).__name__} is not merged; linear layers (16 bit or bitsandbytes 4 bit) "
            "and embeddings are. Export the adapter alone (quant='adapter')."
        )
    held = layer.lora_embedding_A if embedding else layer.lora_A
    active = [name for name in _active_adapters(layer, path) if name in held]
    _check_variants(layer, active, path, embedding)
    biased = [a for a in active if layer.lora_bias.get(a)]
    if biased and getattr(layer.get_base_layer(), "bias", None) is None:
        raise UnsupportedError(
            f"{path}: adapter {biased[0]!r} has lora_bias, and the layer that it is on no bias to merge that into, nor "
            "has the model's architecture. Export the adapter alone (quant='adapter')."
        )
    for base in effective_tensors(layer.base_layer, device, prefix):
        part = base.name.removeprefix(prefix)
        if part == "weight" and active:
            merge = _merged_embedding if embedding else _merged_linear
            yield _merged(base, partial(merge, layer, active), in_rows=not layer.fan_in_fan_out)
        elif part == "bias" and biased:
            yield _merged(base, partial(_merged_bias, layer, biased), in_rows=False)
        else:
            yield base


def _merged(base: Effective, merge: Callable[..., Tensor], *, in_rows: bool) -> Effective:
    """`base` with `merge(base rows, which rows)` done to it."""
    some = base.rows
    return Effective(
        name=base.name,
        shape=base.shape,
        dtype=base.dtype,
        load=lambda: merge(base.load(), slice(None)),
        shared=None,
        rows=None
        if some is None or not in_rows
        else lambda start, stop: merge(some(start, stop), slice(start, stop)),
    )


def _check_variants(layer: Any, active: list[str], path: str, embedding: bool) -> None:
    from peft.tuners.lora.variants import DoraLinearVariant

    for name in active:
        variant = layer.lora_variant.get(name)
        if variant is None:
            continue
        kind = variant.__name__ if isinstance(variant, type) else type(variant).__name__
        dora = kind == DoraLinearVariant.__name__ and not embedding
        if not dora or len(active) > 1 or layer.lora_bias.get(name):
            raise UnsupportedError(
                f"{path}: adapter {name!r} is of the kind {kind}; merged exactly are plain LoRA, and DoRA as the only "
                "active adapter of a linear layer, without lora_bias. Export the adapter alone (quant='adapter')."
            )


def _merged_linear(layer: Any, active: list[str], base: Tensor, rows: slice) -> Tensor:
    import torch

    weight = base.float()
    if layer.fan_in_fan_out:
        weight = weight.T
    for name in active:
        a = layer.lora_A[name].weight.detach().to(weight.device, torch.float32)
        b = layer.lora_B[name].weight.detach()[rows].to(weight.device, torch.float32)
        weight = torch.addmm(weight, b, a, alpha=layer.scaling[name])
        if name in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[name].weight.detach()[rows].to(weight)
            weight *= (magnitude / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)
    return weight.T if layer.fan_in_fan_out else weight


def _merged_embedding(layer: Any, active: list[str], base: Tensor, rows: slice) -> Tensor:
    import torch

    weight = base.float()
    for name in active:
        a = layer.lora_embedding_A[name].detach()[:, rows].to(weight.device, torch.float32)
        b = layer.lora_embedding_B[name].detach().to(weight.device, torch.float32)
        weight = torch.addmm(weight, a.T, b.T, alpha=layer.scaling[name])
    return weight


def _merged_bias(layer: Any, active: list[str], base: Tensor, rows: slice) -> Tensor:
    bias = base.float()
    for name in active:
        bias = bias + layer.scaling[name] * layer.lora_B[name].bias.detach()[rows].to(bias)
    return bias
