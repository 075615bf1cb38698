from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hotloop.wiring import receipt_of, wire
from hotloop_core import Plan
from hotloop_core.plan import KEEP_ALL, RECOMPUTE_ALL
from hotloop_testkit.numerics import assert_no_worse_than
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
CASES = {
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2 with windows from the second layer": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3 with biases": (Qwen3Config, {"head_dim": 16, "attention_bias": True}),
}
LENGTHS = [5, 1, 11]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
every_case = pytest.mark.parametrize("case", CASES)


def tiny(case: str, lora: bool = False):
    """The model as its config class makes it, norms and biases away from where they start."""
    config, changes = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(**{**SIZES, **changes}), attn_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    if not lora:
        return model
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    return get_peft_model(model, adapter)


def ids(rows: int = 2):
    return torch.randint(1, 101, (rows, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))


def padded():
    mask = torch.ones(2, sum(LENGTHS), dtype=torch.long)
    mask[0, 11:], mask[1, :4] = 0, 0
    labels = ids().masked_fill(mask == 0, -100)
    labels[1, 4] = -100  # in eager the padding before it predicts it; here padding predicts nothing
    return {"input_ids": ids(), "labels": labels, "attention_mask": mask}


def loss_and_gradients(model, *batches):
    """Of the sum of the batches' losses, each a mean over its targets, times their number."""
    model.zero_grad(set_to_none=True)
    loss = sum((b["labels"][:, 1:] != -100).sum() * model(**b).loss for b in batches)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def wired(model, layer=KEEP_ALL):
    layers = (layer,) * model.config.num_hidden_layers
    return wire(model, Plan(layers=layers, tokens=34, longest=17))


@every_case
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_loss_and_every_gradient_are_those_of_eager(case, lora):
    model = tiny(case, lora)
    batches = {"dense": {"input_ids": ids(), "labels": ids()}, "padded": padded()}
    expected = {name: loss_and_gradients(model, batch) for name, batch in batches.items()}
    for layer in (KEEP_ALL, RECOMPUTE_ALL):
        receipt = wired(model, layer)
        assert not receipt.left_alone
        for name, batch in batches.items():
            found = loss_and_gradients(model, batch)
            assert_no_worse_than(found, expected[name], expected[name], floor=2e-5)
        receipt.undo()


@every_case
def test_packed_rows_are_the_rows_apart(case):
    model = tiny(case, lora=True)
    rows = [{"input_ids": r, "labels": r} for r in ids(1).split(LENGTHS, 1) if r.shape[1] > 1]
    expected = loss_and_gradients(model, *rows)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    labels = ids(1).masked_fill(positions == 0, -100)
    wired(model)
    found = loss_and_gradients(
        model, {"input_ids": ids(1), "labels": labels, "position_ids": positions}
    )
    assert_no_worse_than(found, expected, expected, floor=2e-5)


@every_case
def test_generation_is_unchanged_and_undo_restores_every_bit(case):
    model = tiny(case)
    batch = {"input_ids": ids(), "labels": ids()}
    before, classes = loss_and_gradients(model, batch), [type(m) for m in model.modules()]
    mask = torch.ones_like(ids())
    mask[1, :4] = 0

    def text():
        return model.generate(
            input_ids=ids(), attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
        )

    expected = text()
    receipt = wired(model)
    assert torch.equal(text(), expected)
    receipt.undo()
    after = loss_and_gradients(model, batch)
    assert [type(m) for m in model.modules()] == classes and receipt_of(model) is None
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_importing_the_plugin_loads_neither_torch_nor_transformers_nor_triton():
    heavy = "{'torch', 'transformers', 'triton', 'numpy'}"
    code = f"import sys, hotloop_qwen; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
