"""Attention over a paged cache: `reference.py` is the contract, `pages.py` the layout of a page."""

from kernels.ragged_paged_attention.attention import ragged_paged_attention

__all__ = ["ragged_paged_attention"]
