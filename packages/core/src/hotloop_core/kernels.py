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
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
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


@dataclass(frozen=True, kw_only=True)
class FourBitWeight:
    """A weight in bitsandbytes' 4-bit layout.

    packed: uint8, N*K/2 bytes in any shape (two codes a byte, the first value in the high nibble), row-major.
    code: fp32 [16], the values of the codes. kind says which table it is.
    absmax: fp32 [ceil(N*K / blocksize)], or, nested, uint8 codes into `nested_code`, so that
        absmax[i] = nested_code[absmax[i]] * nested_absmax[i // nested_blocksize] + nested_offset.
    nested_offset: fp32 0-d tensor on the device (never read on the host).
    shape: (N, K).  dtype: what the weight was quantised from.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    shape: tuple[int, int]
    kind: Literal["nf4", "fp4"]
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_blocksize: int = 256


class Dequantize4bit(Protocol):
    """W[n, k] = code[packed] * absmax[block]   arXiv:2305.14314 section 3 (NF4, double quantisation)."""

    def forward(self, weight: FourBitWeight, *, out: Tensor) -> Tensor:
        """Writes the N x K values into `out` (bf16, fp16 or fp32, rows of any stride) and returns it."""
        ...


@dataclass(frozen=True, kw_only=True)
class HeadLossOptions:
    """What linear cross entropy computes beside the sum of token losses. Frozen, hashable."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    scale: float = 1.0
    z_loss: float = 0.0
    temperature: float = 1.0


class CrossEntropyRows(Protocol):
    """Row-wise softmax statistics of a tile of logits, and its gradient in place; the GEMMs stay outside.

    z = softcap * tanh(scale * logits / softcap) / temperature (softcap None: z = scale * logits / temperature);
    lse = log sum exp z;  log_prob = z[label] - lse;  entropy = lse - sum softmax(z) z;
    nll = -(1 - a) log_prob - a (mean(z) - lse) with a = label_smoothing;  loss = nll + z_loss * lse^2.
    """

    def forward_(
        self,
        logits_TV: Tensor,
        labels_T: Tensor,
        *,
        options: HeadLossOptions,
        want_gradient: bool,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Returns fp32 (loss_T, log_prob_T, entropy_T or None) and bool is_top1_T.

        With `want_gradient`, logits become d loss / d logits (per row, unscaled), in place, in their dtype.
        Every label is a valid class: ignored rows never come here.
        """
        ...
