"""One folder per op: `reference.py` in torch, `kernel.py` in Triton, the op in `__init__.py`.

What each function takes and returns, and the laws it keeps, stands in `hotloop_core.kernels`.
"""
