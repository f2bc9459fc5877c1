"""Products of groups of rows with a matrix each, for mixtures of experts: `reference.py` is the
contract, `tpu.py` the Pallas kernels; CPU and GPU run `jax.lax.ragged_dot`."""

from kernels.grouped_matmul.product import grouped_matmul

__all__ = ["grouped_matmul"]
