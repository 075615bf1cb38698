import copy
import importlib
import io
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hotloop import FastLanguageModel, FastModel, is_bfloat16_supported
from hotloop.fast.refusals import FROM_PRETRAINED, GET_PEFT_MODEL, UnknownArgumentError
from hotloop.wiring import receipt_of
from hotloop_core.errors import ConfigError, HotloopError, UnsupportedError
from hotloop_core.plan import RECOMPUTE_ALL

EXAMPLES = Path(__file__).parents[3] / "examples"


def loaded(path, **options):
    return FastLanguageModel.from_pretrained(
        str(path), **{"max_seq_length": 64, "load_in_4bit": False, "device": "cpu", **options}
    )


@pytest.fixture(scope="module")
def shared(tiny_llama):
    return loaded(tiny_llama)[0]


@pytest.fixture
def model(shared):
    return copy.deepcopy(shared)


def test_the_base_is_in_four_bit_unless_sixteen_or_full_are_asked_for(tiny_llama):
    def four_bit(**options):
        model = FastLanguageModel.from_pretrained(str(tiny_llama), 64, device="cpu", **options)[0]
        return hasattr(model.model.layers[0].mlp.up_proj.weight, "quant_state")

    assert four_bit()
    assert not four_bit(load_in_16bit=True)
    assert not four_bit(full_finetuning=True)


@pytest.mark.parametrize(
    "asked, layers", [(True, (RECOMPUTE_ALL,) * 2), (False, None), ("auto", None)]
)
def test_gradient_checkpointing_maps_to_plans(model, asked, layers):
    adapted = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=asked)
    plan = receipt_of(adapted).plan
    recomputed = {name for layer in plan.layers for name in layer.placements}
    assert plan.layers == layers if layers else not recomputed
    FastLanguageModel.for_training(adapted, use_gradient_checkpointing=True)
    assert receipt_of(adapted).plan.layers == (RECOMPUTE_ALL,) * 2


def test_a_word_that_is_no_checkpointing_is_refused(model):
    with pytest.raises(ConfigError, match="offload"):
        FastLanguageModel.get_peft_model(model, use_gradient_checkpointing="always")


def test_offload_means_layer_inputs_on_the_host_and_the_fastest_that_fits_under_a_budget(
    tiny_llama,
):
    model, _ = loaded(tiny_llama, max_seq_length=256, use_gradient_checkpointing="offload")
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing="offload")
    layers = receipt_of(model).plan.layers
    assert layers[0].placement("x") == "offload" and layers[0].placement("gate_up") == "recompute"
    model, _ = loaded(tiny_llama, max_seq_length=256, vram="4GiB")
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing="unsloth")
    assert str(receipt_of(model).plan.layers[0]) == "keep everything"


def test_modes_switch_the_cache_and_dropout(model):
    adapted = FastLanguageModel.get_peft_model(model, r=4)
    assert FastLanguageModel.for_inference(adapted) is adapted
    assert (adapted.training, adapted.config.use_cache) == (False, True)
    assert FastLanguageModel.for_training(adapted) is adapted
    assert (adapted.training, adapted.config.use_cache) == (True, False)


@pytest.mark.parametrize("name", [n for n, (_, why) in FROM_PRETRAINED.items() if why])
def test_from_pretrained_refuses_by_name_what_is_not_there(name):
    with pytest.raises(UnsupportedError, match=rf"{name}='something'"):
        FastLanguageModel.from_pretrained("nowhere", **{name: "something"})


@pytest.mark.parametrize("name", GET_PEFT_MODEL)
def test_get_peft_model_refuses_by_name_what_is_not_there(name):
    with pytest.raises(UnsupportedError, match=rf"{name}='something'"):
        FastLanguageModel.get_peft_model(None, **{name: "something"})


def test_arguments_that_are_off_are_accepted(tiny_llama):
    model, _ = loaded(tiny_llama, load_in_8bit=False, fast_inference=False, device_map="auto")
    FastLanguageModel.get_peft_model(
        model, use_dora=False, loftq_config={}, layers_to_transform=None
    )


@pytest.mark.parametrize("named", ["cpu", {"": "cpu"}])
def test_a_device_map_of_one_device_is_that_device(tiny_llama, named):
    model, _ = loaded(tiny_llama, device_map=named)
    FastLanguageModel.get_peft_model(model, task_type="CAUSAL_LM")
    assert model.device.type == "cpu"


@pytest.mark.parametrize("named", [{"model": 0, "lm_head": "cpu"}, {}, "disk"])
def test_a_device_map_over_several_devices_is_refused(named):
    with pytest.raises(UnsupportedError, match=r"device_map=.*one device here"):
        FastLanguageModel.from_pretrained("nowhere", device_map=named)


def test_an_unknown_argument_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownArgumentError, match="Did you mean 'max_seq_length'"):
        FastModel.from_pretrained("nowhere", max_seq_lenght=3)
    with pytest.raises(TypeError, match="Did you mean 'lora_alpha'"):
        FastModel.get_peft_model(None, lora_alhpa=3)


def test_adapters_on_weights_that_train_are_refused(tiny_llama):
    model, _ = loaded(tiny_llama, full_finetuning=True)
    with pytest.raises(ConfigError, match="full_finetuning"):
        FastLanguageModel.get_peft_model(model)


def test_another_length_than_the_loaded_one_is_refused(model):
    with pytest.raises(ConfigError, match="loaded for 64"):
        FastLanguageModel.get_peft_model(model, max_seq_length=128)


def test_saving_methods_call_the_exporter_for_the_adapted_model_and_its_copies(model, monkeypatch):
    calls = []
    fake = types.ModuleType("hotloop.exporting")
    fake.export = lambda model, *rest, **options: calls.append((model, rest, options))
    monkeypatch.setitem(sys.modules, "hotloop.exporting", fake)
    adapted = FastLanguageModel.get_peft_model(model, r=4)
    adapted.save_pretrained_merged("out", "tok", save_method="merged_16bit")
    options = {"format": "safetensors", "quant": "16bit", "overwrite": True}
    options |= {"max_shard_bytes": None}
    assert calls.pop() == (adapted, ("tok", "out"), options)
    adapted.save_pretrained_merged("out", "tok", save_method="merged_4bit")
    assert calls.pop()[2]["quant"] == "4bit"
    adapted.save_pretrained_merged("out", "tok", save_method="lora")
    assert calls.pop()[2]["quant"] == "adapter"
    adapted.save_pretrained_gguf("out", "tok", quantization_method=["q8_0", "not_quantized"])
    options = {"format": "gguf", "quant": ["q8_0", "bf16"], "overwrite": True}
    assert calls.pop() == (adapted, ("tok", "out"), options)

    twin = copy.deepcopy(adapted)
    twin.save_pretrained_gguf("out")
    assert calls.pop()[0] is twin
    buffer = io.BytesIO()
    torch.save(adapted, buffer)
    buffer.seek(0)
    revived = torch.load(buffer, weights_only=False)
    revived.save_pretrained_gguf("out")
    assert calls.pop()[0] is revived


def test_an_unknown_save_method_is_refused_and_the_known_ones_are_named(model):
    with pytest.raises(ConfigError, match=r"merged_16bit, merged_4bit, .*lora"):
        model.save_pretrained_merged("out", save_method="fast")


def test_saving_refuses_by_name_what_it_does_not_have(model):
    with pytest.raises(UnsupportedError, match=r"push_to_hub=True.*use push_to_hub_merged"):
        model.save_pretrained_merged("out", push_to_hub=True)
    with pytest.raises(UnsupportedError, match=r"first_conversion='q8_0'"):
        model.save_pretrained_gguf("out", first_conversion="q8_0")
    with pytest.raises(ConfigError, match="Did you mean 'quantization_method'"):
        model.save_pretrained_gguf("out", quantisation_method="q8_0")


def test_embedding_and_head_among_the_targets_train_whole(model):
    adapted = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]
    )
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    ends = {name for name in trained if "modules_to_save" in name}
    assert {name.rpartition(".modules_to_save")[0].rpartition(".")[2] for name in ends} == {
        "embed_tokens",
        "lm_head",
    }
    assert all("q_proj.lora_" in name for name in trained - ends)


@pytest.mark.parametrize("module", ["hotloop.fast", "hotloop.chat_templates"])
def test_names_that_scripts_import_and_hotloop_lacks_say_what_to_do(module):
    with pytest.raises(ImportError, match="nothing needs patching"):
        getattr(importlib.import_module(module), "PatchDPOTrainer")  # noqa: B009
    with pytest.raises(HotloopError, match="HotloopTrainer"):
        getattr(importlib.import_module(module), "UnslothTrainer")  # noqa: B009
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(importlib.import_module(module), "nonsense")  # noqa: B009


@pytest.fixture
def hub(monkeypatch):
    """What reaches the hub: (repository, private, message, files)."""
    import huggingface_hub

    class Api:
        def __init__(self, endpoint=None, token=None):
            assert token is None

        def create_repo(self, repo_id, *, private, exist_ok):
            self.private = private
            return f"https://hub.invalid/{repo_id}"

        def create_commit(self, repo_id, operations, *, commit_message):
            files = {operation.path_in_repo for operation in operations}
            pushed.append((repo_id, self.private, commit_message, files))

    pushed: list[tuple] = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return pushed


def test_pushing_uploads_what_was_exported(model, tiny_tokenizer, hub):
    assert model.push_to_hub_gguf("me/tiny", tiny_tokenizer, "q8_0", token="").endswith("me/tiny")
    assert any(name.endswith("-Q8_0.gguf") for name in hub.pop()[3])
    model.push_to_hub_merged(
        "me/tiny", tiny_tokenizer, private=True, commit_message="mine", max_shard_size="100KB"
    )
    (name, private, message, files) = hub.pop()
    assert (name, private, message) == ("me/tiny", True, "mine")
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= files


def test_pushing_refuses_before_anything_is_exported(model, hub):
    with pytest.raises(ConfigError, match="no name of a repository"):
        model.push_to_hub_merged("a/b/c")
    with pytest.raises(UnsupportedError, match=r"create_pr=True.*open the request on the hub"):
        model.push_to_hub_gguf("me/tiny", create_pr=True)
    assert hub == []


def test_methods_that_scripts_call_and_hotloop_lacks_say_what_to_do(model):
    adapted = FastLanguageModel.get_peft_model(model, r=4)
    with pytest.raises(UnsupportedError, match=r"no fast_generate: .*model\.generate"):
        adapted.fast_generate(["hi"], sampling_params=None)
    with pytest.raises(UnsupportedError, match=r"save_pretrained\(directory\)"):
        copy.deepcopy(adapted).save_lora("out")


def test_everything_that_a_call_cannot_have_is_named_at_once():
    with pytest.raises(UnsupportedError, match=r"fast_inference=True(.|\n)*load_in_8bit=True"):
        FastModel.from_pretrained("nowhere", fast_inference=True, load_in_8bit=True)
    with pytest.raises(UnknownArgumentError, match=r"lora_alhpa(.|\n)*use_dora=True"):
        FastModel.get_peft_model(None, lora_alhpa=3, use_dora=True)


def test_a_saved_adapter_trains_on_where_it_was_loaded_and_a_second_one_is_refused(model, tmp_path):
    FastLanguageModel.get_peft_model(model, r=4).save_pretrained(tmp_path)
    again, _ = loaded(tmp_path)
    trained = [name for name, p in again.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    again(input_ids=torch.arange(3, 20)[None], labels=torch.arange(3, 20)[None]).loss.backward()
    with pytest.raises(ConfigError, match=r"adapters default already.*leave this call out"):
        FastLanguageModel.get_peft_model(again, r=4)


def test_bfloat16_support_is_what_this_machine_trains_in():
    expected = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    assert is_bfloat16_supported() is expected


def test_embeddings_train_at_their_own_rate(tiny_llama, tmp_path):
    from datasets import Dataset
    from hotloop.fast import HotloopTrainer, HotloopTrainingArguments

    def trainer(**options):
        model, tokenizer = loaded(tiny_llama)
        model = FastLanguageModel.get_peft_model(model, r=4, **options)
        arguments = HotloopTrainingArguments(
            output_dir=str(tmp_path),
            learning_rate=1e-3,
            embedding_learning_rate=1e-5,
            max_length=64,
            report_to="none",
            bf16=False,
            optim="adamw_torch",
        )
        data = Dataset.from_list([{"text": "the quick brown fox"}] * 2)
        return HotloopTrainer(
            model=model, processing_class=tokenizer, train_dataset=data, args=arguments
        )

    with_embedding = trainer(modules_to_save=["embed_tokens", "lm_head"])
    rates = {}
    for group in with_embedding.create_optimizer().param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"]
    for name, parameter in with_embedding.model.named_parameters():
        if parameter.requires_grad:
            own = "embed_tokens" in name or "lm_head" in name
            assert rates[id(parameter)] == (1e-5 if own else 1e-3), name
    with pytest.raises(ConfigError, match="modules_to_save"):
        trainer().create_optimizer()


@pytest.mark.slow
def test_the_drop_in_script_trains_and_saves(tiny_llama, tmp_path):
    output = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, EXAMPLES / "dropin.py", tiny_llama, "--steps", "6", "--output", output],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = done.stdout.split("loss ")[-1].splitlines()[0].split(" -> ")
    assert float(last) < float(first)
    assert (output / "lora" / "adapter_model.safetensors").is_file()
    assert (output / "merged" / "model.safetensors").is_file()
