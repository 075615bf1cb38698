"""Exports that concern the base: 4-bit checkpoints, what a QLoRA adapter is merged into, adapters of another base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from hotloop.exporting import compare_bases, export, open_checkpoint
from hotloop.exporting.bases import mean_loss
from hotloop.exporting.checkpoint import fingerprint, record_base
from hotloop.loading.source import locate
from hotloop_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    UnsupportedError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

IDS = torch.arange(40).reshape(2, 20)
BATCHES = [{"input_ids": IDS, "labels": IDS}]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base", seed=1)


def saved(folder: Path, seed: int, **changes: Any) -> Path:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 304, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**(sizes | changes))).save_pretrained(folder)
    return folder


def in_4bit(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config
    )


def adapted(model: Any) -> PeftModel:
    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def test_a_4bit_export_is_loaded_by_transformers_with_the_same_bits(
    base: Path, tmp_path: Path
) -> None:
    """Merged in 16 bits and then quantised by bitsandbytes on loading, or written in 4 bits: one and the same."""
    model = adapted(LlamaForCausalLM.from_pretrained(base))
    export(model, None, tmp_path / "full", format="safetensors", quant="32bit")
    report = export(model, None, tmp_path / "four", format="safetensors", quant="merged_4bit")
    assert report.quants == ("4bit",)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "four", dtype=torch.float32, device_map={"": "cpu"}, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = in_4bit(tmp_path / "full")
    for name, parameter in expected.named_parameters():
        found = loaded.get_parameter(name)
        if parameter.dtype is torch.uint8:
            assert torch.equal(found.data.reshape(-1), parameter.data.reshape(-1)), name
            weights = [dequantize_4bit(p.data, p.quant_state).float() for p in (found, parameter)]
            torch.testing.assert_close(weights[0], weights[1], rtol=0.05, atol=1e-6)
        else:
            assert torch.equal(found.float(), parameter.bfloat16().float()), name
    size = sum(file.bytes for file in report.files)
    assert size < 0.7 * (tmp_path / "full" / "model.safetensors").stat().st_size


def test_4bit_shards_are_loaded_too(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    export(model, None, tmp_path, format="safetensors", quant="4bit", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    places = {index["weight_map"][name + end] for end in ("", ".absmax", ".nested_absmax")}
    assert len(places) == 1
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, device_map={"": "cpu"}
    )
    truth, quantised = logits(model), logits(in_4bit(base))
    assert (logits(loaded) - truth).norm() < 1.1 * (quantised - truth).norm()


def test_a_qlora_merge_goes_into_either_base_and_says_which(base: Path, tmp_path: Path) -> None:
    model = adapted(in_4bit(base))
    on_original = adapted(LlamaForCausalLM.from_pretrained(base))
    trained = export(model, None, tmp_path / "t", format="safetensors", quant="32bit")
    original = export(
        model, None, tmp_path / "o", format="safetensors", quant="32bit", base="original"
    )
    assert "dequantised 4-bit weights" in trained.notes[0]
    assert "original 16-bit weights" in original.notes[0]
    for folder, truth, other in (("t", model, on_original), ("o", on_original, model)):
        found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder))
        assert (found - logits(truth)).norm() < 0.1 * (found - logits(other)).norm(), folder


@torch.no_grad()
def test_the_held_out_losses_of_both_bases_are_those_of_the_models(base: Path) -> None:
    model = adapted(in_4bit(base))
    losses = compare_bases(model, BATCHES)
    # bitsandbytes computes on a CPU in another way from the second call on.
    assert losses.trained == pytest.approx(float(model(**BATCHES[0]).loss), rel=1e-3)
    original = adapted(LlamaForCausalLM.from_pretrained(base))
    assert losses.original == pytest.approx(float(original(**BATCHES[0]).loss), rel=1e-5)
    assert losses.tokens == 38 and losses.better in ("trained", "original")
    assert f"{losses.original - losses.trained:+.4f}" in str(losses)


def test_a_loss_over_no_token_is_refused(base: Path) -> None:
    with pytest.raises(DataError, match="held-out"):
        mean_loss(LlamaForCausalLM.from_pretrained(base), [])


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_original_base_of_what_has_none_is_refused(
    wrapped: bool, base: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    with pytest.raises(ConfigError, match="base="):
        export(
            adapted(model) if wrapped else model,
            None,
            tmp_path,
            format="safetensors",
            base="original",
        )


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")
def test_a_checkpoint_is_opened_without_being_copied(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = saved(tmp_path / "base", seed=1, vocab_size=40_000, hidden_size=512)
    tiny_tokenizer.save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    before = anonymous_bytes()
    model, _ = open_checkpoint(str(folder))
    assert model.get_input_embeddings().weight.sum().isfinite()
    assert anonymous_bytes() - before < size / 4


def test_an_opened_checkpoint_is_the_model(base: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(base)
    model, tokenizer = open_checkpoint(str(base))
    assert torch.equal(logits(model), logits(LlamaForCausalLM.from_pretrained(base)))
    assert len(tokenizer) == len(tiny_tokenizer) and not model.training


def test_an_adapter_folder_is_opened_on_its_base(
    base: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    tiny_tokenizer.save_pretrained(base)
    model = adapted(LlamaForCausalLM.from_pretrained(base))
    model.save_pretrained(tmp_path / "adapter")
    opened, _ = open_checkpoint(str(tmp_path / "adapter"))
    assert torch.equal(logits(opened), logits(model))


def test_an_adapter_of_another_base_is_refused_by_its_recorded_hash(
    base: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    tiny_tokenizer.save_pretrained(base)
    adapted(LlamaForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "adapter")
    record_base(tmp_path / "adapter", str(base))
    open_checkpoint(str(tmp_path / "adapter"))
    saved(base, seed=3)
    with pytest.raises(ExportError, match=r"was trained on .* with fingerprint"):
        open_checkpoint(str(tmp_path / "adapter"))


def test_an_adapter_of_another_base_is_refused_by_its_shapes(
    base: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    adapted(LlamaForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "adapter")
    saved(base, seed=1, intermediate_size=96)
    tiny_tokenizer.save_pretrained(base)
    with pytest.raises(ExportError, match=r"does not fit.*size mismatch"):
        open_checkpoint(str(tmp_path / "adapter"))


def test_fingerprints_tell_checkpoints_apart_and_not_their_loading(
    base: Path, tmp_path: Path
) -> None:
    same, other = saved(tmp_path / "same", seed=1), saved(tmp_path / "other", seed=2)
    found = [fingerprint(locate(folder)) for folder in (base, same, other)]
    assert found[0] == found[1] != found[2]


def test_damaged_and_quantised_checkpoints_are_not_opened(base: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"x": 1}}))
    with pytest.raises(UnsupportedError, match="is quantised"):
        open_checkpoint(str(base))
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(str(base))
