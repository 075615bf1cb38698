"""Trainers of others, unchanged, on a wired model: the losses are those of the same run unwired."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from datasets import Dataset
from hotloop.training.batches import PackedDataset, PackedStream, collate_weighted
from hotloop.training.batches import collate as lay_end_to_end
from hotloop.training.trainer import PackedTrainer
from hotloop.wiring import receipt_of, wire
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 4
TOLERANCE = 1e-4


def tiny(vocab=304):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def rows(count=24):
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(5, 30, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_list([{"input_ids": i, "labels": i} for i in ids])


def collate(features):
    """Pads on the right, as a user's own collator would."""
    longest = max(len(f["input_ids"]) for f in features)
    filled = {"input_ids": 2, "labels": -100, "attention_mask": 0}
    batch = {name: [] for name in filled}
    for f in features:
        f = {**f, "attention_mask": [1] * len(f["input_ids"])}
        for name, fill in filled.items():
            batch[name].append(f[name] + [fill] * (longest - len(f[name])))
    return {name: torch.tensor(values) for name, values in batch.items()}


def options(directory, **changes):
    return {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 11,
        **changes,
    }


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_training(make, count=STEPS):
    """make(model) -> trainer; trains an unwired and a wired model and compares every logged loss and weight."""
    plain, wired = tiny(), tiny()
    receipt = wire(wired)
    trainers = [make(plain), make(wired)]
    for trainer in trainers:
        torch.manual_seed(5)  # noise and sampling are the same too
        trainer.train()
    expected, found = map(losses, trainers)
    assert len(expected) == count
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    for (name, p), q in zip(plain.named_parameters(), wired.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=5e-3, msg=name)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = wired(input_ids=ids).logits + 0
        receipt.undo()
        assert receipt_of(wired) is None
        torch.testing.assert_close(wired(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    return trainers


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5},
        {"gradient_checkpointing": True},
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow
        ),
        {"optim": "adamw_8bit", "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"optim": "adafactor"},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_trainer_gives_the_losses_of_the_unwired_model(tmp_path, changes):
    def make(model):
        args = TrainingArguments(**options(tmp_path, **changes))
        return Trainer(model, args, train_dataset=rows(), data_collator=collate)

    assert_same_training(make)


def test_trainer_evaluates_with_and_without_metrics(tmp_path):
    def accuracy(prediction):
        guess, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
        return {"accuracy": float((guess == labels)[labels != -100].mean())}

    def make(metrics):
        def trainer(model):
            args = TrainingArguments(**options(tmp_path, eval_strategy="steps", eval_steps=2))
            data = {"train_dataset": rows(), "eval_dataset": rows(8), "data_collator": collate}
            return Trainer(model, args, **data, compute_metrics=metrics)

        return trainer

    for metrics in (None, accuracy):
        plain, wired = assert_same_training(make(metrics))
        found, expected = (
            [
                {k: v for k, v in e.items() if k in ("eval_loss", "eval_accuracy")}
                for e in t.state.log_history
                if "eval_loss" in e
            ]
            for t in (wired, plain)
        )
        assert len(expected) == 2 and ("eval_accuracy" in expected[0]) == (metrics is not None)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_trainer_resumes_as_if_it_had_not_stopped(tmp_path):
    def run(steps, resume=None):
        model = tiny()
        wire(model)
        changes = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        args = TrainingArguments(**options(tmp_path, **changes), lr_scheduler_type="constant")
        trainer = Trainer(model, args, train_dataset=rows(), data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)
        return model, losses(trainer)

    whole, expected = run(STEPS)
    _, first = run(2)
    resumed, found = run(STEPS, resume=str(tmp_path / "checkpoint-2"))
    assert (
        first == expected[:2] and found == expected
    )  # the log of a resumed run holds the first part too
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


class Head:
    """Counts what the wired root's own head computed."""

    def __init__(self, monkeypatch):
        from hotloop.wiring import root

        self.calls = 0
        original = root.linear_log_probs

        def counted(*args, **kwargs):
            self.calls += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(root, "linear_log_probs", counted)


def conversations():
    texts = ["the fox jumps", "a lazy dog sleeps all day", "over the quick brown fox", "why"]
    return Dataset.from_list([{"prompt": t, "completion": f" {t[::-1]} fox"} for t in texts * 4])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"completion_only_loss": False},
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 64},
    ],
    ids=["completion only", "whole rows", "padding free", "packing"],
)
def test_sft_trainer_gets_the_wired_head_and_the_unwired_losses(
    tmp_path, monkeypatch, tiny_tokenizer, changes
):
    head = Head(monkeypatch)

    def make(model):
        args = SFTConfig(**options(tmp_path, **{"max_length": 64, **changes}), bf16=False)
        return SFTTrainer(
            model,
            args,
            train_dataset=conversations(),
            processing_class=copy.deepcopy(tiny_tokenizer),
        )

    if changes.get("packing") or changes.get("padding_free"):
        assert_rows_apart(make, head)
        return
    assert_same_training(make)
    assert head.calls == STEPS


def assert_rows_apart(make, head):
    """What `packing` and `padding_free` hand over keeps rows apart in the wired model, whatever the attention."""
    model = tiny()
    wire(model)
    trainer = make(model)
    inputs = next(iter(trainer.get_train_dataloader()))
    positions = inputs["position_ids"][0]
    starts = (positions == 0).nonzero().flatten().tolist()
    assert len(starts) > 1
    trainer.train()
    assert head.calls == STEPS and len(losses(trainer)) == STEPS
    plain = tiny()
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    total, count = 0.0, 0
    with torch.no_grad():
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            row, target = ids[None, start:stop], labels[None, start:stop]
            trained = int((target[:, 1:] != -100).sum())
            if trained:
                total += float(plain(input_ids=row, labels=target).loss) * trained
                count += trained
        fresh = tiny()
        wire(fresh)
        packed = {k: v for k, v in inputs.items() if k != "seq_idx"}
        found = float(fresh(**packed).loss)
    assert found == pytest.approx(total / count, rel=TOLERANCE)


def packed_rows(weights=None):
    """Six bins of rows, and the mean loss over their trained tokens, row by row, unwired."""
    examples = list(rows())
    plain, total, count = tiny(), 0.0, 0
    for number, row in enumerate(examples):
        ids = torch.tensor([row["input_ids"]])
        trained = ids.shape[1] - 1
        with torch.no_grad():
            mean = float(plain(input_ids=ids, labels=ids).loss)
        total += mean * trained * (1 if weights is None else weights[number % len(weights)])
        count += trained
        if weights is not None:
            row["weights"] = weights[number % len(weights)]
    return PackedDataset(examples, capacity=80), total / count


def one_step_an_epoch(directory, data):
    """One optimizer step over all bins, whatever their order: its loss is the mean over all tokens."""
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(data)}
    return options(directory, **changes, max_steps=1, remove_unused_columns=False)


@pytest.mark.parametrize("kind", [Trainer, PackedTrainer])
def test_trainer_takes_hotloops_bins(tmp_path, kind):
    data, expected = packed_rows()
    assert 1 < len(data) < 24 and data.packing.rows_per_bin > 2
    model = tiny()
    wire(model)
    args = TrainingArguments(**one_step_an_epoch(tmp_path, data))
    trainer = kind(model, args, train_dataset=data, data_collator=lay_end_to_end)
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected, rel=TOLERANCE)]


def test_trainer_takes_a_stream_of_bins(tmp_path):
    data, expected = packed_rows()
    stream = PackedStream(rows(), capacity=80, buffer=64)  # a buffer that holds all: the same bins
    model = tiny()
    wire(model)
    args = TrainingArguments(**one_step_an_epoch(tmp_path, data))
    trainer = Trainer(model, args, train_dataset=stream, data_collator=lay_end_to_end)
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected, rel=TOLERANCE)]


def test_a_stream_that_several_would_read_whole_is_refused():
    stream = PackedStream(rows(), capacity=80)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    with pytest.raises(Exception, match="2 processes or DataLoader workers"):
        next(iter(loader))


def test_packed_trainer_weighs_the_rows(tmp_path):
    data, expected = packed_rows(weights=[0.25, 1, 2])
    model = tiny()
    wire(model)
    args = TrainingArguments(**one_step_an_epoch(tmp_path, data))
    trainer = PackedTrainer(model, args, train_dataset=data, data_collator=collate_weighted)
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected, rel=TOLERANCE)]


def test_sft_trainer_takes_hotloops_bins(tmp_path, monkeypatch, tiny_tokenizer):
    head = Head(monkeypatch)
    data, expected = packed_rows()
    model = tiny()
    wire(model)
    args = SFTConfig(
        **one_step_an_epoch(tmp_path, data),
        bf16=False,
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    bins = data.to_datasets()
    assert bins.column_names == ["input_ids", "labels", "seq_lengths"]
    trainer = SFTTrainer(model, args, train_dataset=bins, processing_class=tiny_tokenizer)
    trainer.train()
    assert head.calls == len(data)
    assert losses(trainer) == [pytest.approx(expected, rel=TOLERANCE)]


METHODS = {
    "DPO": ("trl", {"max_length": 64}),
    "KTO": ("trl", {"max_length": 64, "per_device_train_batch_size": 4}),
    "ORPO": ("trl.experimental.orpo", {"max_length": 64}),
    "CPO": ("trl.experimental.cpo", {"max_length": 64, "loss_type": "simpo", "cpo_alpha": 0.0}),
    "GRPO": ("trl", {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}),
}


@pytest.mark.filterwarnings("ignore:.*trl.experimental")
@pytest.mark.parametrize("method", METHODS)
def test_trl_trainers_give_the_losses_of_the_unwired_model(tmp_path, tiny_tokenizer, method):
    module, changes = METHODS[method]
    trl = importlib.import_module(module)
    data = conversations().to_list()
    if method == "KTO":
        data = [{**row, "label": bool(i % 2)} for i, row in enumerate(data)]
    elif method != "GRPO":
        data = [{**row, "chosen": row.pop("completion"), "rejected": " dog dog"} for row in data]
    reward = {"reward_funcs": lambda completions, **_: [float(len(c) % 5) for c in completions]}

    def make(model):
        return getattr(trl, f"{method}Trainer")(
            model,
            args=getattr(trl, f"{method}Config")(**options(tmp_path, **changes), bf16=False),
            train_dataset=Dataset.from_list(data),
            processing_class=copy.deepcopy(tiny_tokenizer),
            **(reward if method == "GRPO" else {}),
        )

    assert_same_training(make)
