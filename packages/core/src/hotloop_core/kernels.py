"""What an op is: its signature, shapes, dtypes and laws, declared once for every implementation.

The engine implements each Protocol twice (`reference.py` in torch, `kernel.py` in Triton); a plugin may bring another
implementation through the `hotloop_ops` hook. An implementation is a module or an object with these functions.

Laws that hold for every op:

- Forward and every gradient are no further from fp64 truth than eager PyTorch in the same dtype on the same inputs.
- Reductions and accumulation are in fp32 (fp64 inputs: in fp64). Results are deterministic: no atomics.
- An `out` buffer may be a view with any row stride; its last dimension has stride 1. Every element of it is written,
  none beside it is touched, and it may be uninitialised memory. `None` allocates.
- Inputs may be views with any row stride. Sizes need not be powers of two. A size of zero is allowed.
- Addresses are 64-bit wherever a tensor can pass 2**31 elements.

Shape suffixes: T tokens, D hidden size, I intermediate size, H query heads, G key/value heads, K head size,
R rotary dimensions (R <= K, even), V vocabulary, N output features, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal, Protocol

from hotloop_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]
"""silu: x * sigmoid(x). gelu: exact, with erf. gelu_tanh: the tanh approximation."""


class RmsNorm(Protocol):
    """y = x / sqrt(mean(x^2) + eps) * (offset + w)   arXiv:1910.07467 eq. 4, plus eps and offset.

    offset is 0 for Llama, 1 for Gemma. The product with w happens in fp32 and is rounded once.
    """

    def forward(
        self,
        x_TD: Tensor,
        w_D: Tensor | None,
        *,
        eps: float,
        offset: float = 0.0,
        residual_TD: Tensor | None = None,
        sum_out: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (y_TD, rstd_T fp32, s_TD): s = x + residual in x's dtype, or x itself without a residual."""
        ...

    def backward(
        self,
        dy_TD: Tensor,
        s_TD: Tensor,
        w_D: Tensor | None,
        rstd_T: Tensor,
        *,
        offset: float = 0.0,
        dresidual_TD: Tensor | None = None,
        need_dw: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (ds_TD, dw_D fp32 or None); dresidual, the gradient that reached s otherwise, is added to ds.

        `out` may be `dy_TD` or `dresidual_TD` itself.
        """
        ...


class LayerNorm(Protocol):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * w + b   arXiv:1607.06450 eq. 4; biased variance."""

    def forward(
        self,
        x_TD: Tensor,
        w_D: Tensor | None,
        b_D: Tensor | None,
        *,
        eps: float,
        residual_TD: Tensor | None = None,
        sum_out: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns (y_TD, mean_T fp32, rstd_T fp32, s_TD)."""
        ...

    def backward(
        self,
        dy_TD: Tensor,
        s_TD: Tensor,
        w_D: Tensor | None,
        mean_T: Tensor,
        rstd_T: Tensor,
        *,
        dresidual_TD: Tensor | None = None,
        need_dw: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns (ds_TD, dw_D, db_D), the last two fp32 or None."""
        ...


@dataclass(frozen=True, kw_only=True)
class HeadNorm:
    """An RMSNorm over each head (Qwen3, Gemma 3), applied before the rotation. w_K may be None."""

    w_K: Tensor | None
    eps: float
    offset: float = 0.0


class Rope(Protocol):
    """Rotates the first R dimensions of every head of q and k   arXiv:2104.09864 eq. 34.

    half-split:  (x1, x2) are the two halves of the R dimensions, as in transformers' Llama;
    interleaved: (x1, x2) are the even and the odd dimensions, as in the paper and in DeepSeek.
    y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin; dimensions from R on are copied.

    cos_PR, sin_PR hold R columns. Half-split: column j and column j + R/2 belong to the same pair and may differ in
    principle, so y1 uses column j and y2 column j + R/2. Interleaved: pair j uses column j (transformers repeats the
    same R/2 values twice). Row t % P serves token t, so a batch of equal rows shares one table (T is a multiple of P).
    q_THK and k_TGK are 3-D views whose head size has stride 1; token and head strides are arbitrary.
    """

    def forward(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        cos_PR: Tensor,
        sin_PR: Tensor,
        *,
        interleaved: bool = False,
        q_norm: HeadNorm | None = None,
        k_norm: HeadNorm | None = None,
        out_q: Tensor | None = None,
        out_k: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns rotated (q, k). `out_q` may be `q_THK` itself, `out_k` may be `k_TGK`: then it works in place."""
        ...

    def backward(
        self,
        dq_THK: Tensor,
        dk_TGK: Tensor,
        cos_PR: Tensor,
        sin_PR: Tensor,
        *,
        interleaved: bool = False,
        q_THK: Tensor | None = None,
        k_TGK: Tensor | None = None,
        q_norm: HeadNorm | None = None,
        k_norm: HeadNorm | None = None,
        need_dw: bool = False,
        out_q: Tensor | None = None,
        out_k: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Returns (dq, dk, dwq_K, dwk_K): gradients with respect to forward's inputs and (fp32) the norm weights.

        Without norms it is the rotation by the opposite angle and needs no saved tensor. With a norm, `q_THK` (or
        `k_TGK`) is forward's input. Outputs may alias the incoming gradients.
        """
        ...


class Glu(Protocol):
    """h = act(gate) * up   arXiv:2002.05202 section 2 (SwiGLU, GEGLU). Computed in fp32, rounded once."""

    def forward(
        self, gate_TI: Tensor, up_TI: Tensor, *, activation: Activation, out: Tensor | None = None
    ) -> Tensor:
        """Returns h_TI."""
        ...

    def backward_(
        self, dh_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, *, activation: Activation
    ) -> None:
        """In place: dh becomes h = act(gate) * up (for down's dA), gate becomes dgate, up becomes dup."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class FourBitWeight:
    """A weight in bitsandbytes' 4-bit layout.

    packed: uint8, ceil(N*K / 2) bytes in any shape, contiguous: the weight flattened row by row,
        two codes a byte, the first value in the high nibble.
    code: fp32 [16], the values of the codes. kind says which table it is.
    absmax: fp32 [ceil(N*K / blocksize)], or, nested, uint8 codes into `nested_code`, so that
        absmax[i] = nested_code[absmax[i]] * nested_absmax[i // nested_blocksize] + nested_offset.
        Blocks run over the flattened weight, across the ends of rows.
    nested_offset: fp32 0-d tensor on the device (never read on the host).
    shape: (N, K).  dtype: what the weight was quantised from.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype
    kind: Literal["nf4", "fp4"]
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_blocksize: int = 256


class Dequantize4bit(Protocol):
    """W[n, k] = code[packed] * absmax[block]   arXiv:2305.14314 section 3 (NF4, nested absmax).

    Bit-equal to bitsandbytes' `dequantize_4bit`: every product and sum is rounded to fp32 on its
    own (no fused multiply-add), and the result is rounded once to the dtype of `out`.
    """

    def forward(self, weight: FourBitWeight, *, out: Tensor) -> Tensor:
        """Writes the N x K values into `out` (bf16, fp16, fp32; any row stride); returns it."""
        ...


@dataclass(frozen=True, kw_only=True)
class HeadLossOptions:
    """How logits become a token's loss; the equations stand at `CrossEntropyRows`. Hashable.

    Raises ConfigError where a value has no meaning.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    scale: float = 1.0
    z_loss: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("label_smoothing", 0.0 <= self.label_smoothing <= 1.0, "0 to 1"),
            (
                "softcap",
                self.softcap is None or 0.0 < self.softcap < inf,
                "None or a positive number",
            ),
            ("scale", -inf < self.scale < inf, "a finite number"),
            ("z_loss", 0.0 <= self.z_loss < inf, "0 or a positive number"),
            ("temperature", 0.0 < self.temperature < inf, "a positive number"),
        ):
            if not valid:
                raise ConfigError(
                    f"HeadLossOptions.{name} is {getattr(self, name)!r}; expected {expected}."
                )

    @property
    def loss_is_nll(self) -> bool:
        """Whether a token's loss is just -log_prob: no smoothing and no z-loss."""
        return self.label_smoothing == 0.0 and self.z_loss == 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class RowStatistics:
    """What the softmax of each row says about its label, in fp32 (fp64 logits: fp64).

    is_top1: bool, whether the label is the first of the largest logits. entropy: in nats, None
    where not asked for.
    """

    loss_T: Tensor
    log_prob_T: Tensor
    lse_T: Tensor
    is_top1_T: Tensor
    entropy_T: Tensor | None = None


class CrossEntropyRows(Protocol):
    """Softmax statistics of a tile of logits, and their gradients in place; GEMMs stay outside.

    z = softcap * tanh(scale * logits / softcap) / temperature, or without a softcap
    z = scale * logits / temperature;  lse = log sum exp z;  p = exp(z - lse);
    log_prob = z[label] - lse;  entropy = lse - sum p z;
    nll = -(1 - a) log_prob - a (mean(z) - lse) with a = label_smoothing;
    loss = nll + z_loss * lse^2.

    Every label is a valid class: ignored rows never come here.
    """

    def forward_(
        self,
        logits_TV: Tensor,
        labels_T: Tensor,
        *,
        options: HeadLossOptions,
        dloss_T: Tensor | None,
        want_entropy: bool,
        moments_2T: Tensor | None = None,
    ) -> RowStatistics:
        """Returns the statistics of each row. moments: contiguous fp32, filled with mean z and log sum p^2.

        With `dloss_T` (fp32, any stride), logits become dloss * d loss / d logits, in place, in
        their dtype; otherwise they are left alone.
        """
        ...

    def backward_(
        self,
        logits_TV: Tensor,
        labels_T: Tensor,
        lse_T: Tensor,
        entropy_T: Tensor | None,
        *,
        options: HeadLossOptions,
        dloss_T: Tensor | None,
        dlog_prob_T: Tensor | None,
        dentropy_T: Tensor | None,
    ) -> None:
        """Logits (the same as forward's) become their gradient, in place, in their dtype.

        It is dloss * d loss + dlog_prob * d log_prob + dentropy * d entropy, the three incoming
        gradients fp32 of any stride, None for zeros. `lse_T` and `entropy_T` are forward's;
        `dentropy_T` needs `entropy_T`.
        """
        ...

    def scale_rows_(self, g_TD: Tensor, factor_T: Tensor) -> None:
        """Multiplies each row by its factor (fp32, any stride), rounded once, in place."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class EightBitTensor:
    """A parameter of n elements, its gradient and its two moments in bitsandbytes' 8-bit layout.

    parameter, gradient: of one dtype (bf16, fp16, fp32) and shape, contiguous.
    m_codes, v_codes: uint8, n elements in any shape, contiguous: codes of the flattened moments.
    m_absmax, v_absmax: fp32 [ceil(n / 256)], the largest magnitude in each run of 256 elements:
    moment[i] = table[codes[i]] * absmax[i // 256].
    """

    parameter: Tensor
    gradient: Tensor
    m_codes: Tensor
    v_codes: Tensor
    m_absmax: Tensor
    v_absmax: Tensor


@dataclass(frozen=True, kw_only=True)
class AdamWOptions:
    """The numbers of one AdamW step. step: 1 for the first. Hashable."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


class AdamW8bit(Protocol):
    """AdamW (arXiv:1711.05101 algorithm 2) on block-wise 8-bit moments (arXiv:2110.02861 section 2).

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  with c_i = 1 - beta_i^step
    p <- (1 - lr weight_decay) p - lr (m / c1) / (sqrt(v / c2) + eps)

    In fp32, on the moments before they are rounded again. Rounded: divided by the new absmax of its 256
    elements, to the nearest value of its table; a negative m that would round to zero takes the negative value next to
    it, so that its sign stays. Where the gradient is not finite, p stays and both moments become zero.
    """

    def update_(
        self,
        tensors: Sequence[EightBitTensor],
        m_table: Tensor,
        v_table: Tensor,
        options: AdamWOptions,
    ) -> None:
        """In place, for tensors of one dtype on one device. m_table, v_table: fp32 [256], ascending."""
        ...
