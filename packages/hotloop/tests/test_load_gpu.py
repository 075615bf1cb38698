"""Loading straight to the card: the same bits as transformers, within the memory that is promised."""

from __future__ import annotations

import gc

import pytest
import torch
from hotloop.homes import homes_of
from hotloop.loading import load, load_report, upload
from hotloop.loading.quantize import nf4_config
from hotloop_core import LayerPlan, Plan
from transformers import AutoModelForCausalLM, LlamaConfig

pytestmark = pytest.mark.gpu

LAYERS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_tokenizer):
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8192,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("gpu") / "llama"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="40MB"
    )
    tiny_tokenizer.save_pretrained(folder)
    return folder


def ours(folder, **options):
    options = {"max_seq_len": 64, "wire": False, "dtype": torch.bfloat16, **options}
    return load(folder, **options)[0]


def away():
    return Plan(
        layers=(LayerPlan(streamed=True),) * LAYERS,
        tokens=64,
        longest=64,
        embedding_on_host=True,
        head_on_host=True,
    )


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("chunk", [2**16 + 512, upload.CHUNK_BYTES])
def test_every_tensor_on_the_card_is_bitwise_what_transformers_loads(
    checkpoint, bits, chunk, monkeypatch
):
    monkeypatch.setattr(upload, "CHUNK_BYTES", chunk)
    options = {"quantization_config": nf4_config(torch.bfloat16)} if bits == 4 else {}
    expected = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map={"": 0}, **options
    ).state_dict()
    model = ours(checkpoint, bits=bits)
    assert load_report(model).reader == "hotloop"
    settled = ours(checkpoint, bits=bits, plan=away())
    for found in (model.state_dict(), settled.state_dict()):
        assert list(found) == list(expected)
        for name, tensor in found.items():
            assert torch.equal(tensor.cuda(), expected[name].cuda()), name


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("plan", [None, away()], ids=["resident", "away"])
def test_the_card_never_holds_more_than_the_weights_and_one_tensor(checkpoint, bits, plan):
    ours(checkpoint, bits=bits, plan=plan)  # libraries take their workspaces at first use
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = ours(checkpoint, bits=bits, plan=plan)
    peak = torch.cuda.max_memory_allocated() - before
    after = torch.cuda.memory_allocated() - before
    largest = 8192 * 1024 * 2 if plan is None else 3072 * 1024 * 2
    # The quantiser's statistics before they are quantised themselves: 4 bytes for 64 elements.
    room = int(1.1 * largest) + 2**20
    if plan is not None:
        layer = homes_of(model)._store.statistics().host_bytes // LAYERS
        room += 2 * layer
        assert after < 2**20, "what lives on the host is not on the card"
    assert peak <= after + room
