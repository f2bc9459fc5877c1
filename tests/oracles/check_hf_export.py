"""Does transformers read a checkpoint that pt_jax wrote as the one it was read from?

Run in the oracle environment (tests/oracles/README.md):

  python tests/oracles/check_hf_export.py tests/oracles/hf/qwen3 EXPORTED_FOLDER

Both folders are loaded with `AutoModelForCausalLM.from_pretrained`; exits with an error unless no
key is missing, unexpected or of another shape and all parameters are bitwise equal. Prints one JSON
line with the largest difference of the logits over the three layouts of `expected.npz`.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from make_hf_models import run


def load(folder: pathlib.Path) -> transformers.PreTrainedModel:
  """A model whose checkpoint fits it without remainder."""
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype="auto", attn_implementation="eager", output_loading_info=True
  )
  problems = {key: value for key, value in info.items() if value}
  if problems:
    sys.exit(f"{folder}: {problems}")
  return model.eval()


def main(original_folder: pathlib.Path, exported_folder: pathlib.Path) -> None:
  """Compares the two and prints the figures."""
  original, exported = load(original_folder), load(exported_folder)
  weights, others = dict(original.named_parameters()), dict(exported.named_parameters())
  if weights.keys() != others.keys():
    sys.exit(f"parameters differ: {sorted(weights.keys() ^ others.keys())}")
  for name, weight in weights.items():
    if weight.dtype != others[name].dtype or not torch.equal(weight, others[name]):
      sys.exit(f"parameter {name} differs")
  golden = np.load(original_folder / "expected.npz")
  differences = []
  for layout in ("right", "left", "packed"):
    tokens = golden[f"{layout}_tokens"].astype(np.int64)
    mask = np.ones_like(tokens) if layout == "packed" else golden[f"{layout}_mask"].astype(np.int64)
    differences.append(np.abs(run(original, tokens, mask) - run(exported, tokens, mask)).max())
  figures = {
    "parameters": sum(weight.numel() for weight in weights.values()),
    "largest_logit_difference": float(max(differences)),
    "transformers": transformers.__version__,
  }
  print(json.dumps(figures))


if __name__ == "__main__":
  main(*map(pathlib.Path, sys.argv[1:]))
