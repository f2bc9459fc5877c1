"""Kernels: a folder an operation; `reference.py` is its contract. Imports nothing of ours."""
