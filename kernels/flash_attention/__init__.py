"""Attention over packed segments. `reference.py` is the contract."""
