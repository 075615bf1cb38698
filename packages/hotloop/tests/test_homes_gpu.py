"""Weights on the host of a real card: bits, memory, no waiting on the host, the way back."""

from __future__ import annotations

import gc

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hotloop.homes import homes_of, settle
from hotloop.loading.quantize import nf4_config
from hotloop_core import LayerPlan, Plan
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

pytestmark = pytest.mark.gpu

LAYERS = 5
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "pad_token_id": 2,
}
PLAN = Plan(
    layers=(LayerPlan(streamed=True),) * LAYERS,
    tokens=0,
    longest=0,
    embedding_on_host=True,
    head_on_host=True,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for config in (LlamaConfig, Gemma3TextConfig):
        torch.manual_seed(4)
        folder = tmp_path_factory.mktemp("homes") / config.model_type
        AutoModelForCausalLM.from_config(config(**SIZES), dtype=torch.bfloat16).save_pretrained(
            folder
        )
        made[config.model_type] = folder
    return made


@pytest.fixture(params=[("llama", 4), ("llama", 16), ("gemma3_text", 4)], ids=str)
def model(request, folders):
    name, bits = request.param
    options = {"quantization_config": nf4_config(torch.bfloat16)} if bits == 4 else {}
    made = AutoModelForCausalLM.from_pretrained(
        folders[name],
        dtype=torch.bfloat16,
        device_map={"": 0},
        attn_implementation="eager",  # the others add gradients in any order
        **options,
    )
    return made.requires_grad_(False).eval()


def tokens():
    return torch.randint(3, 4000, (2, 37), generator=torch.Generator().manual_seed(1)).cuda()


def test_logits_text_and_gradients_are_bitwise_those_of_the_resident_model(model):
    ids = tokens()

    def run():
        with torch.no_grad():
            logits = model(ids).logits
            text = model.generate(ids, max_new_tokens=8, do_sample=False)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=ids).loss.backward()
        return logits, text, embeds.grad

    expected = run()
    homes = settle(model, PLAN)
    for _ in range(2):
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b)
    assert model.device.type == "cuda"
    homes.undo()
    for a, b in zip(run(), expected, strict=True):
        assert torch.equal(a, b)


def test_the_cards_memory_is_free_while_weights_are_on_the_host_and_full_again_after_undo(model):
    gc.collect()
    before = torch.cuda.memory_allocated()
    homes = settle(model, PLAN)
    gc.collect()
    settled = torch.cuda.memory_allocated()
    embedding = 4096 * 512 * 2
    assert before - settled > embedding
    homes.fetch(0, 1)
    layer = homes._store.statistics().host_bytes // LAYERS
    assert torch.cuda.memory_allocated() - settled <= 2 * layer + 2**20
    homes.undo()
    del homes
    gc.collect()
    assert abs(torch.cuda.memory_allocated() - before) < 2**20


def test_moving_the_model_to_the_card_leaves_weights_on_the_host(model):
    settle(model, PLAN)
    away = {n for n, p in model.named_parameters() if p.device.type == "cpu"}
    model.to("cuda")
    assert {n for n, p in model.named_parameters() if p.device.type == "cpu"} == away
    assert all(dict(model.named_parameters())[n].is_pinned() for n in away)
    assert len(away) >= 7 * LAYERS + 1


def test_fetching_layers_and_the_head_never_makes_the_host_wait(model):
    homes = settle(model, PLAN)
    for layer in model.model.layers:  # the first look at a 4-bit weight brings its tables, 1 KB
        _ = layer.mlp.up_proj.weight
    homes.fetch(0, 1)
    _ = model.lm_head.weight
    torch.cuda.synchronize()
    found = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in (*range(LAYERS), *reversed(range(LAYERS))):
            homes.fetch(layer, layer + 1 if layer + 1 < LAYERS else layer - 1)
            assert model.model.layers[layer].mlp.up_proj.weight.is_cuda
        homes.start_head()
        assert model.lm_head.weight.is_cuda
    finally:
        torch.cuda.set_sync_debug_mode(found)


def test_the_heads_copy_is_given_back_when_it_is_dropped(model):
    settle(model, PLAN)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    held = model.lm_head.weight
    assert torch.cuda.memory_allocated() - before >= held.nbytes
    del held
    assert torch.cuda.memory_allocated() == before


def test_weights_of_every_layer_are_the_truth_in_both_directions_under_load(model):
    homes = settle(model, PLAN)
    truth = {n: t.cuda() for n, t in model.state_dict().items()}
    busy = torch.randn(2048, 2048, device="cuda")
    for layer in (*range(LAYERS), *reversed(range(LAYERS))):
        following = layer + 1 if layer + 1 < LAYERS else layer - 1
        homes.fetch(layer, following)
        for _ in range(4):
            busy = (busy @ busy).clamp(-1, 1)
        for name, module in model.model.layers[layer].named_modules():
            if isinstance(module, torch.nn.Linear):
                key = f"model.layers.{layer}.{name}.weight"
                assert torch.equal(module.weight, truth[key]), key
                if isinstance(module, Linear4bit):
                    assert torch.equal(module.weight.quant_state.absmax, truth[f"{key}.absmax"])
    assert homes_of(model) is homes
