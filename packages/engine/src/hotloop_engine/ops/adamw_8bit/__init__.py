"""An AdamW step on 8-bit moments, for all tensors of an optimizer at once.   arXiv:2110.02861

Used by `hotloop.wiring.optimizer` through `implementation("adamw_8bit", device)`; the contract is
`hotloop_core.kernels.AdamW8bit`.
"""
