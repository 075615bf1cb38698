"""Matrix products, accumulated in fp32 and rounded once.

On a CUDA card those of 16-bit operands go to cuBLASLt itself (`cublaslt.py`): it adds a residual that is not the
output, which `torch.addmm` copies first and rounds the product for, and it lets its algorithms be tried out in the
middle of a step (`chosen.py`, `trial.py`, decision 0022). All else is torch's.
"""

from .chosen import library_version, prepare_stream
from .products import gemm, matmul_to

__all__ = ["gemm", "library_version", "matmul_to", "prepare_stream"]
