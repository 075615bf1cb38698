"""`hotloop.export` against what the live model computes: every kind of adapter, safetensors back in transformers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hotloop.exporting import export
from hotloop_core.errors import (
    ConfigError,
    ExportError,
    NoExporterError,
    OutputExistsError,
    UnsupportedError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

IDS = torch.arange(40).reshape(2, 20)
TRAINED = ("lora_", "modules_to_save", "trainable_tokens_delta")
"""In the names of what an adapter trains."""


def tiny(**changes: Any) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def adapted(model: Any, name: str = "default", **options: Any) -> PeftModel:
    """A PEFT model whose adapter changes what the model computes."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    if isinstance(model, PeftModel):
        model.add_adapter(name, LoraConfig(**settings))
    else:
        model = get_peft_model(model, LoraConfig(**settings))
    for path, parameter in model.named_parameters():
        if f".{name}" in path and any(part in path for part in TRAINED):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def exported(model: Any, directory: Path, quant: str = "32bit") -> Any:
    export(model, None, directory, format="safetensors", quant=quant)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def assert_same_logits(found: Any, truth: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (logits(found) - truth).abs().max() <= tolerance * truth.abs().max()


ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}},
    "lora-bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "o_proj"]},
    "trained-bias": {"bias": "lora_only"},
    "dora": {"use_dora": True},
    "modules-to-save": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "embedding-and-head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "trained-tokens": {"trainable_token_indices": [3, 7, 11]},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_merged_export_computes_what_the_adapter_model_computes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    plain = tiny(attention_bias=True)
    before = logits(plain)
    model = adapted(plain, **options)
    truth = logits(model)
    assert (truth - before).abs().max() > 0.05 * before.abs().max()
    assert_same_logits(exported(model, tmp_path), truth)


@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["lm_head"]}, {"trainable_token_indices": [3, 7]}],
    ids=["body", "head", "tokens"],
)
def test_tied_head_stays_tied_unless_the_adapter_unties_it(
    options: dict[str, Any], tmp_path: Path
) -> None:
    unties = "target_modules" in options
    with pytest.warns(UserWarning) if unties else nullcontext():  # PEFT's, on tied layers
        model = adapted(tiny(tie_word_embeddings=True), **options)
    loaded = exported(model, tmp_path)
    assert loaded.config.tie_word_embeddings == (not unties)
    assert_same_logits(loaded, logits(model))


def test_only_active_adapters_are_merged_and_all_of_them(tmp_path: Path) -> None:
    model = adapted(adapted(tiny()), "second", r=2)
    for i, active in enumerate((["default"], ["second"], ["default", "second"])):
        model.base_model.set_adapter(active)
        assert_same_logits(exported(model, tmp_path / str(i)), logits(model))


def test_disabled_and_merged_adapters_are_exported_as_computed(tmp_path: Path) -> None:
    model = adapted(tiny(), modules_to_save=["lm_head"])
    truth = logits(model)
    with model.disable_adapter():
        assert_same_logits(exported(model, tmp_path / "disabled"), logits(model))
    model.merge_adapter()
    assert_same_logits(exported(model, tmp_path / "merged"), truth, 1e-4)
    with model.disable_adapter(), pytest.raises(ExportError, match="merged into the weights"):
        export(model, None, tmp_path / "both", format="safetensors")


def test_four_bit_base_is_dequantised_and_merged(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    tiny(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    weight = quantised.model.layers[1].mlp.up_proj.weight
    expected = dequantize_4bit(weight.data, weight.quant_state).float()
    model = adapted(quantised)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    loaded = exported(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    merged = loaded.model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(merged.data, (expected + 2 * b @ a).data, rtol=1e-6, atol=1e-6)
    assert_same_logits(loaded, logits(model), 2e-2)


@pytest.mark.parametrize("stored, kept", [("float32", "bfloat16"), ("float16", "float16")])
def test_sixteen_bit_export_rounds_each_merged_weight_once(
    stored: str, kept: str, tmp_path: Path
) -> None:
    model = adapted(tiny().to(getattr(torch, stored)))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()  # as preparing for 4-bit training does
    loaded = exported(model, tmp_path, "16bit")
    assert loaded.dtype == getattr(torch, kept)
    live = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = live.lora_A["default"].weight, live.lora_B["default"].weight
    exact = live.base_layer.weight.float() + 2 * b.float() @ a.float()
    found = loaded.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(found, exact.to(loaded.dtype))


def test_neither_autocast_nor_a_lower_precision_reaches_the_merge(tmp_path: Path) -> None:
    model = adapted(tiny())
    plain = export(model, None, tmp_path / "plain", format="safetensors", quant="32bit")
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = export(model, None, tmp_path / "cast", format="safetensors", quant="32bit")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [f.sha256 for f in again.files] == [f.sha256 for f in plain.files]


@pytest.mark.gpu
def test_a_model_on_the_cpu_is_merged_on_the_card_as_well(tmp_path: Path) -> None:
    model = adapted(tiny())
    on_card = export(
        model, None, tmp_path / "card", format="safetensors", quant="32bit", device="cuda"
    )
    assert next(model.parameters()).device.type == "cpu" and on_card.tensors > 0
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "card"), logits(model))


def test_export_never_changes_the_live_model(tmp_path: Path) -> None:
    model = adapted(tiny(), use_dora=True, modules_to_save=["norm"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    exported(model, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config


def test_wiring_makes_no_difference_to_what_is_written(tmp_path: Path) -> None:
    from hotloop.wiring import wire

    model = adapted(tiny(hidden_size=64))
    plain = export(model, None, tmp_path / "plain", format="safetensors")
    receipt = wire(model)
    wired = export(model, None, tmp_path / "wired", format="safetensors")
    receipt.undo()
    assert [(f.path.name, f.sha256) for f in wired.files] == [
        (f.path.name, f.sha256) for f in plain.files
    ]


def test_a_base_quantised_otherwise_is_refused_but_its_adapter_exported(tmp_path: Path) -> None:
    model = adapted(tiny())
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedError, match=r"'gptq'.*quant='adapter'"):
        export(model, None, tmp_path, format="safetensors")
    assert export(model, None, tmp_path, format="safetensors", quant="adapter").tensors == 28


def test_shards_have_an_index_and_replace_an_older_single_file(tmp_path: Path) -> None:
    model = tiny()
    exported(model, tmp_path)
    calls: list[tuple[int, int, str]] = []
    report = export(
        model, None, tmp_path, format="safetensors", quant="32bit", max_shard_bytes=20_000,
        overwrite=True, progress=lambda *call: calls.append(call),
    )  # fmt: skip
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {file.path.name for file in report.files if file.path.suffix == ".safetensors"}
    assert set(index["weight_map"].values()) == shards and len(shards) > 3
    assert not (tmp_path / "model.safetensors").exists()
    assert [done for done, *_ in calls] == list(range(1, report.tensors + 1))
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), logits(model))
    exported_again = export(
        model, None, tmp_path, format="safetensors", quant="32bit", overwrite=True
    )
    assert {f.name for f in tmp_path.iterdir()} == {f.path.name for f in exported_again.files}


def test_adapter_export_is_loaded_by_peft(tmp_path: Path) -> None:
    model = adapted(adapted(tiny()), "second", r=2, target_modules=["q_proj"])
    for name in ("default", "second"):
        model.set_adapter(name)
        report = export(model, None, tmp_path / name, format="safetensors", quant="lora")
        assert report.quants == ("adapter",)
        loaded = PeftModel.from_pretrained(tiny(), tmp_path / name).eval()
        assert torch.equal(logits(loaded), logits(model))


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<e>", chat_template="{{ messages }}"
    )
    model = tiny()
    model.generation_config.eos_token_id = [2, 3]
    model.generation_config.temperature = 0.5  # transformers' own saving refuses this unsampled
    export(model, tokenizer, tmp_path, format="safetensors")
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.encode("a b") == [0, 1] and saved.chat_template == "{{ messages }}"
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 3] and generation["temperature"] == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(value: float, tmp_path: Path) -> None:
    model = tiny()
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = value
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has 1 of"):
        export(model, None, tmp_path, format="safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_not_finite_is_refused_while_blocks_are_under_way(tmp_path: Path) -> None:
    from hotloop_testkit.tiny import tokenizer

    model = tiny(vocab_size=320)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has 1 of"):
        export(model, tokenizer(320), tmp_path, format="gguf", quant=["f16", "q8_0"])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    exported(tiny(), tmp_path)
    with pytest.raises(OutputExistsError, match=r"config\.json"):
        export(tiny(), None, tmp_path, format="safetensors", max_shard_bytes=20_000)


def refusals() -> dict[str, tuple[type[Exception], str, Any, dict[str, Any]]]:
    from peft import IA3Config, PromptTuningConfig

    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    safetensors = {"format": "safetensors"}
    return {
        "format": (NoExporterError, "'npz'", tiny, {"format": "npz"}),
        "quant": (ConfigError, "did you mean '16bit'", tiny, safetensors | {"quant": "16bits"}),
        "two": (ConfigError, "of its own", tiny, safetensors | {"quant": ["16bit", "32bit"]}),
        "mixed": (ConfigError, "mixes", tiny, safetensors | {"quant": ["16bit", "adapter"]}),
        "none": (ConfigError, "empty", tiny, safetensors | {"quant": []}),
        "adapterless": (ExportError, "active adapter", tiny, safetensors | {"quant": "adapter"}),
        "module": (UnsupportedError, "Linear", lambda: torch.nn.Linear(1, 1), safetensors),
        "meta": (ExportError, "meta device", lambda: tiny().to("meta"), safetensors),
        "ia3": (UnsupportedError, "ia3", lambda: get_peft_model(tiny(), ia3), safetensors),
        "prompt": (UnsupportedError, "virtual", lambda: get_peft_model(tiny(), prompt), safetensors),
        "bias": (
            UnsupportedError,
            r"q_proj: adapter 'default' has lora_bias, and the layer that it is on no bias",
            lambda: adapted(tiny(), lora_bias=True, target_modules=["q_proj"]),
            safetensors,
        ),
        "dora": (
            UnsupportedError,
            "embed_tokens: adapter 'default' is of the kind Dora",
            lambda: adapted(tiny(), use_dora=True, target_modules=["embed_tokens"]),
            safetensors,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals())
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_cannot_be_exported_is_refused_by_name(case: str, tmp_path: Path) -> None:
    error, message, make, options = refusals()[case]
    with pytest.raises(error, match=message):
        export(make(), None, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot make"):
        export(tiny(), None, tmp_path / "file" / "out", format="safetensors")


def test_import_loads_no_heavy_library() -> None:
    import subprocess
    import sys

    program = (
        "import sys, hotloop.exporting, hotloop_gguf, hotloop_safetensors; "
        "print([m for m in ('torch', 'transformers', 'triton', 'peft', 'gguf') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert run.stdout.strip() == b"[]"
