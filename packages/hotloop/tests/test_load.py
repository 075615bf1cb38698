import json
import shutil
import subprocess
import sys

import pytest
import torch
from hotloop.loading import load, load_tokenizer
from hotloop.wiring import receipt_of
from hotloop_core.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    NoFamilyError,
    SecurityError,
    UnsupportedError,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer


def plain(path, **options):
    return load(path, **{"bits": 16, "max_seq_len": 64, "wire": False, "device": "cpu", **options})


@pytest.fixture
def copy(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


def change_weights(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def change_config(directory, **values):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


def test_loading_a_folder_gives_its_weights_frozen_in_fp32_on_a_cpu(tiny_llama):
    model, tokenizer = plain(tiny_llama)
    stored = load_file(tiny_llama / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name])
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
    own = AutoTokenizer.from_pretrained(tiny_llama)
    assert tokenizer.model_max_length == own.model_max_length
    assert model.config.use_cache is False
    assert model.generation_config.use_cache is not False


def test_the_tokenizer_alone_is_the_one_that_comes_with_the_model(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.model_max_length, tokenizer.pad_token = 200, None
    tokenizer.save_pretrained(copy)
    alone, beside = load_tokenizer(copy), plain(copy)[1]
    assert alone("the fox").input_ids == beside("the fox").input_ids
    assert alone.pad_token == beside.pad_token == "<pad>"
    assert alone.model_max_length == beside.model_max_length == 200
    shutil.rmtree(copy)
    with pytest.raises(CheckpointError, match="no such file"):
        load_tokenizer(copy)


def test_a_dtype_is_taken_as_asked(tiny_llama):
    assert plain(tiny_llama, dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="int8"):
        plain(tiny_llama, dtype="int8")


def test_full_finetuning_trains_every_weight(tiny_llama):
    model, _ = plain(tiny_llama, full_finetuning=True)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="bits=16"):
        plain(tiny_llama, bits=4, full_finetuning=True)


def test_a_loaded_model_is_wired_with_a_plan_for_its_longest_sequence(tiny_llama):
    model, _ = load(tiny_llama, bits=16, max_seq_len=64, vram="2GiB", device="cpu")
    plan = receipt_of(model).plan
    assert (plan.tokens, plan.longest, plan.budget) == (64, 64, 2 * 2**30)


def test_four_bit_quantises_the_projections_and_nothing_else(tiny_llama):
    model, _ = plain(tiny_llama, bits=4)
    quantised = {n for n, p in model.named_parameters() if hasattr(p, "quant_state")}
    assert len(quantised) == 14
    assert all("_proj" in name for name in quantised)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)


def test_evaluating_a_four_bit_model_leaves_its_weights_as_they_are(tiny_llama):
    model, _ = plain(tiny_llama, bits=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.eval()(torch.arange(10)[None])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_saved_four_bit_checkpoint_loads_bit_for_bit_and_refuses_16(
    tiny_llama, tiny_tokenizer, tmp_path
):
    model, _ = plain(tiny_llama, bits=4)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    again, _ = plain(tmp_path, bits=4)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    with pytest.raises(ConfigError, match="bits=4"):
        plain(tmp_path, bits=16)


def test_an_adapter_folder_loads_its_base_and_goes_on_training(tiny_llama, tmp_path):
    from hotloop.lora import add_lora

    model, _ = plain(tiny_llama)
    adapted = add_lora(model, r=4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    adapted.save_pretrained(tmp_path)
    again, _ = load(tmp_path, bits=16, max_seq_len=64, device="cpu")
    assert receipt_of(again) is not None
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    ids = torch.arange(10)[None]
    torch.testing.assert_close(again(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize(
    "break_it, says",
    [
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.update({"extra": torch.ones(2)}), "not of this model: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), "of another shape: model.norm"),
        (lambda t: t["lm_head.weight"][3].fill_(float("nan")), "NaN or infinity: lm_head.weight"),
        (lambda t: t["lm_head.weight"][3].fill_(float("inf")), "NaN or infinity: lm_head.weight"),
    ],
)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_checkpoint_with_wrong_tensors_is_refused_by_their_names(copy, break_it, says, bits):
    change_weights(copy, break_it)
    with pytest.raises(CheckpointError, match=says):
        plain(copy, bits=bits)


def test_a_truncated_checkpoint_is_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        plain(copy)


def test_a_missing_shard_is_named(copy):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model-2\.safetensors"):
        plain(copy)


def test_a_folder_without_weights_or_config_says_what_was_expected(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        plain(copy)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        plain(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no such file"):
        plain(tmp_path / "nowhere")


def test_pickled_weights_are_refused_with_the_way_to_convert_them(copy):
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(SecurityError, match="save_pretrained"):
        plain(copy)
    with pytest.raises(SecurityError, match="pickled"):
        plain(copy / "pytorch_model.bin")


def test_an_unknown_architecture_is_told_before_any_weight_is_read(copy):
    change_config(copy, model_type="phi4")
    (copy / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(NoFamilyError, match="phi4"):
        plain(copy)


def test_code_in_a_checkpoint_is_refused_unless_asked_for(copy, monkeypatch):
    from hotloop_core import Registry, discover

    change_config(copy, model_type="foreign", auto_map={"AutoConfig": "code.Foreign"})
    llama = next(f for f in discover().families if f.name == "llama")
    monkeypatch.setattr(Registry, "match", lambda *_, **__: llama)
    with pytest.raises(SecurityError, match="trust_remote_code"):
        plain(copy)


def test_a_tokenizer_larger_than_the_embedding_is_refused(copy, tiny_tokenizer):
    import copy as copies

    larger = copies.deepcopy(tiny_tokenizer)
    larger.add_tokens([f"<extra{i}>" for i in range(20)])
    larger.save_pretrained(copy)
    with pytest.raises(ConfigError, match="highest id is 310, the embedding has 304 rows"):
        plain(copy)


def test_sequences_beyond_the_positions_need_rope_scaling(tiny_llama):
    with pytest.raises(ConfigError, match="256 positions"):
        plain(tiny_llama, max_seq_len=512)
    scaling = {"rope_type": "linear", "factor": 2.0}
    model, _ = plain(tiny_llama, max_seq_len=512, rope_scaling=scaling)
    assert model.config.rope_parameters["rope_type"] == "linear"
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    with pytest.raises(ConfigError, match="512 positions"):
        plain(tiny_llama, max_seq_len=513, rope_scaling=scaling)
    for nothing in (None, 0):
        with pytest.raises(ConfigError, match=f"max_seq_len={nothing}; expected"):
            plain(tiny_llama, max_seq_len=nothing)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a card says")
def test_cuda_that_is_absent_is_said(tiny_llama):
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        plain(tiny_llama, device="cuda")


def test_a_budget_that_nothing_fits_is_refused_before_the_weights_are_read(copy):
    change_weights(copy, lambda t: t["lm_head.weight"].fill_(float("nan")))
    with pytest.raises(BudgetError, match="at least"):
        plain(copy, vram="1MB")


@pytest.mark.parametrize("kind", [{"quant_method": "gptq"}, {"quant_method": "bitsandbytes"}])
def test_other_quantised_checkpoints_are_refused_by_name(copy, kind):
    change_config(copy, quantization_config=kind)
    with pytest.raises(UnsupportedError, match=kind["quant_method"]):
        plain(copy)


def test_a_tokenizer_without_padding_gets_a_token_that_it_has(copy, tiny_tokenizer):
    import copy as copies

    bare = copies.deepcopy(tiny_tokenizer)
    bare.pad_token = None
    bare.save_pretrained(copy)
    assert plain(copy)[1].pad_token == "<pad>"


def test_importing_hotloop_and_loading_loads_neither_torch_nor_transformers():
    code = (
        "import sys, hotloop.loading, hotloop.lora, hotloop.planner, hotloop.fast;"
        "print([m for m in ('torch', 'transformers', 'triton', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_budget_lets_the_allocator_grow_its_segments_or_says_why_it_cannot(monkeypatch):
    from hotloop.loading.load import _stretch_allocator

    settings = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    _stretch_allocator()
    assert settings == ["expandable_segments:True"]
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    with pytest.raises(UnsupportedError, match=r"Install a torch .* or load without vram="):
        _stretch_allocator()
