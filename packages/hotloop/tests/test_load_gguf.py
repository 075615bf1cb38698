import math

import pytest
import torch
from gguf import GGUFWriter
from hotloop.loading import load
from hotloop.loading.source import locate
from hotloop_core.errors import CheckpointError, ConfigError, UnsupportedError
from safetensors.torch import load_file
from tokenizers import AddedToken

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(weight, heads):
    """Rows from two halves (transformers) to pairs (llama.cpp)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(source, path, tokenizer, *, pre="gpt-2", change=None, rope_freqs=None, bos=False):
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(304)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary] + [f"[PAD{i}]" for i in range(len(vocabulary), 304)]
    import json

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(bos)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    tensors = load_file(source / "model.safetensors")
    if change is not None:
        change(tensors)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", torch.tensor(rope_freqs).numpy())
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            tensor = interleave(tensor, 4 if "q_proj" in name else 2)
        path_in_layer, part = name.rsplit(".", 1)
        layer = ""
        if name.startswith("model.layers."):
            index, path_in_layer = path_in_layer.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{index}."
        writer.add_tensor(f"{layer}{NAMES[path_in_layer]}.{part}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain(path, **options):
    return load(path, **{"bits": 16, "max_seq_len": 64, "wire": False, "device": "cpu", **options})


def test_a_gguf_is_the_model_and_the_tokenizer_that_it_was_written_from(
    tiny_llama, tiny_tokenizer, tmp_path
):
    file = write_gguf(tiny_llama, tmp_path / "tiny.gguf", tiny_tokenizer)
    model, tokenizer = plain(file)
    original, _ = plain(tiny_llama)
    ids = torch.arange(3, 60)[None]
    torch.testing.assert_close(model(ids).logits, original(ids).logits)
    for text in ("the quick brown fox", " 1234 dogs\n\n jump", "don't  é 漢字"):
        assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    )

    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, tokenizer_again = plain(tmp_path / "saved")
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert tokenizer_again("the 12").input_ids == tokenizer("the 12").input_ids


def test_a_gguf_in_four_bit_is_the_folder_in_four_bit(tiny_llama, tiny_tokenizer, tmp_path):
    write_gguf(tiny_llama, tmp_path / "tiny.gguf", tiny_tokenizer)
    model, tokenizer = plain(tmp_path, bits=4)  # a folder with one GGUF file
    original, _ = plain(tiny_llama, bits=4)
    for (name, a), (_, b) in zip(
        sorted(model.named_parameters()), sorted(original.named_parameters()), strict=True
    ):
        assert torch.equal(a, b), name
    ids = torch.arange(3, 60)[None]
    assert torch.equal(model(ids).logits, original(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(plain(tmp_path / "saved", bits=4)[0](ids).logits, model(ids).logits)


def test_the_pre_tokenizer_of_the_file_is_used(tiny_llama, tiny_tokenizer, tmp_path):
    pieces = {
        "gpt-2": ["It", "'s", "Ġ2024"],
        "smollm": ["It", "'s", "Ġ", "2", "0", "2", "4"],
        "llama-bpe": ["It", "'s", "Ġ", "202", "4"],
        "qwen2": ["It", "'s", "Ġ", "2", "0", "2", "4"],
    }
    for pre, expected in pieces.items():
        file = write_gguf(tiny_llama, tmp_path / f"{pre}.gguf", tiny_tokenizer, pre=pre)
        tokenizer = plain(file)[1]
        split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 2024")
        assert [piece for piece, _ in split] == expected, pre


def test_the_beginning_of_sequence_token_is_added_as_the_file_says(
    tiny_llama, tiny_tokenizer, tmp_path
):
    file = write_gguf(tiny_llama, tmp_path / "bos.gguf", tiny_tokenizer, bos=True)
    ids = plain(file)[1]("the fox").input_ids
    assert ids == [0, *tiny_tokenizer("the fox").input_ids]


def test_an_unknown_pre_tokenizer_is_refused(tiny_llama, tiny_tokenizer, tmp_path):
    file = write_gguf(tiny_llama, tmp_path / "odd.gguf", tiny_tokenizer, pre="martian")
    with pytest.raises(UnsupportedError, match="martian"):
        plain(file)


def test_llama3_rope_scaling_comes_back_from_its_divisors(tiny_llama, tiny_tokenizer, tmp_path):
    divisors = []
    for index in range(8):
        wavelength = 2 * math.pi * 10000.0 ** (index / 8)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / 8 + smooth))
    file = write_gguf(tiny_llama, tmp_path / "l3.gguf", tiny_tokenizer, rope_freqs=divisors)
    rope = plain(file)[0].config.rope_parameters
    assert rope["rope_type"] == "llama3"
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (8.0, 8192)
    file = write_gguf(
        tiny_llama, tmp_path / "no.gguf", tiny_tokenizer, rope_freqs=[1.0] * 7 + [3.0]
    )
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        plain(file)


def test_a_broken_gguf_is_refused_with_the_reason(tiny_llama, tiny_tokenizer, tmp_path):
    file = write_gguf(tiny_llama, tmp_path / "whole.gguf", tiny_tokenizer)
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        plain(short)
    with pytest.raises(ConfigError, match="2 GGUF files"):
        locate(tmp_path)

    def lose(tensors):
        tensors.pop("model.layers.1.mlp.up_proj.weight")

    lacking = write_gguf(tiny_llama, tmp_path / "lacking.gguf", tiny_tokenizer, change=lose)
    with pytest.raises(CheckpointError, match="up_proj"):
        plain(lacking)

    def poison(tensors):
        tensors["model.norm.weight"][0] = float("nan")

    poisoned = write_gguf(tiny_llama, tmp_path / "nan.gguf", tiny_tokenizer, change=poison)
    with pytest.raises(CheckpointError, match="NaN"):
        plain(poisoned)


def test_added_tokens_stay_whole(tiny_llama, tiny_tokenizer, tmp_path):
    file = write_gguf(tiny_llama, tmp_path / "tiny.gguf", tiny_tokenizer)
    tokenizer = plain(file)[1]
    assert tokenizer("</s>").input_ids == [1]
    assert isinstance(tokenizer.added_tokens_decoder[1], AddedToken)
