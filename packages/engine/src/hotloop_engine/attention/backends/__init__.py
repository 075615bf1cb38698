"""The attention backends in the order in which `choose` tries them: measured speed on an H100.

Forward/backward TFLOP/s at 8 x 2048 and 1 x 32768 tokens, 32/8 heads of 128, bf16: flash-attn-4
402/329 and 650/607; cuDNN 434/346 and 586/540 (dense only); torch's flash kernel 246/208 and
345/308. Ours in Triton takes what those refuse: a soft cap, fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_engine.attention.reference import Reference

from .cudnn import Cudnn
from .efficient import Efficient
from .fa4 import FlashAttention4
from .flash import Flash
from .sdpa_cpu import SdpaCpu
from .triton import Triton

if TYPE_CHECKING:
    from hotloop_engine.attention.interface import Backend

BACKENDS: tuple[Backend, ...] = (
    FlashAttention4(),
    Cudnn(),
    Flash(),
    Triton(),
    Efficient(),
    SdpaCpu(),
    Reference(),
)
