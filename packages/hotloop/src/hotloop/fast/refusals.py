"""Arguments that scripts of this kind pass and Hotloop does not have: refused by name, or passed
over where they are off.

Each entry: name -> (the values that ask for nothing, why any other is refused and what to do
instead).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from hotloop_core.errors import ConfigError, HotloopError, UnsupportedError

Refusals = Mapping[str, tuple[tuple[Any, ...], str]]


class UnknownArgumentError(ConfigError, TypeError):
    """An argument that no function of this name has."""


class NotHereError(HotloopError, ImportError):
    """A name that scripts of this kind import and Hotloop does not have."""


_ELSEWHERE = {
    "FastVisionModel": "only text models are trained; use FastLanguageModel",
    "FastTextModel": "use FastLanguageModel",
    "FastSentenceTransformer": "only causal language models are trained",
    "PatchDPOTrainer": "nothing needs patching: leave the line out, DPOTrainer takes the model as it is",
    "PatchKTOTrainer": "nothing needs patching: leave the line out, KTOTrainer takes the model as it is",
    "PatchFastRL": "nothing needs patching: leave the line out, TRL's trainers take the model as it is",
    "UnslothTrainer": "from hotloop.fast import HotloopTrainer",
    "UnslothTrainingArguments": "from hotloop.fast import HotloopTrainingArguments",
    "UnslothVisionDataCollator": "only text models are trained",
    "unsloth_train": "call trainer.train(): gradient accumulation counts tokens as it should",
    "AutoLigerKernelForCausalLM": "load with transformers, then hotloop.wire(model); or hotloop.load",
    "apply_liger_kernel_to_llama": "hotloop.wire(model), after loading: one model is changed, and can be changed back",
    "is_bf16_supported": "from hotloop import is_bfloat16_supported",
    "to_sharegpt": "write the rows as conversations of role and content, with dataset.map",
    "apply_chat_template": "use tokenizer.apply_chat_template in dataset.map",
    "add_new_tokens": (
        "tokenizer.add_tokens and model.resize_token_embeddings before hotloop.wire, then train embed_tokens and "
        "lm_head (modules_to_save)"
    ),
    "create_ollama_modelfile": "save_pretrained_gguf writes a Modelfile beside the file",
    "save_to_gguf": "model.save_pretrained_gguf, or hotloop.export",
}
"""Name -> what to do instead."""


def refuse_name(name: str) -> None:
    """Says what to do instead of importing `name`; returns where that is not known.

    Raises:
        NotHereError: it is known.

    """
    if name in _ELSEWHERE:
        raise NotHereError(f"Hotloop has no {name}: {_ELSEWHERE[name]}.")


FROM_PRETRAINED: Refusals = {
    "load_in_8bit": (
        (False, None),
        "8-bit bases are not trained; use load_in_4bit or load_in_16bit",
    ),
    "load_in_fp8": ((False, None), "fp8 bases are not trained; use load_in_4bit or load_in_16bit"),
    "fast_inference": (
        (False, None),
        "there is no vLLM inside; export the model and serve it with vLLM",
    ),
    "gpu_memory_utilization": (
        (None, 0.5),
        "it belongs to fast_inference; cap memory with vram='20GiB'",
    ),
    "float8_kv_cache": ((False, None), "it belongs to fast_inference, which Hotloop does not have"),
    "max_lora_rank": ((None, 16, 64), "it belongs to fast_inference; get_peft_model takes r"),
    "disable_log_stats": (
        (True, None),
        "it belongs to fast_inference, which Hotloop does not have",
    ),
    "fix_tokenizer": (
        (True,),
        "a tokenizer that disagrees with its embedding is an error; repair it and save it",
    ),
    "resize_model_vocab": (
        (None,),
        "use model.resize_token_embeddings, save the model and load that",
    ),
    "use_exact_model_name": ((True, False, None), ""),
    "offload_embedding": (
        (False, None),
        "the plan decides what lives on the host: pass vram=, or hotloop.load(..., plan=...)",
    ),
    "random_state": ((None, 3407), "loading is not random; get_peft_model takes random_state"),
    "return_logits": (
        (False, None),
        "logits come from the model whenever it is called without labels",
    ),
    "qat_scheme": ((None,), "quantisation-aware training is not built"),
    "text_only": ((None, True), "only text models are trained"),
    "auto_model": ((None,), "models are loaded as causal language models"),
    "tokenizer_name": (
        (None,),
        "the tokenizer is the model's own; pass another one to your trainer",
    ),
}

GET_PEFT_MODEL: Refusals = {
    "task_type": (("CAUSAL_LM", None), "only causal language models are trained"),
    "use_dora": (
        (False, None),
        "the engine has no DoRA; use LoRA, or use_rslora=True for high ranks",
    ),
    "loftq_config": (({}, None), "the engine has no LoftQ initialisation; A is random and B zero"),
    "init_lora_weights": (
        (True, None),
        "other initialisations are not offered; A is random and B zero",
    ),
    "layers_to_transform": (
        (None,),
        "name layers in target_modules, as a regular expression over module paths",
    ),
    "layers_pattern": (
        (None,),
        "name layers in target_modules, as a regular expression over module paths",
    ),
    "target_parameters": ((None,), "adapters go on linear layers; name them in target_modules"),
    "temporary_location": (
        (None, "_unsloth_temporary_saved_buffers"),
        "nothing is written while adapters are made",
    ),
    "qat_scheme": ((None,), "quantisation-aware training is not built"),
    "ensure_weight_tying": (
        (False, None),
        "tied weights that train apart are refused when the model is wired",
    ),
    "finetune_vision_layers": ((False, None), "only text models are trained"),
    "finetune_language_layers": ((True, None), "there would be nothing left to train"),
    "finetune_attention_modules": ((True, None), "name the projections in target_modules"),
    "finetune_mlp_modules": ((True, None), "name the projections in target_modules"),
}

_NO_BUFFERS = "tensors are merged and written one by one; nothing is buffered"
SAVE: Refusals = {
    "maximum_memory_usage": ((None, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9), _NO_BUFFERS),
    "temporary_location": ((None, "_unsloth_temporary_saved_buffers"), _NO_BUFFERS),
    "safe_serialization": ((True, None), "only safetensors are written: pickles run code"),
    "push_to_hub": ((False, None), "use push_to_hub_merged or push_to_hub_gguf"),
    "token": ((None, ""), "it belongs to push_to_hub_merged and push_to_hub_gguf"),
    "first_conversion": (
        (None, "f16", "bf16", "f32"),
        "weights go straight from the model to the quantisation that was asked for",
    ),
}

PUSH: Refusals = {
    **{name: SAVE[name] for name in SAVE if name not in ("push_to_hub", "token")},
    "use_temp_dir": ((None, True, False), ""),
    "create_pr": (
        (False, None),
        "files are committed to the main branch; open the request on the hub",
    ),
    "revision": ((None, "main"), "files are committed to the main branch"),
    "commit_description": ((None,), "use commit_message"),
    "tags": ((None, []), "put them into the model card"),
}

METHODS = {
    "fast_generate": "there is no vLLM inside; use model.generate, or export the model and serve it with vLLM",
    "save_lora": "model.save_pretrained(directory) saves the adapter",
    "load_lora": "hotloop.load(directory of the adapter), or model.load_adapter(directory, name)",
    "save_pretrained_ggml": "use save_pretrained_gguf: llama.cpp reads no GGML files any more",
    "push_to_hub_ggml": "use push_to_hub_gguf: llama.cpp reads no GGML files any more",
    "save_pretrained_torchao": "torchao's formats are not written; use save_pretrained_merged or save_pretrained_gguf",
}
"""Methods that such scripts call on a model -> what to do instead."""


def refuse(
    function: str, arguments: Mapping[str, Any], accepted: Collection[str], refusals: Refusals
) -> None:
    """Passes over what is off; refuses the rest by name, all at once.

    Raises:
        UnknownArgumentError: names that nobody knows, each with the nearest one.
        UnsupportedError: what Hotloop does not have, each with what to do instead.

    """
    unknown: list[str] = []
    absent: list[str] = []
    for name, value in arguments.items():
        if name not in refusals:
            near = difflib.get_close_matches(name, sorted({*accepted, *refusals}), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            unknown.append(f"{function} has no argument {name!r}.{hint}")
            continue
        off, why = refusals[name]
        if not any(type(value) is type(quiet) and value == quiet for quiet in off):
            absent.append(f"{function}({name}={value!r}): {why}")
    if unknown:
        takes = f"It takes {', '.join(sorted(accepted))}."
        raise UnknownArgumentError("\n".join([*unknown, *absent, takes]))
    if absent:
        raise UnsupportedError("\n".join(absent))
