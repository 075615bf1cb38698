"""The suite that a family passes: what its plugin says is what transformers computes, no more and no less."""

# ruff: noqa: D102 - the name of a check is its claim

from __future__ import annotations

import copy
import io
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hotloop_core import LayerPlan, Placement, Plan, discover, facts_of, saved_tensors
from hotloop_core.errors import UnsupportedError
from hotloop_core.plan import KEEP_ALL, RECOMPUTE_ALL

from .conformance import NotInstalledError
from .description import DescriptionConformance
from .numerics import assert_no_worse_than, poisoned_buffers
from .tiny import assert_same_bits, batch, build, gradients, quantise_, tokenizer, with_lora

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotloop.verification import Report
    from hotloop.wiring import Receipt
    from hotloop_core import FamilySpec

    from .tiny import Model

SLACK = 0.3
"""How much larger than eager's an error may be. Models this small have few roundings, so chance weighs more."""
DRAWS = 5
"""Models and batches over which errors are averaged where those of the first are worse than eager's."""
SUM_ROUNDING = torch.finfo(torch.float32).eps
"""How far off w may be that a file holds as 1 + w in fp32, for |w| < 1."""
TILE = 16
FORMATS_READ_BACK = {"safetensors", "gguf"}
"""Formats with a check of their own, which loads what was written."""
CASES = [
    (kind, precision)
    for kind in ("dense", "padded", "packed")
    for precision in ("float32", "bfloat16")
] + [("dense", "float16")]


class FamilyConformance(DescriptionConformance, kit=True):
    """Checks one family against one tiny config: what it says of it, and what then runs.

    Subclass it once for each kind of config that the family has:

        class TestLlama(FamilyConformance):
            spec = LLAMA

            def tiny_config(self):
                return LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=320, ...)

    spec: as the installed plugin offers it. tiny_config: two layers or more (one of each kind), hidden size about 64,
    at least 300 tokens, a sliding window (if any) shorter than the 40 tokens of a row.
    """

    @pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
    @pytest.mark.parametrize("kind, precision", CASES)
    def test_loss_and_every_gradient_are_no_worse_than_eager(
        self, kind: str, precision: str, lora: bool
    ) -> None:
        def draw(number: int) -> tuple[Model, dict[str, torch.Tensor]]:
            model = self._model(lora=lora, seed=number)
            return model, batch(kind, model.config.vocab_size, seed=3 + number)

        report = _verified(draw, getattr(torch, precision))
        silent = [row.name for row in report.rows if row.eager == 0 and row.name != "loss"]
        assert not silent, f"nothing was compared for {silent}"

    @pytest.mark.parametrize("base", ["bfloat16", "nf4"])
    def test_on_a_frozen_base_in_16_or_4_bit_gradients_are_no_worse_than_eager(
        self, base: str
    ) -> None:
        def draw(number: int) -> tuple[Model, dict[str, torch.Tensor]]:
            model = build(self.tiny_config(), seed=number)
            model = quantise_(model, self.spec) if base == "nf4" else model.bfloat16()
            model = with_lora(model, self.spec, seed=1 + number)
            return model, batch("packed", model.config.vocab_size, seed=3 + number)

        _verified(draw, torch.bfloat16)

    @pytest.mark.parametrize("kind", ["dense", "padded"])
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_logits_are_no_worse_than_eager(self, kind: str, precision: str) -> None:
        from hotloop.verification import exact_attention

        model = self._model(lora=True).eval()
        inputs = batch(kind, model.config.vocab_size)
        del inputs["labels"]
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        exact = copy.deepcopy(model).double()
        exact.get_base_model().set_attn_implementation(exact_attention.register())

        def logits(of: Model) -> dict[str, torch.Tensor]:
            return {"logits": of(**inputs, use_cache=False).logits[real]}

        with torch.no_grad():
            truth = logits(exact)
            low = precision != "float32"
            with torch.autocast("cpu", getattr(torch, precision), enabled=low):
                eager = logits(model)
                self._wire(model)
                assert_no_worse_than(logits(model), eager, truth, slack=SLACK)

    def test_wiring_before_or_after_the_adapter_gives_the_same_bits(self) -> None:
        first, second = self._model(lora=True), self._model(lora=False)
        self._wire(first)
        self._wire(second)
        second = with_lora(second, self.spec)
        inputs = batch("dense", first.config.vocab_size)
        assert_same_bits(gradients(second, inputs), gradients(first, inputs))

    def test_undo_restores_every_bit(self) -> None:
        model = self._model(lora=True)
        inputs = batch("padded", model.config.vocab_size)
        before = gradients(model, inputs)
        classes: list[type] = [type(m) for m in model.modules()]
        self._wire(model).undo()
        assert [type(m) for m in model.modules()] == classes
        assert_same_bits(gradients(model, inputs), before)

    @pytest.mark.parametrize("kind", ["dense", "packed"])
    def test_keeping_and_recomputing_give_the_same_bits(self, kind: str) -> None:
        model = self._model(lora=True)
        inputs = batch(kind, model.config.vocab_size)
        receipt = self._wire(model, KEEP_ALL)
        kept = gradients(model, inputs)
        receipt.replan(_plan(model, RECOMPUTE_ALL))
        assert_same_bits(gradients(model, inputs), kept)

    @pytest.mark.parametrize("placement", [Placement.RECOMPUTE, Placement.OFFLOAD])
    def test_every_tensor_may_be_placed_by_itself_without_changing_a_bit(
        self, placement: Placement
    ) -> None:
        model = self._model(lora=True)
        inputs = batch("packed", model.config.vocab_size)
        receipt = self._wire(model)
        kept = gradients(model, inputs)
        for tensor in saved_tensors(facts_of(self.spec, model.config.to_dict())):
            if placement is Placement.OFFLOAD or tensor.can_recompute:
                layer = LayerPlan(placements={tensor.name: placement})
                receipt.replan(_plan(model, layer))
                assert_same_bits(gradients(model, inputs), kept)

    def test_4_bit_weights_that_stay_dequantised_change_no_bit(self) -> None:
        model = with_lora(quantise_(build(self.tiny_config(), seed=0), self.spec), self.spec)
        inputs = batch("packed", model.config.vocab_size)
        receipt = self._wire(model)
        for _ in range(2):  # the second time with other adapters over the same weights
            plain = gradients(model, inputs)
            receipt.replan(_plan(model, LayerPlan(dequantised=True)))
            for _ in range(2):
                assert_same_bits(gradients(model, inputs), plain)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(1.5)
            stepped = gradients(model, inputs)
            receipt.replan(_plan(model, KEEP_ALL))
            assert_same_bits(stepped, gradients(model, inputs))

    def test_tiles_change_nothing_but_the_rounding(self) -> None:
        model = self._model(lora=True)
        inputs = batch("packed", model.config.vocab_size)
        receipt = self._wire(model)
        whole = gradients(model, inputs)
        receipt.replan(replace(_plan(model, KEEP_ALL), tile=TILE))
        assert_no_worse_than(gradients(model, inputs), whole, whole, floor=1e-4)

    @pytest.mark.parametrize("layer", [KEEP_ALL, RECOMPUTE_ALL], ids=["keep", "recompute"])
    def test_uninitialised_memory_is_never_read(self, layer: LayerPlan) -> None:
        model = self._model(lora=True)
        inputs = batch("padded", model.config.vocab_size)
        self._wire(model, layer)
        plain = gradients(model, inputs)
        with poisoned_buffers():
            found = gradients(model, inputs)
        assert_same_bits(found, plain)

    def test_a_packed_row_does_not_see_its_neighbours(self) -> None:
        model = self._model(lora=True)
        self._wire(model)
        inputs = batch("packed", model.config.vocab_size)
        inputs["labels"][:, :34] = -100  # only the last row is trained
        before = gradients(model, inputs)
        inputs["input_ids"][:, :34] = inputs["input_ids"][:, :34].flip(1)
        assert_same_bits({"loss": gradients(model, inputs)["loss"]}, {"loss": before["loss"]})

    def test_two_models_live_side_by_side(self) -> None:
        wired, plain = self._model(lora=True), self._model(lora=True)
        inputs = batch("dense", plain.config.vocab_size)
        before = gradients(plain, inputs)
        self._wire(wired, RECOMPUTE_ALL)
        assert_same_bits(gradients(plain, inputs), before)
        assert_no_worse_than(gradients(wired, inputs), before, before, floor=1e-4)

    def test_generation_gives_the_same_text(self) -> None:
        model = self._model(lora=True).eval()
        inputs = batch("padded", model.config.vocab_size)
        ids, mask = inputs["input_ids"][1:], inputs["attention_mask"][1:]  # padded on the left
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(input_ids=ids, attention_mask=mask, **options)
        self._wire(model)
        found = model.generate(input_ids=ids, attention_mask=mask, **options)
        assert torch.equal(found, expected)

    def test_state_dict_and_config_are_unchanged(self) -> None:
        model = self._model(lora=True)
        keys, config = list(model.state_dict()), model.config.to_json_string()
        self._wire(model)
        assert list(model.state_dict()) == keys
        assert model.config.to_json_string() == config
        saved = io.BytesIO()
        torch.save(model.state_dict(), saved)
        saved.seek(0)
        model.load_state_dict(torch.load(saved, weights_only=True))

    def test_safetensors_export_comes_back(self, tmp_path: Path) -> None:
        from hotloop.exporting import export
        from transformers import AutoModelForCausalLM

        _require_format("safetensors")
        model = self._model(lora=True).eval()
        self._wire(model)
        export(model, None, tmp_path, format="safetensors", quant="32bit")
        # Not kept in config.json, and the default differs between releases of transformers.
        attention = model.config._attn_implementation
        loaded: Model = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportUnknownMemberType]
            tmp_path, dtype=torch.float32, attn_implementation=attention
        ).eval()
        inputs = {"input_ids": batch("dense", model.config.vocab_size)["input_ids"]}
        with torch.no_grad():
            expected, found = model(**inputs).logits, loaded(**inputs).logits
        assert_no_worse_than(
            {"logits": found}, {"logits": expected}, {"logits": expected + 0}, floor=1e-5
        )

    def test_gguf_export_comes_back(self, tmp_path: Path) -> None:
        from hotloop.exporting import export
        from hotloop.loading import load

        _require_format("gguf")
        model = self._model(lora=False)
        words = tokenizer(model.config.vocab_size)
        if "gguf" not in self.spec.exports:
            with pytest.raises(UnsupportedError, match="gguf"):
                export(model, words, tmp_path, format="gguf", quant="f32")
            return
        report = export(model, words, tmp_path, format="gguf", quant="f32", name="tiny")
        loaded: Model
        loaded, _ = load(
            report.files[0].path, bits=16, dtype="float32", max_seq_len=64, wire=False, device="cpu"
        )
        found, expected = dict(loaded.state_dict()), dict(model.state_dict())
        for name in _kept_as_a_sum(self.spec, model.config.to_dict(), "gguf"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=SUM_ROUNDING)
            found[name] = expected[name]
        assert_same_bits(found, expected)

    def test_every_other_installed_format_holds_each_tensor_or_says_why_not(
        self, tmp_path: Path
    ) -> None:
        from hotloop.exporting import export

        model = self._model(lora=True)
        words = tokenizer(model.config.vocab_size)
        tied = facts_of(self.spec, model.config.to_dict()).tied
        weights = sum(1 for _ in self._model(lora=False).parameters())
        for exporter in discover().exporters:
            if exporter.name in FORMATS_READ_BACK:
                continue
            try:
                report = export(model, words, tmp_path / exporter.name, format=exporter.name)
            except UnsupportedError as refusal:
                assert str(refusal)
                continue
            assert report.files and report.tensors in (weights, weights + tied), report

    def _model(self, *, lora: bool, seed: int = 0) -> Model:
        model = build(self.tiny_config(), seed=seed)
        return with_lora(model, self.spec, seed=1 + seed) if lora else model

    def _wire(self, model: Model, layer: LayerPlan = KEEP_ALL) -> Receipt:
        from hotloop.wiring import wire

        return wire(model, _plan(model, layer), family=self.spec.name, deterministic=True)


def _verified(
    draw: Callable[[int], tuple[Model, dict[str, torch.Tensor]]], dtype: torch.dtype
) -> Report:
    """Fails where an error is worse than eager's in the first draw and, as the root mean square, over all of `DRAWS`.

    A gradient that nearly cancels is a few roundings: over 24 draws of a Qwen 3 with biases our error for k's was 1.03
    times eager's with a deviation of 0.15, and two draws passed the slack. What is truly worse is so in every draw.
    """
    from hotloop.verification import verify

    first = verify(*draw(0), dtype=dtype, slack=SLACK)
    if first.ok:
        return first
    reports = [first, *(verify(*draw(n), dtype=dtype, slack=SLACK) for n in range(1, DRAWS))]
    excess: defaultdict[str, float] = defaultdict(float)
    for row in (row for report in reports for row in report.rows):
        excess[row.name] += row.ours**2 - row.allowed**2
    worse = [name for name, squares in excess.items() if not squares <= 0]
    assert not worse, f"over {DRAWS} draws {', '.join(worse)} are worse; the first draw:\n{first}"
    return first


def _plan(model: Model, layer: LayerPlan) -> Plan:
    layers: int = model.config.num_hidden_layers
    return Plan(layers=(layer,) * layers, tokens=128, longest=128)


def _kept_as_a_sum(spec: FamilySpec, config: dict[str, Any], format_name: str) -> set[str]:
    """The weights that a format holds as 1 + w, by state-dict key; other transforms keep the bits."""
    transforms = spec.exports[format_name].transforms
    roles = {role for role, transform in transforms.items() if transform == "add_one"}
    found = {spec.final_norm} if "final_norm" in roles else set[str]()
    for index in range(config["num_hidden_layers"]):
        layer = spec.layer_spec(config, index)
        for part in (layer.norms, layer.attention):
            paths = (getattr(part, role, None) for role in roles)
            found |= {f"{spec.layers}.{index}.{path}" for path in paths if path is not None}
    return {f"{path}.weight" for path in found}


def _require_format(name: str) -> None:
    if all(exporter.name != name for exporter in discover().exporters):
        raise NotInstalledError(f"no exporter for {name!r} is installed (`uv add hotloop-{name}`)")
