"""Makes the two blocks of one layer at one call, from the modules as they are at this moment."""

from __future__ import annotations

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
from .views import norm_view, plain_module

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hotloop_engine.attention import Sequences
    from hotloop_engine.blocks import Kind, NormView, StreamBlock
    from hotloop_engine.ops.lora_linear import LinearView
    from torch import Tensor

    from .layer import Guard, LayerState


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of a projection of `hidden`: autocast's where that is on, but for fp64, which it leaves alone."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


class Builder:
    """One layer at one call, with its modules as a guard has them. What did not change since the last is reused."""

    def __init__(
        self,
        state: LayerState,
        guard: Guard,
        hidden: Tensor,
        kwargs: Mapping[str, Any],
        kind: Kind | None = None,
    ) -> None:
        """kind: of the batch, where the blocks are to read its tables and offsets where recordings do."""
        self._state, self._kind = state, kind
        self._modules, self._projections = guard.modules, guard.projections
        self._hidden, self._kwargs = hidden, kwargs
        shared, dtype, device = state.shared, compute_dtype(hidden), hidden.device
        self._context: BlockContext = self._once(
            "context",
            (dtype, device, shared.plan.tile),
            lambda: BlockContext(
                dtype=dtype,
                device=device,
                ops={**state.spec.ops, **shared.ops},
                residual_scale=shared.facts.residual_scale,
                tile=shared.plan.tile,
            ),
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
        if attention.qkv is None:  # v's bias is added behind attention
            v, v_bias = self._projections["v"].bare()
            into = [self._view("q"), self._view("k"), v]
        else:
            into, v_bias = [self._view("qkv")], None
        cos, sin = self._tables()
        if not attention.rotary:  # two dimensions turned by nothing: every bit stays
            cos, sin = self._once(
                "unturned",
                (cos.dtype, cos.device),
                lambda: (cos.new_ones(1, 2), sin.new_zeros(1, 2)),
            )
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
            sequences=self._sequences(),
            backend=shared.backend,
            deterministic=shared.deterministic,
        )

    def _sequences(self) -> Sequences:
        given = self._state.shared.sequences(self._hidden, self._kwargs)
        return given if self._kind is None else self._kind.over(given)

    def _tables(self) -> tuple[Tensor, Tensor]:
        cos, sin = self._kwargs["position_embeddings"]
        if self._kind is not None:
            return self._kind.tables(self._state.index, cos, sin)
        return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])

    def _norm(self, role: str) -> NormView | None:
        module = self._modules.get(role)
        if module is None:
            return None
        return norm_view(module, self._state.spec.norms, self._state.shared.facts.norm_eps)

    def _view(self, role: str) -> LinearView:
        return self._projections[role].view()

    def _group(self, name: str, *views: LinearView) -> LinearGroup:
        """The projections as one group."""
        context = self._context
        group: LinearGroup = self._once(
            name,
            (context, *views),
            lambda: LinearGroup(views, context.dtype, context.device),
        )
        group.operand.keep(self._state.shared.plan.layers[self._state.index].dequantised)
        return group

    def _once(self, name: str, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """What the call before made under this name, if `key` is equal; objects in it are if they are the same."""
        known = self._state.made.get(name)
        if known is None or known[0] != key:
            known = self._state.made[name] = (key, make())
        return known[1]
