"""A fine-tuning script of the usual kind. Coming from elsewhere, the first import is all that
changes.

    python examples/dropin.py [MODEL] [--steps 20] [--output dropin-run]

MODEL is a folder, a hub id or a .gguf file. Runs on a GPU, and on a CPU with a small model.
"""

import argparse

from hotloop import FastLanguageModel, is_bfloat16_supported  # isort: skip - the one line that changes

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="dropin-run")
arguments = parser.parse_args()

max_seq_length = 128

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=arguments.model,
    max_seq_length=max_seq_length,
    dtype=None,
    load_in_4bit=True,
)

model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)

prompt = "### Question:\n{}\n\n### Answer:\n{}"
rows = [
    ("What does the planner do?", "It finds the fastest plan that fits the memory."),
    ("What is a family?", "A description of a decoder layer."),
    ("What does the engine replace?", "The layers of one model instance, and it can undo that."),
    ("What does verify show?", "That no gradient is further from the truth than PyTorch's."),
]
dataset = Dataset.from_list(
    [{"text": prompt.format(question, answer) + tokenizer.eos_token} for question, answer in rows]
)

trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(
        max_length=max_seq_length,
        dataset_text_field="text",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_steps=2,
        max_steps=arguments.steps,
        learning_rate=1e-3,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir=arguments.output,
        report_to="none",
    ),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

FastLanguageModel.for_inference(model)
inputs = tokenizer([prompt.format(rows[0][0], "")], return_tensors="pt").to(model.device)
outputs = model.generate(**inputs, max_new_tokens=16, use_cache=True)
print(tokenizer.batch_decode(outputs)[0])

model.save_pretrained(f"{arguments.output}/lora")
tokenizer.save_pretrained(f"{arguments.output}/lora")
model.save_pretrained_merged(f"{arguments.output}/merged", tokenizer, save_method="merged_16bit")
