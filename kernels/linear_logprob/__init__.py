"""Log-prob, entropy and lse of tokens from hidden states: `reference.py` is the contract, `xla.py`
what CPU and GPU run, `tpu.py` the Pallas kernels; `statistics.py` chooses."""

from kernels.linear_logprob.reference import IGNORE, Statistics
from kernels.linear_logprob.statistics import linear_logprob

__all__ = ["IGNORE", "Statistics", "linear_logprob"]
