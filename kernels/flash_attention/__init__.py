"""Attention over packed segments: `reference.py` is the contract, `tpu.py` leads to the Pallas
kernels, `xla.py` is what CPU and GPU run."""

from kernels.flash_attention.attention import flash_attention

__all__ = ["flash_attention"]
