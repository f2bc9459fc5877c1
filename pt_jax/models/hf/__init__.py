"""HuggingFace checkpoints in and out: config.json and safetensors, straight onto the mesh.

`config` translates config.json; `names` has the table of parameter names and layouts that `read`
and `write` share. Not here: pickled `.bin` checkpoints, quantised ones, and downloading.
"""

from pt_jax.models.hf.config import read_config
from pt_jax.models.hf.read import load
from pt_jax.models.hf.write import save

__all__ = ["load", "read_config", "save"]
