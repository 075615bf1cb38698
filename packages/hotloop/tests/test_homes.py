"""Weights on the host: what the model computes, what it saves, what it refuses, and the way back."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from hotloop.exporting import export
from hotloop.homes import device_weight, homes_of, settle
from hotloop.loading import load, load_report
from hotloop.lora import add_lora
from hotloop.wiring import wire
from hotloop_core import LayerPlan, Plan
from hotloop_core.errors import UnsupportedError
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 304,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


KINDS = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),  # biases
    "phi3": (Phi3Config, {}),  # fused projections
    "gemma3": (Gemma3TextConfig, {}),  # tied, a scaled embedding, padding_idx
}


def make_plan(layers=4, streamed=(0, 1, 2, 3), embedding=True, head=True):
    return Plan(
        layers=tuple(LayerPlan(streamed=i in streamed) for i in range(layers)),
        tokens=0,
        longest=0,
        embedding_on_host=embedding,
        head_on_host=head,
    )


def make(kind="llama", dtype=torch.float32):
    torch.manual_seed(5)
    config, extra = KINDS[kind]
    model = AutoModelForCausalLM.from_config(config(**SIZES, **extra), dtype=dtype).eval()
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=[16, 4])
def checkpoint(request, tmp_path_factory, tiny_tokenizer):
    """(folder of a model of four layers, bits)."""
    folder = tmp_path_factory.mktemp("homes")
    make("qwen2").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder, request.param


def loaded(checkpoint, **options):
    folder, bits = checkpoint
    options = {"max_seq_len": 64, "wire": False, "device": "cpu", "bits": bits, **options}
    return load(folder, **options)[0]


def tokens():
    return torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(1))


def is_away(module):
    return hasattr(module, "_hotloop_home") and "weight" in module._parameters


def generated(model):
    ids = tokens()
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streamed", [(), (0, 1, 2, 3), (1, 3), (2,)])
def test_logits_and_generated_text_are_those_of_the_resident_model(kind, streamed):
    model = make(kind)
    logits, text, before = model(tokens()).logits, generated(model), state(model)
    homes = settle(model, make_plan(streamed=streamed))
    assert torch.equal(model(tokens()).logits, logits)
    assert torch.equal(generated(model), text)
    assert_same(state(model), before)
    on_host = {m._parameters["weight"].data_ptr() for m in model.modules() if is_away(m)}
    projections = 4 if kind == "phi3" else 7
    assert len(on_host) == projections * len(streamed) + (1 if kind == "gemma3" else 2)
    homes.undo()
    assert_same(state(model), before)
    assert torch.equal(model(tokens()).logits, logits)
    assert not on_host & {p.data_ptr() for p in model.parameters()}  # the host's memory is free


def test_four_bit_layers_compute_and_save_what_resident_ones_do(checkpoint, tmp_path):
    resident = loaded(checkpoint)
    settled = loaded(checkpoint, plan=make_plan())
    assert load_report(settled).on_host == str(homes_of(settled))
    assert torch.equal(settled(tokens()).logits, resident(tokens()).logits)
    assert torch.equal(generated(settled), generated(resident))
    assert_same(state(settled), state(resident))
    for name, model in (("a", settled), ("b", resident)):
        export(model, None, tmp_path / name, format="safetensors")
    for file in (tmp_path / "b").glob("*.safetensors"):
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
    homes_of(settled).undo()
    assert homes_of(settled) is None
    assert_same(state(settled), state(resident))
    assert torch.equal(settled(tokens()).logits, resident(tokens()).logits)
    for (_, a), (_, b) in zip(settled.named_modules(), resident.named_modules(), strict=True):
        assert type(a) is type(b)


def test_settling_a_loaded_model_is_what_loading_with_the_plan_does(checkpoint):
    after = loaded(checkpoint)
    settle(after, make_plan(streamed=(0, 2)))
    during = loaded(checkpoint, plan=make_plan(streamed=(0, 2)))
    for (path, a), (_, b) in zip(after.named_modules(), during.named_modules(), strict=True):
        assert type(a) is type(b), path
    assert_same(state(after), state(during))


@pytest.mark.parametrize("adapters_first", [False, True])
def test_gradients_through_the_models_own_forward_are_bitwise_the_resident_ones(
    checkpoint, adapters_first
):
    found = []
    for away in (False, True):
        model = loaded(checkpoint)
        if away and not adapters_first:
            settle(model, make_plan())
        adapted = add_lora(model, r=4)
        if away and adapters_first:
            settle(adapted, make_plan())
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(7))
        ids = tokens()
        adapted.train()(ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert len(found[0]) == 56
    assert_same(*found)


def test_trainer_moves_and_trains_a_settled_model_as_a_resident_one(checkpoint, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    found = []
    for away in (False, True):
        model = loaded(checkpoint, plan=make_plan() if away else None)
        adapted = add_lora(model, r=4)
        trainer = Trainer(
            model=adapted,
            args=TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=2,
                learning_rate=1e-2,
                per_device_train_batch_size=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
        )
        trainer.train()
        found.append({n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad})
    assert_same(*found)


def test_a_trained_bias_of_a_streamed_projection_gets_its_gradient():
    found = []
    for away in (False, True):
        model = make("qwen2")
        if away:
            settle(model, make_plan())
        bias = model.model.layers[1].self_attn.q_proj.bias.requires_grad_()
        ids = tokens()
        model(ids, labels=ids).loss.backward()
        found.append(bias.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_a_fetch_for_the_fast_path_brings_the_layers_true_weights_to_stable_addresses():
    model = make()
    truth = state(model)
    homes = settle(model, make_plan(streamed=(0, 1, 3)))
    addresses = {}
    for step in range(2):
        for here, following in [
            (0, 1),
            (1, 2),
            (2, 3),
            (3, None),
            (3, 2),
            (2, 1),
            (1, 0),
            (0, None),
        ]:
            homes.fetch(here, following)
            for name, module in model.model.layers[here].named_modules():
                if name.endswith("_proj"):
                    key = f"model.layers.{here}.{name}.weight"
                    assert torch.equal(module.weight, truth[key]), (step, key)
                    address = (id(module.weight), module.weight.data_ptr())
                    assert addresses.setdefault(key, address) == address
    assert len(addresses) == 28


def test_layers_that_share_a_slot_do_not_disturb_each_other():
    model = make()
    truth = state(model)
    settle(model, make_plan())
    first, third = (model.model.layers[i].mlp.up_proj for i in (0, 2))
    a = first.weight
    assert a.data_ptr() == third.weight.data_ptr()  # and now it holds the third layer's
    assert torch.equal(a, truth["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(first.weight, truth["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(device_weight(third), truth["model.layers.2.mlp.up_proj.weight"])


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.half(), lambda m: m.float()])
def test_moving_and_casting_the_model_leaves_weights_on_the_host_as_they_are(move):
    model = make()
    settle(model, make_plan())
    own = {id(m): m._parameters["weight"] for m in model.modules() if "weight" in m._parameters}
    order = list(model.state_dict())
    move(model)
    kept = [m for m in model.modules() if is_away(m)]
    assert len(kept) == 30
    for module in kept:
        assert module._parameters["weight"] is own[id(module)]
        assert module._parameters["weight"].dtype == torch.float32
    assert list(model.state_dict()) == order


def test_the_device_is_where_the_model_computes(monkeypatch):
    model = make()
    homes = settle(model, make_plan())
    monkeypatch.setattr(homes, "device", torch.device("meta"))
    assert model.device == torch.device("meta")
    assert next(model.parameters()).device == torch.device("cpu")


def test_only_the_distinct_rows_of_a_batch_travel(monkeypatch):
    from hotloop.homes.ends import EmbeddingHome

    model = make("gemma3")
    expected = model.model.embed_tokens(torch.tensor([[7, 7, 2], [9, 7, 9]]))
    settle(model, make_plan())
    seen, rows = [], EmbeddingHome.rows

    def watched(self, weight, ids):
        found = rows(self, weight, ids)
        seen.append(found[0].shape)
        return found

    monkeypatch.setattr(EmbeddingHome, "rows", watched)
    embedding = model.model.embed_tokens
    assert torch.equal(embedding(torch.tensor([[7, 7, 2], [9, 7, 9]])), expected)
    assert seen == [(3, 64)]
    assert embedding.padding_idx == 2 and embedding.weight.shape == (304, 64)


def test_tied_weights_have_one_home():
    model = make("gemma3")
    settle(model, make_plan())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert parameters["lm_head.weight"] is parameters["model.embed_tokens.weight"]
    model.tie_weights()
    assert model.lm_head._parameters["weight"] is parameters["model.embed_tokens.weight"]
    homes_of(model).undo()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_heads_copy_on_the_device_lives_as_long_as_it_is_held():
    model = make()
    truth = model.lm_head.weight.clone()
    homes = settle(model, make_plan())
    homes.start_head()
    held = model.lm_head.weight
    assert held is model.lm_head.weight and torch.equal(held, truth)
    homes.start_head()  # it is here
    assert held is model.lm_head.weight
    assert held.data_ptr() != model.lm_head._parameters["weight"].data_ptr()
    gone = weakref.ref(held)
    del held
    assert gone() is None
    assert torch.equal(model.lm_head.weight, truth)
    homes.start_head()
    homes.drop_head()
    assert torch.equal(model.lm_head.weight, truth)


@pytest.mark.parametrize("streamed", [(), (0, 1, 2, 3), (1, 2)])
def test_wired_training_is_bitwise_that_of_the_resident_model(checkpoint, streamed):
    found = []
    for away in (False, True):
        plan = make_plan(streamed=streamed if away else (), embedding=away, head=away)
        adapted = add_lora(loaded(checkpoint, plan=plan), r=4)
        wire(adapted, plan)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(7))
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        ids = tokens()
        for _ in range(2):
            optimizer.zero_grad()
            loss = adapted.train()(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            if (homes := homes_of(adapted)) is not None:
                homes.rest()
        found.append({n: p.detach() for n, p in trained.items()} | {"loss": loss.detach()})
        logits = adapted.eval()(ids).logits
        found[-1]["logits"] = logits.detach()
    assert_same(*found)


def test_a_model_that_adapters_were_put_on_holds_no_layer_on_the_device_yet(checkpoint):
    plan = make_plan(streamed=(0, 1, 2, 3))
    homes = homes_of(add_lora(loaded(checkpoint, plan=plan), r=4))
    assert homes._stream().statistics().device_bytes == 0
    homes.fetch(1)
    assert homes._stream().statistics().device_bytes > 0


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_merging_an_adapter_into_a_streamed_weight_is_refused_and_changes_nothing(checkpoint):
    model = loaded(checkpoint)
    before = state(model)
    settle(model, make_plan())
    adapted = add_lora(model, r=4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    expected = adapted(tokens()).logits
    with pytest.raises(UnsupportedError, match=r"homes_of\(model\)\.undo"):
        adapted.merge_adapter()
    for layer in adapted.modules():
        if hasattr(layer, "merged_adapters"):
            layer.merged_adapters.clear()
    assert torch.equal(adapted(tokens()).logits, expected)
    homes_of(adapted).undo()
    for name, tensor in adapted.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in before:
            assert torch.equal(tensor, before[plain]), name


def test_a_copy_and_a_pickle_are_plain_models_with_the_true_weights(checkpoint):
    model = loaded(checkpoint, plan=make_plan())
    expected, before = model(tokens()).logits, state(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert homes_of(made) is None
        assert not any("_hotloop_home" in m.__dict__ for m in made.modules())
        assert_same(state(made), before)
        assert torch.equal(made(tokens()).logits, expected)


def test_the_sizes_of_what_is_on_the_host_are_told():
    model = make()
    homes = settle(model, make_plan())
    assert str(homes) == "on the host: layers 0.6 MiB, model.embed_tokens 0.1 MiB, lm_head 0.1 MiB"
