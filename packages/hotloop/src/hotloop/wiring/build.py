"""Makes the two blocks of one layer at one call, from the modules as they are at this moment."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core import Attention, CustomBlock, Glu
from hotloop_core.errors import PlanError
from hotloop_engine.blocks import (
    Attend,
    AttentionBlock,
    AttentionShape,
    BlockContext,
    Call,
    MlpBlock,
    OwnBlock,
)
from hotloop_engine.ops.lora_linear import LinearGroup

from .targets import load_target
from .views import linear_view, norm_view, plain_module

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotloop_engine.blocks import NormView, StreamBlock
    from hotloop_engine.ops.lora_linear import LinearView
    from torch import Tensor, nn

    from .layer import LayerState


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of a projection of `hidden`: autocast's where that is on, but for fp64, which it leaves alone."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


class Builder:
    """One layer at one call. modules: the module of each role (of a family's own block also by path)."""

    def __init__(
        self,
        state: LayerState,
        modules: Mapping[str, nn.Module],
        hidden: Tensor,
        kwargs: Mapping[str, Any],
    ) -> None:
        self._state, self._modules = state, modules
        self._hidden, self._kwargs = hidden, kwargs
        shared = state.shared
        self._context = BlockContext(
            dtype=compute_dtype(hidden),
            device=hidden.device,
            ops={**state.spec.ops, **shared.ops},
            residual_scale=shared.facts.residual_scale,
            tile=shared.plan.tile,
        )

    def blocks(self) -> tuple[StreamBlock, StreamBlock]:
        """The attention block and the MLP block.

        Raises:
            Refusal: a projection is something that the blocks do not do.
        """
        attention, mlp = self._state.spec.attention, self._state.spec.mlp
        if isinstance(attention, CustomBlock):
            first = self._own(attention, "attention", "x")
        else:
            assert isinstance(attention, Attention)
            first = self._attention(attention)
        if isinstance(mlp, CustomBlock):
            return first, self._own(mlp, "mlp", "x_mid")
        assert isinstance(mlp, Glu)
        return first, self._mlp(mlp)

    def _attention(self, attention: Attention) -> AttentionBlock:
        into = [self._view(role) for role in attention.projections if role != "o"]
        v_bias = None
        if attention.qkv is None:  # v's bias is added behind attention
            *qk, v = into
            into, v_bias = [*qk, replace(v, bias=None)], v.bias
        cos, sin = self._tables()
        if not attention.rotary:  # two dimensions turned by nothing: every bit stays
            cos, sin = cos.new_ones(1, 2), sin.new_zeros(1, 2)
        return AttentionBlock(
            self._context,
            self._attend(),
            norm=self._norm("before_attention"),
            qkv=self._group("qkv", *into),
            o=self._group("o", self._view("o")),
            cos_PR=cos,
            sin_PR=sin,
            interleaved=attention.interleaved,
            q_norm=self._norm("q_norm"),
            k_norm=self._norm("k_norm"),
            norm_over=attention.norm_over,
            v_bias=v_bias,
            after=self._norm("after_attention"),
            nf4_kv=self._state.shared.plan.layers[self._state.index].nf4_kv,
        )

    def _mlp(self, mlp: Glu) -> MlpBlock:
        activation = self._state.shared.facts.activation
        assert activation is not None  # facts have one wherever the MLP is a Glu
        into = [self._view(role) for role in mlp.projections if role != "down"]
        return MlpBlock(
            self._context,
            activation=activation,
            norm=self._norm("before_mlp"),
            gate_up=self._group("gate_up", *into),
            down=self._group("down", self._view("down")),
            after=self._norm("after_mlp"),
        )

    def _own(self, block: CustomBlock, part: str, input_name: str) -> OwnBlock:
        layer = self._state.shared.plan.layers[self._state.index]
        if part == "attention" and layer.nf4_kv:
            raise PlanError(
                f"{self._state.path}: the plan keeps keys and values in NF4, which {block.target} decides by itself. "
                "Plan without nf4_kv."
            )
        cos, sin = self._tables()
        call = Call(
            context=self._context,
            facts=self._state.shared.facts,
            layer=self._state.index,
            cos_PR=cos,
            sin_PR=sin,
            attend=self._attend(),
            groups={role: self._group(role, self._view(role)) for role in block.projections},
            modules={path: plain_module(self._modules[path]) for path in block.parameters},
        )
        return OwnBlock(
            load_target(block.target),
            call,
            part=part,
            input_name=input_name,
            norm=self._norm(f"before_{part}"),
            after=self._norm(f"after_{part}"),
        )

    def _attend(self) -> Attend:
        shared, index = self._state.shared, self._state.index
        facts = shared.facts
        return Attend(
            shape=AttentionShape(
                heads=facts.heads,
                kv_heads=facts.kv_heads,
                head_dim=facts.head_dim,
                scale=facts.attention_scale,
                window=facts.windows[index],
                softcap=facts.attention_softcap,
            ),
            sequences=shared.sequences(self._hidden, self._kwargs),
            backend=shared.backend,
            deterministic=shared.deterministic,
        )

    def _tables(self) -> tuple[Tensor, Tensor]:
        cos, sin = self._kwargs["position_embeddings"]
        return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])

    def _norm(self, role: str) -> NormView | None:
        module = self._modules.get(role)
        if module is None:
            return None
        return norm_view(module, self._state.spec.norms, self._state.shared.facts.norm_eps)

    def _view(self, role: str) -> LinearView:
        return linear_view(self._modules[role], self._state.four_bit)

    def _group(self, name: str, *views: LinearView) -> LinearGroup:
        """The projections as one group: the one of the call before, if they are still the same."""
        context, groups = self._context, self._state.groups
        parts = (part for view in views for part in view.identity())
        dtypes = (
            tensor.dtype for view in views for tensor in view.tensors()
        )  # .to() keeps identities
        key = (context.dtype, context.device, *parts, *dtypes)
        known = groups.get(name)
        if known is None or known[0] != key:  # the group holds the views, so no identity is reused
            known = groups[name] = (key, LinearGroup(views, context.dtype, context.device))
        return known[1]
