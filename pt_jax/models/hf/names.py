"""What our parameters are called in a HuggingFace checkpoint and how they lie there.

`NAMES` is the whole mapping, read in both directions. Its third column lays out one tensor: in
"hk d -> d h k" HF has two axes, the first of which is our h and k merged (h major), and ours are
d, h and k. A `{}` in the HF name is the number of the layer, our leading axis. Letters are those of
`models.decoder`.
"""

import math
from typing import NamedTuple

import numpy as np

from pt_jax import weights
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig

NAMES = {
  "embed": ("model.embed_tokens.weight", "v d -> v d"),
  "blocks.attention_norm": ("model.layers.{}.input_layernorm.weight", "d -> d"),
  "blocks.q": ("model.layers.{}.self_attn.q_proj.weight", "hk d -> d h k"),
  "blocks.k": ("model.layers.{}.self_attn.k_proj.weight", "gk d -> d g k"),
  "blocks.v": ("model.layers.{}.self_attn.v_proj.weight", "gk d -> d g k"),
  "blocks.q_bias": ("model.layers.{}.self_attn.q_proj.bias", "hk -> h k"),
  "blocks.k_bias": ("model.layers.{}.self_attn.k_proj.bias", "gk -> g k"),
  "blocks.v_bias": ("model.layers.{}.self_attn.v_proj.bias", "gk -> g k"),
  "blocks.q_norm": ("model.layers.{}.self_attn.q_norm.weight", "k -> k"),
  "blocks.k_norm": ("model.layers.{}.self_attn.k_norm.weight", "k -> k"),
  "blocks.o": ("model.layers.{}.self_attn.o_proj.weight", "d hk -> h k d"),
  "blocks.mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", "d -> d"),
  "blocks.gate": ("model.layers.{}.mlp.gate_proj.weight", "f d -> d f"),
  "blocks.up": ("model.layers.{}.mlp.up_proj.weight", "f d -> d f"),
  "blocks.down": ("model.layers.{}.mlp.down_proj.weight", "d f -> f d"),
  "final_norm": ("model.norm.weight", "d -> d"),
  "unembed": ("lm_head.weight", "v d -> v d"),
}
EMBED, UNEMBED = NAMES["embed"][0], NAMES["unembed"][0]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
  """One tensor of a HF checkpoint: one of our parameters, or one layer of it."""

  ours: str  # dotted name of the parameter
  layer: int | None  # index on its leading axis, None if it has no layer axis
  theirs_axes: tuple[str, ...]  # HF's axes, each one or more letters, major first
  ours_axes: tuple[str, ...]  # our axes behind the layer, each one letter
  sizes: dict[str, int]  # of each letter

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape in the HF checkpoint."""
    return tuple(math.prod(self.sizes[letter] for letter in group) for group in self.theirs_axes)


def tensors(c: ModelConfig) -> dict[str, Tensor]:
  """Every tensor that a HF checkpoint of this model has, by its HF name."""
  found = {}
  for ours, row in weights.named_rows(decoder.table(c)):
    pattern, axes = NAMES[ours]
    theirs_axes, ours_axes = (tuple(side.split()) for side in axes.split(" -> "))
    stacked = "{}" in pattern
    sizes = dict(zip(ours_axes, row.shape[stacked:]))
    for layer in range(row.shape[0]) if stacked else (None,):
      found[pattern.format(layer)] = Tensor(ours, layer, theirs_axes, ours_axes, sizes)
  return found


def slices_of(tensor: Tensor, cuts: tuple[slice, ...]) -> tuple[slice, ...]:
  """What to read of the HF tensor to have the part `cuts` of ours.

  An axis that HF merged is cut at its major letter only; `to_ours` does the rest.
  """
  cut = dict(zip(tensor.ours_axes, cuts))
  slices = []
  for group in tensor.theirs_axes:
    inner = math.prod(tensor.sizes[letter] for letter in group[1:])
    slices.append(slice(cut[group[0]].start * inner, cut[group[0]].stop * inner))
  return tuple(slices)


def to_ours(x: np.ndarray, tensor: Tensor, cuts: tuple[slice, ...]) -> np.ndarray:
  """What `slices_of` read, laid out as our parameter (without its layer axis)."""
  cut = dict(zip(tensor.ours_axes, cuts))
  minor = {letter for group in tensor.theirs_axes for letter in group[1:]}
  letters = "".join(tensor.theirs_axes)
  shape = [tensor.sizes[i] if i in minor else cut[i].stop - cut[i].start for i in letters]
  x = x.reshape(shape).transpose([letters.index(letter) for letter in tensor.ours_axes])
  return x[tuple(cut[i] if i in minor else slice(None) for i in tensor.ours_axes)]


def to_theirs(x: np.ndarray, tensor: Tensor) -> np.ndarray:
  """Our parameter (without its layer axis) laid out as HF's tensor, contiguous."""
  order = [tensor.ours_axes.index(letter) for letter in "".join(tensor.theirs_axes)]
  return np.ascontiguousarray(x.transpose(order).reshape(tensor.shape))
