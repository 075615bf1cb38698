"""The part of a family's suite that is about the description itself: does it say what the model and its config are?"""

# ruff: noqa: D102 - the name of a check is its claim

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, ClassVar

import torch
from hotloop_core import ConfigKeys, discover, facts_of

from .conformance import Conformance, assert_import_is_light, module_of, plugin_with
from .tiny import LENGTH, build

if TYPE_CHECKING:
    from hotloop.new_family.tiny import Tiny
    from hotloop_core import FamilySpec
    from transformers import PreTrainedConfig

VOCABULARY = 300
"""The least: bytes and special tokens, so that the exporters' checks have a tokenizer."""


class DescriptionConformance(Conformance, kit=True):
    """Checks what a family says against one tiny config and the model that transformers makes of it."""

    spec: ClassVar[FamilySpec]

    def tiny_config(self) -> PreTrainedConfig:
        """The config to check, new for each call."""
        raise NotImplementedError(f"{type(self).__name__} has no tiny_config(); return a config")

    def test_the_plugin_is_installed_and_its_import_is_light(self) -> None:
        assert_import_is_light(module_of(plugin_with("families", self.spec)))

    def test_the_registry_finds_the_family(self) -> None:
        types = self.spec.model_types
        assert isinstance(types, frozenset), (
            f"model_types is {types!r}; expected a frozenset of names, as frozenset({{'llama'}})"
        )
        config = self.tiny_config().to_dict()
        assert discover().match(config, family=self.spec.name) is self.spec

    def test_the_tiny_config_can_show_mistakes(self) -> None:
        facts = facts_of(self.spec, self.tiny_config().to_dict())
        assert facts.layers >= 2, f"{facts.layers} layer; with two, what one hands on is seen"
        assert facts.vocab_size >= VOCABULARY, f"{facts.vocab_size} tokens, expected {VOCABULARY}"
        assert facts.window is None or facts.window < LENGTH, (
            f"the window of {facts.window} tokens hides nothing in rows of {LENGTH}; make it shorter, as 9"
        )

    def test_every_layer_is_covered_and_nothing_is_claimed_twice(self) -> None:
        from hotloop.wiring import check_layer

        model = build(self.tiny_config())
        config = model.config.to_dict()
        layers = list(model.get_submodule(self.spec.layers))
        for index, layer in enumerate(layers):
            check_layer(f"{self.spec.layers}.{index}", layer, self.spec.layer_spec(config, index))
        paths = (self.spec.embedding, self.spec.final_norm, self.spec.head)
        claimed = (f"{self.spec.layers}.", *(f"{path}." for path in paths))
        left = [n for n, _ in model.named_parameters() if not n.startswith(claimed)]
        assert not left, f"outside the layers, the description does not claim {left}"

    def test_every_module_and_op_that_a_layer_names_is_there(self) -> None:
        from hotloop_engine.ops._select import implementation

        model = build(self.tiny_config())
        config = model.config.to_dict()
        for index, layer in enumerate(model.get_submodule(self.spec.layers)):
            said = self.spec.layer_spec(config, index)
            names = {name for name, _ in layer.named_modules()}
            for part in (said.attention, said.mlp):
                where = f"{self.spec.layers}.{index}: {type(part).__name__}(module={part.module!r})"
                assert part.module in names, f"{where} is no module of {type(layer).__name__}"
            for op in said.ops:
                implementation(op, torch.device("cpu"), "reference")  # raises for an unknown name

    def test_the_facts_are_those_of_the_model(self) -> None:
        from hotloop.lora import projections

        model = build(self.tiny_config())
        config = model.config.to_dict()
        facts = facts_of(self.spec, config)
        shapes = facts.linear_shapes()
        of_group = {"qkv": facts.qkv_bias, "o": facts.o_bias, "gate_up": facts.mlp_bias}
        biases = {role: of_group.get(g) for g, roles in facts.groups.items() for role in roles}
        layer = model.get_submodule(f"{self.spec.layers}.0")
        for role, path in projections(self.spec, config).items():
            linear = layer.get_submodule(path)
            found, said = tuple(linear.weight.shape), shapes[role]
            assert found == said, f"{path} ({role}) is {found}; by the config's keys {said}"
            has = linear.bias is not None
            assert biases[role] in (None, has), (
                f"{path} ({role}) has {'a' if has else 'no'} bias; the description says otherwise"
            )
        embedding = model.get_submodule(self.spec.embedding)
        head = model.get_submodule(self.spec.head)
        assert embedding is model.get_input_embeddings() and head is model.get_output_embeddings()
        found, said = tuple(embedding.weight.shape), (facts.vocab_size, facts.hidden_size)
        assert found == said, f"{self.spec.embedding} is {found}; by the config's keys {said}"
        norm = model.get_submodule(self.spec.final_norm)
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", facts.norm_eps))
        assert eps == facts.norm_eps, (
            f"the norms' epsilon is {facts.norm_eps} by the keys, {eps} in the model"
        )
        tied = head.weight is embedding.weight
        assert facts.tied == tied, f"tied is {facts.tied} by the config's keys, {tied} in the model"
        assert len(model.get_submodule(self.spec.layers)) == facts.layers == len(facts.windows)

    def test_every_key_that_the_description_names_is_one_of_the_config(self) -> None:
        keys = self.spec.keys
        values = ((each.default, getattr(keys, each.name)) for each in fields(ConfigKeys))
        named = {own for usual, own in values if isinstance(own, str) and own != usual}
        config = self.tiny_config().to_dict()
        unknown = sorted({*named, *keys.refused} - {*config, *keys.defaults})
        assert not unknown, f"{type(self.tiny_config()).__name__} has no {', '.join(unknown)}"

    def test_a_config_json_without_a_key_is_read_as_transformers_reads_it(self) -> None:
        from hotloop.new_family.absent import keys_read, reads_alike, taken
        from hotloop.new_family.kinds import without_warnings

        small = self._small()
        with (
            without_warnings()
        ):  # the sizes of its class's own tokens are not those of the tiny config
            unlike = [k for k in keys_read(self.spec) if not reads_alike(self.spec, small, k)]
            other = {name: value for key in unlike for name, value in taken(small, key).items()}
        assert not other, (
            f"where a config.json lacks them, transformers takes {other}; say so in ConfigKeys.defaults, or of "
            "layer_types by window_pattern"
        )

    def test_far_from_the_start_the_same_is_computed(self) -> None:
        from hotloop.new_family.probe import FAR, difference

        found = difference(self.spec, self.tiny_config())
        assert found.none, (
            f"logits differ by {found.near:.1e} at the start and by {found.far:.1e} at position {FAR}"
        )

    def test_no_other_value_of_the_config_changes_a_layer_unseen(self) -> None:
        from hotloop.new_family.kinds import without_warnings
        from hotloop.new_family.probe import unread_changes

        with without_warnings():
            found = [*unread_changes(self.spec, self._small())]
        unseen = [str(each) for each in found if each.untried is None]
        assert not unseen, (
            f"{'; '.join(unseen)}. Say what it does, or put the key into ConfigKeys.refused with the reason"
        )

    def _small(self) -> Tiny:
        from hotloop.new_family.tiny import Tiny

        config = self.tiny_config()
        return Tiny(config_class=type(config), arguments=config.to_dict())
