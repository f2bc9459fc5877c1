"""Attention over packed segments: `reference.py` is the contract, `xla.py` runs on any device."""

from kernels.flash_attention.xla import flash_attention

__all__ = ["flash_attention"]
