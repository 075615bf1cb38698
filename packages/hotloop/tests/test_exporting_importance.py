"""Importance measured by hooks is the mean square of each layer's inputs, on the tokens that count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hotloop.exporting import export, measure_importance
from hotloop.wiring import wire
from hotloop_core import Importance
from hotloop_core.errors import ConfigError, DataError, ExportError, UnsupportedError
from hotloop_testkit.tiny import build, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig


def tiny() -> Any:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return build(config).eval()


IDS = torch.arange(60).reshape(2, 30)
Q = "model.layers.1.self_attn.q_proj.weight"


def expected(model: Any, kept: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    layer = model.model.layers[1].input_layernorm
    handle = layer.register_forward_hook(lambda *found: seen.append(found[2]))
    with torch.no_grad():
        model(IDS, attention_mask=kept.long())
    handle.remove()
    return seen[0].reshape(-1, 64)[kept.reshape(-1)].square().mean(0)


@pytest.mark.parametrize("padded", [False, True])
def test_each_column_has_the_mean_square_of_its_inputs(padded: bool) -> None:
    model = tiny()
    kept = torch.ones_like(IDS, dtype=torch.bool)
    if padded:
        kept[1, 20:] = False
    batch = {"input_ids": IDS, "attention_mask": kept.long()}
    found = measure_importance(model, [batch, batch], source="here")
    assert (found.tokens, found.source) == (2 * int(kept.sum()), "here")
    torch.testing.assert_close(found.columns[Q], expected(model, kept), rtol=1e-5, atol=1e-8)
    assert len(found.columns) == 14 and not any("lm_head" in name for name in found.columns)


def test_wiring_and_adapters_change_no_name_and_leave_the_model_as_it_was() -> None:
    plain = measure_importance(tiny(), [{"input_ids": IDS}])
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear"))
    receipt = wire(model)
    model.train()
    found = measure_importance(model, [{"input_ids": IDS}])
    assert model.training
    hooks = [m._forward_pre_hooks for m in model.modules() if "Linear" in type(m).__name__]
    assert not any(hooks)
    receipt.undo()
    assert found.columns.keys() == plain.columns.keys()
    for name, means in plain.columns.items():
        torch.testing.assert_close(found.columns[name], means, rtol=1e-4, atol=1e-7)


def test_no_token_is_refused() -> None:
    with pytest.raises(DataError, match="no token"):
        measure_importance(tiny(), [])


def test_a_layer_that_the_forward_does_not_call_is_named() -> None:
    model = tiny()
    model.model.spare = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match=r"model\.spare"):
        measure_importance(model, [{"input_ids": IDS}])


def test_importance_of_another_model_is_refused_by_its_width(tmp_path: Path) -> None:
    found = measure_importance(tiny(), [{"input_ids": IDS}])
    other = build(LlamaConfig(**(tiny().config.to_dict() | {"hidden_size": 32, "head_dim": 8})))
    with pytest.raises(ExportError, match=r"64 columns for .*measured on another model"):
        export(other, tokenizer(320), tmp_path, format="gguf", quant="f32", importance=found)


@pytest.mark.parametrize("format_, quant", [("safetensors", "16bit"), ("gguf", "adapter")])
def test_importance_is_refused_where_nothing_uses_it(
    format_: str, quant: str, tmp_path: Path
) -> None:
    model = tiny()
    found = measure_importance(model, [{"input_ids": IDS}])
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ConfigError, match="importance matrix"):
        export(model, tokenizer(320), tmp_path, format=format_, quant=quant, importance=found)


def test_tensors_without_importance_are_reported(tmp_path: Path) -> None:
    model = tiny()
    found = measure_importance(model, [{"input_ids": IDS}])
    columns = {name: means for name, means in found.columns.items() if name != Q}
    part = Importance(columns=columns, tokens=found.tokens)
    report = export(model, tokenizer(320), tmp_path, format="gguf", quant="q4_0", importance=part)
    assert "1 tensors are quantised without importance" in " ".join(report.notes)
    assert Q in " ".join(report.notes)
