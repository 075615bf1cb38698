"""A transformers model from stored tensors, each put straight to its home: quantised, cast, or on the host."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import CheckpointError

from . import checks
from .quantize import nf4_config
from .upload import uploaded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from hotloop_core import FamilySpec, Plan
    from torch import Tensor
    from transformers import PreTrainedConfig

    from hotloop.homes import Homes

    from .stored import Stored


class Skeleton:
    """A model whose parameters are on the meta device, and what a quantiser made of it.

    quantizer: transformers' own for bitsandbytes, or None. It decides which layers are 4 bit, and leaves on the model
    what Trainer, PEFT and save_pretrained look for.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        *,
        attn: str | None,
        device: torch.device,
        quantise: bool,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.quantizers import AutoHfQuantizer

        self.dtype, self.device = dtype, device
        config = copy.deepcopy(config)
        self.stored_in_4bit = getattr(config, "quantization_config", None) is not None
        options: dict[str, Any] = {} if attn is None else {"attn_implementation": attn}
        device_map: Any = {"": device}
        self.quantizer: Any = None
        if quantise or self.stored_in_4bit:
            if not self.stored_in_4bit:
                config.quantization_config = nf4_config(dtype)
            self.quantizer = AutoHfQuantizer.from_config(
                config.quantization_config, pre_quantized=self.stored_in_4bit
            )
            self.quantizer.validate_environment(device_map=device_map)
        with torch.device("meta"), _default_dtype(dtype):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
            if self.quantizer is not None:
                self.quantizer.preprocess_model(
                    model=self.model,
                    dtype=dtype,
                    device_map=device_map,
                    checkpoint_files=None,
                    use_kernels=False,
                )
        self.tied: Mapping[str, str] = dict(self.model.all_tied_weights_keys)
        self.expected: dict[str, Tensor] = self.model.state_dict()

    def obstacle(self, stored: Mapping[str, Stored]) -> str | None:
        """Why transformers' own loader has to read this checkpoint; None where each tensor has its module's name.

        transformers knows how to rename and to convert tensors of older or fused checkpoints; only what needs neither
        is read here.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        if any(isinstance(c, WeightConverter) for c in get_model_conversion_mapping(self.model)):
            return f"transformers converts tensors of {type(self.model).__name__} as it reads them"
        if self.model._keep_in_fp32_modules or self.model._keep_in_fp32_modules_strict:
            return f"{type(self.model).__name__} keeps some weights in fp32"
        unknown = [name for name in stored if self._owner(name) is None]
        if unknown:
            return f"its names are not those of {type(self.model).__name__}: {checks.some(sorted(unknown))}"
        both = [name for name in self.tied if name in stored]
        if both:
            return f"it stores a weight that the config ties to another: {checks.some(both)}"
        return None

    def complete(self, stored: Mapping[str, Stored], what: str) -> None:
        """Raises CheckpointError, naming tensors, where the checkpoint is not this model's."""
        missing = [n for n in self.expected if n not in stored and n not in self.tied]
        shapes = [
            (name, stored[name].shape, tensor.shape)
            for name, tensor in self.expected.items()
            if name in stored
            and not (self.stored_in_4bit and f"{name}.absmax" in stored)  # packed
            and stored[name].shape != tuple(tensor.shape)
        ]
        checks.require_complete({"missing_keys": missing, "mismatched_keys": shapes}, what)

    def statistics(self, name: str, stored: Mapping[str, Stored]) -> list[str]:
        """The names of what a stored 4-bit weight brings beside its packed data."""
        return [key for key in stored if key.startswith(f"{name}.")] if self.stored_in_4bit else []

    def _owner(self, name: str) -> str | None:
        if name in self.expected:
            return name
        weight, found, _ = name.partition(".weight.")
        owner = f"{weight}.weight"
        return owner if self.stored_in_4bit and found and owner in self.expected else None

    def put(self, name: str, value: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Gives a parameter or buffer its values; `value` on the device where it is to live, as stored."""
        import bitsandbytes as bnb
        from torch import nn

        kind: Any = bnb.nn.Params4bit

        path, _, key = name.rpartition(".")
        module = self.model.get_submodule(path)
        expected = self.expected[name]
        if statistics:
            new: Any = kind.from_prequantized(
                value, dict(statistics), device=value.device, module=module
            )
            if tuple(new.quant_state.shape) != (module.out_features, module.in_features):
                shapes = [(name, new.quant_state.shape, (module.out_features, module.in_features))]
                checks.require_complete({"mismatched_keys": shapes}, "the checkpoint")
        elif isinstance(module, bnb.nn.Linear4bit) and key == "weight" and not self.stored_in_4bit:
            old: Any = module._parameters[key]
            new = kind(
                value.to(self.dtype),
                requires_grad=False,
                blocksize=old.blocksize,
                compress_statistics=old.compress_statistics,
                quant_type=old.quant_type,
                quant_storage=old.quant_storage,
                module=module,
            ).to(value.device)
        else:
            value = value.to(expected.dtype)
            if key in module._buffers:
                module._buffers[key] = value
                value._is_hf_initialized = True  # type: ignore[attr-defined]
                return
            new = nn.Parameter(value, requires_grad=False)
        new._is_hf_initialized = True
        module._parameters[key] = new

    def finish(self, directory: Path | None) -> None:
        """Ties, fills the buffers that no checkpoint holds, and leaves what from_pretrained leaves on a model."""
        import torch
        from transformers import GenerationConfig

        model = self.model
        model.tie_weights()
        for module in model.modules():
            transient = module._non_persistent_buffers_set
            module._is_hf_initialized = not transient
            for name in transient:
                if module._buffers.get(name) is not None:
                    module._buffers[name] = torch.empty_like(
                        module._buffers[name], device=self.device
                    )
        model.initialize_weights()  # of modules that are not marked, and there of tensors that are not
        left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
        if left:
            raise CheckpointError(
                f"nothing gave values to {checks.some(left)} of {type(model).__name__}; this is no family that Hotloop "
                "loads"
            )
        model.eval()
        if directory is not None and (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        if self.quantizer is not None:
            model.hf_quantizer = self.quantizer
            self.quantizer.postprocess_model(model)
        model._weight_conversions = []  # none was applied, so save_pretrained reverts none


def fill(
    skeleton: Skeleton,
    stored: Mapping[str, Stored],
    what: str,
    *,
    homes: Homes | None,
    spec: FamilySpec,
    plan: Plan | None,
    finite: bool,
    directory: Path | None,
) -> None:
    """Reads every tensor into its home: the device, one at a time; the host for what the plan keeps there.

    The device holds at most what the plan keeps on it, one tensor as stored (and as cast, where the dtype is another),
    and one layer that is to stream.

    Raises:
        CheckpointError: missing, mis-shaped or non-finite tensors, or a truncated file.
        BudgetError: the host cannot lock memory for what lives there.
    """
    import torch

    skeleton.complete(stored, what)
    host = set()
    if plan is not None and plan.embedding_on_host:
        host.add(f"{spec.embedding}.weight")
    if plan is not None and plan.head_on_host:
        host.add(f"{spec.head}.weight")
    check = _Finite(what) if finite else None
    names = [name for name in skeleton.expected if name in stored]
    beside = {name: skeleton.statistics(name, stored) for name in names}
    here = [stored[n] for name in names if name not in host for n in (name, *beside[name])]
    arriving = uploaded(here, skeleton.device)
    with torch.no_grad():
        for name in names:
            value = stored[name].load() if name in host else next(arriving)
            statistics = {n: next(arriving) for n in beside[name]}
            if check is not None:
                check.see(name, value)
            skeleton.put(name, value, statistics)
            del value, statistics  # else it would still be there while the next one is allocated
            if homes is not None:
                _house(homes, spec, name, names)
    arriving.close()
    if check is not None:
        check.done()
    skeleton.finish(directory)
    if homes is not None:
        homes.house_ends()


def _house(homes: Homes, spec: FamilySpec, name: str, names: list[str]) -> None:
    """Sends a streamed layer to the host as soon as its last tensor is there."""
    layer = _layer(spec, name)
    if layer in homes.layers:
        following = names.index(name) + 1
        if following == len(names) or _layer(spec, names[following]) != layer:
            homes.house_layer(layer)


def _layer(spec: FamilySpec, name: str) -> int | None:
    number, _, _ = name.removeprefix(f"{spec.layers}.").partition(".")
    return int(number) if name.startswith(f"{spec.layers}.") else None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A quantiser's layers are in torch's default dtype, which is the model's while transformers builds it."""
    import torch

    found = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(found)


class _Finite:
    """Looks for NaN and infinity where the tensors are, and waits for the device's answers at the end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen: list[tuple[str, Tensor]] = []

    def see(self, name: str, tensor: Tensor) -> None:
        verdict = checks.is_finite(tensor)
        if verdict is not None:
            self._seen.append((name, verdict))

    def done(self) -> None:
        checks.refuse_non_finite([n for n, verdict in self._seen if not bool(verdict)], self._what)
