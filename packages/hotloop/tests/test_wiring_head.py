"""The wired root around its head: what is on the head, batches without labels, and callers that compile."""

from __future__ import annotations

import copy

import pytest
import torch
from hotloop.wiring import wire
from hotloop_core.errors import DataError, WireError
from hotloop_testkit.tiny import gradients
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.arange(3, 33).view(2, 15)
BATCH = {"input_ids": IDS, "labels": IDS}


def tiny(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).train()


def adapted(model, **options):
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_an_adapter_below_the_rounding_of_a_16_bit_head_still_moves_the_loss():
    """Added to W before rounding, a young adapter would vanish beside it."""
    model = adapted(tiny(), target_modules=["lm_head"])
    head = model.get_base_model().lm_head
    torch.nn.init.ones_(head.weight)
    torch.nn.init.zeros_(head.lora_B["default"].weight)
    model = model.to(torch.bfloat16)
    wire(model)
    with torch.no_grad():
        before = model(**BATCH).loss
        head.lora_B["default"].weight[:32] = 2**-10
        delta = head.get_delta_weight("default")
        assert torch.equal(head.weight + delta, head.weight) and delta.any()
        after, logits = model(**BATCH).loss, model(input_ids=IDS).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten()
    )
    assert after != before
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=0)


def test_dropout_of_an_adapter_on_the_head_has_the_mean_of_peft():
    plain = adapted(tiny(), target_modules=["lm_head"], lora_dropout=0.5)
    wired = copy.deepcopy(plain)
    wire(wired)
    torch.manual_seed(1)
    losses = [torch.stack([m(**BATCH).loss for _ in range(200)]) for m in (plain, wired)]
    spread = losses[0].std() / 200**0.5
    assert losses[1].std() > 0
    assert abs(losses[1].mean() - losses[0].mean()) < 5 * spread


def test_hooks_on_the_head_are_refused_or_run_in_the_models_own_code():
    calls = []
    model = tiny()
    wire(model)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(
        WireError, match=r"the output head: lm_head: a hook .*allow_eager=\{'hooks'\}"
    ):
        model(**BATCH)
    model = tiny()
    plain = copy.deepcopy(model)
    wire(model, allow_eager={"hooks"})
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assert_same(gradients(model, BATCH), gradients(plain, BATCH))
    assert calls == [1]


def test_trained_tokens_of_a_tied_head_run_in_the_models_own_code_where_allowed():
    model = adapted(tiny(tied=True), target_modules=["q_proj"], trainable_token_indices=[4, 5])
    plain = copy.deepcopy(model)
    wire(model, allow_eager={"weight-kind"})
    assert_same(gradients(model, BATCH), gradients(plain, BATCH))


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_a_batch_without_a_label_has_no_loss_and_no_gradient_instead_of_nan(items):
    model = tiny()
    wire(model)
    batch = {"input_ids": IDS, "labels": torch.full_like(IDS, -100), "num_items_in_batch": items}
    found = gradients(model, batch)
    assert all(not value.any() for value in found.values())


def test_labels_of_another_length_are_refused():
    model = tiny()
    wire(model)
    with pytest.raises(DataError, match=r"labels of shape \(2, 7\) for a batch of \(2, 15\)"):
        model(input_ids=IDS, labels=IDS[:, :7])


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_grew_after_wiring_are_seen(tied):
    plain = tiny(tied)
    wired = copy.deepcopy(plain)
    wire(wired)
    for model in (plain, wired):
        torch.manual_seed(1)
        model.resize_token_embeddings(70)
    batch = {"input_ids": IDS + 35, "labels": IDS + 35}
    assert_same(gradients(wired, batch), gradients(plain, batch))
    logits = wired(**batch).logits
    assert logits.shape == (2, 15, 70) == (logits + 0).shape


def test_torch_compile_leaves_wired_modules_as_they_are():
    model = adapted(tiny(), target_modules="all-linear")
    expected = gradients(copy.deepcopy(model), BATCH)
    wire(model)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    found = gradients(compiled, BATCH)
    assert_same({n.replace("_orig_mod.", ""): g for n, g in found.items()}, expected)
    assert len(graphs) < 3  # of the wrapper around it, at most
