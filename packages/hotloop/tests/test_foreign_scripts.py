"""What scripts do to a model around and during training: the same on a wired model as on an unwired one."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from hotloop.wiring import receipt_of, wire
from hotloop_testkit.tiny import build
from peft import LoraConfig, get_peft_model
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

IDS = torch.arange(3, 20)[None]


def tiny(adapters=True):
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=304,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = build(config)
    if not adapters:
        return model
    torch.manual_seed(4)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def trained(directory, model, *callbacks, kind=Trainer, **changes):
    ids = torch.randint(3, 300, (8, 20), generator=torch.Generator().manual_seed(7)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    settings = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "logging_steps": 1,
        "seed": 11,
    }
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    quiet |= {"dataloader_pin_memory": False, "save_strategy": "no"}
    args = TrainingArguments(str(directory), **{**settings, **quiet, **changes})
    trainer = kind(model, args, train_dataset=data, eval_dataset=data, callbacks=[*callbacks])
    trainer.train()
    return trainer


def assert_same(plain, wired):
    """The logged losses and every weight of two trainers."""
    losses = [
        [{k: v for k, v in entry.items() if k in ("loss", "eval_loss", "step")} for entry in log]
        for log in (wired.state.log_history, plain.state.log_history)
    ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    weights = dict(wired.model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(weights[name], parameter, rtol=0, atol=1e-5, msg=name)


class Curious(TrainerCallback):
    """Looks at the model in the middle of training and leaves it as it was."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **_):
        model.eval()
        with torch.no_grad():
            text = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False).tolist()
            model.merge_adapter()
            merged = float(model(input_ids=IDS).logits.square().sum())
            model.unmerge_adapter()
            with model.disable_adapter():
                base = float(model(input_ids=IDS, labels=IDS).loss)
            copied = float(copy.deepcopy(model)(input_ids=IDS, labels=IDS).loss)
        model.train()
        self.seen.append((text, merged, base, copied))


def test_a_trainer_stops_early_and_loads_the_best_while_a_callback_looks_at_the_model(tmp_path):
    looks, trainers = (Curious(), Curious()), []
    for number, look in enumerate(looks):
        model = tiny()
        if number:
            wire(model)
        every = {
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
        }
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        best |= {"greater_is_better": True, "learning_rate": 1.0}  # a falling loss is never better
        stop = EarlyStoppingCallback(early_stopping_patience=1)
        folder = tmp_path / str(number)
        trainers.append(trained(folder, model, look, stop, **every, **best, max_steps=9))
    assert_same(*trainers)
    assert [t.state.global_step for t in trainers] == [2, 2]
    assert [t.state.best_global_step for t in trainers] == [1, 1]
    torch.testing.assert_close(looks[1].seen, looks[0].seen, rtol=1e-4, atol=1e-4)


class OneLayerAtATime(TrainerCallback):
    """As LISA and BAdam do: which weights train changes from step to step."""

    def on_step_begin(self, args, state, control, model=None, **_):
        for number, layer in enumerate(model.model.layers):
            layer.requires_grad_(number == state.global_step % 2)


def test_layers_may_take_turns_in_training(tmp_path):
    plain, wired = tiny(adapters=False), tiny(adapters=False)
    wire(wired)
    callback = OneLayerAtATime()
    assert_same(trained(tmp_path, plain, callback), trained(tmp_path, wired, callback))


class OfLogitsAndHiddenStates(Trainer):
    """A distillation against the model without its adapter, and a penalty on hidden states."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, output_hidden_states=True)
        with torch.no_grad(), model.disable_adapter():
            teacher = model(input_ids=inputs["input_ids"]).logits.softmax(-1)
        distance = torch.nn.functional.kl_div(out.logits.log_softmax(-1), teacher)
        penalty = sum(hidden.square().mean() for hidden in out.hidden_states)
        loss = out.loss + distance + 0.01 * penalty
        return (loss, out) if return_outputs else loss


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
def test_a_loss_of_ones_own_sees_logits_hidden_states_and_the_base(tmp_path):
    plain, wired = tiny(), tiny()
    wire(wired)
    kind = OfLogitsAndHiddenStates
    assert_same(trained(tmp_path, plain, kind=kind), trained(tmp_path, wired, kind=kind))


def other_adapter(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    model.set_adapter("other")
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".other." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def merged(model):
    return model.merge_and_unload().requires_grad_(True)


def wider(model):
    torch.manual_seed(5)
    model.get_base_model().resize_token_embeddings(310)
    return model


@pytest.mark.parametrize("change", [other_adapter, merged, wider])
def test_a_model_may_be_changed_after_it_was_wired(tmp_path, change):
    plain, wired = tiny(), tiny()
    wire(wired)
    trainers = [trained(tmp_path, change(model)) for model in (plain, wired)]
    assert_same(*trainers)
    assert receipt_of(trainers[1].model) is not None
