"""Rematerialisation: what a block keeps for its backward pass, and what is computed again.

In the order of what they keep, for a token and a block (widths as in `models.decoder`):

  offload      D on the host: the input of the block goes there and comes back
  block        D: the input of the block; all else is computed again
  attention    and H K + H: the output of attention, which is then not computed again
  heads        and (H + 2 G) K: queries, keys and values as attention reads them
  projections  and 2 F: both inputs of SwiGLU, so that no product is computed again
  none         everything that autodiff keeps, elementwise results included
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels.flash_attention.reference import REMEMBERED as ATTENTION
from pt_jax.models.config import Remat

# The names of values in a block; the kernel names what it keeps itself.
BLOCK_INPUT, HEADS, MLP = "block_input", "heads", "mlp"
KEPT: dict[str, tuple[str, ...]] = {
  "block": (),
  "attention": (ATTENTION,),
  "heads": (ATTENTION, HEADS),
  "projections": (ATTENTION, HEADS, MLP),
}


def remember(layer: Callable[..., Any], remat: Remat, *, prevent_cse: bool) -> Callable[..., Any]:
  """`layer`, which keeps what `remat` says for its backward pass.

  Args:
    layer: (x, weights) -> (x, anything); its values have the names above.
    remat: see the top of the file.
    prevent_cse: needed where layers are not scanned, or XLA merges both computations again.
  """
  if remat == "none":
    return layer
  if remat == "offload":
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[BLOCK_INPUT],
      offload_src="device",
      offload_dst="pinned_host",
    )
    named = lambda x, w: layer(checkpoint_name(x, BLOCK_INPUT), w)
    return jax.checkpoint(named, policy=policy, prevent_cse=prevent_cse)
  policy = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
  return jax.checkpoint(layer, policy=policy, prevent_cse=prevent_cse)


def named(name: str, *values: jax.Array) -> list[jax.Array]:
  """The values, under a name that a policy knows them by."""
  return [checkpoint_name(x, name) for x in values]
