"""AdamW with parameter groups, warm-up + cosine; sharded as the layout says."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from pt_jax import weights
from pt_jax.weights import Params, Table


@dataclasses.dataclass(frozen=True)
class Group:
  """Parameters whose dotted name matches a regular expression, and how they differ."""

  pattern: str  # searched in names like "blocks.q" or "embed"
  lr_scale: float = 1.0  # multiplies the learning rate; 0 freezes
  weight_decay: float | None = None  # replaces the default


@dataclasses.dataclass(frozen=True)
class AdamW:
  """AdamW (arXiv 1711.05101) with linear warm-up and cosine decay; moments in float32.

  Weight decay applies to the matrices (rows of the table with `decay`), never to norms and biases.
  The first group that matches a parameter decides.
  """

  learning_rate: float
  steps: int  # length of the schedule
  warmup: int = 0  # steps from 0 up to learning_rate
  final_scale: float = 0.1  # learning rate at the end, as a share of the peak; 1 is constant
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0  # gradients with a larger global norm are scaled down to it
  groups: tuple[Group, ...] = ()

  def __post_init__(self):
    if not 0 <= self.warmup <= self.steps:
      raise ValueError(f"optimizer: warmup must be in 0..{self.steps} (steps), found {self.warmup}")
    if self.learning_rate <= 0 or self.clip_norm <= 0:
      raise ValueError(
        "optimizer: learning_rate and clip_norm must be positive, found "
        f"{self.learning_rate} and {self.clip_norm}"
      )

  def schedule(self, step: ArrayLike) -> jax.Array:
    """The learning rate of step 0, 1, ...; the first is already above 0."""
    step = jnp.asarray(step)
    rise = (step + 1) / max(self.warmup, 1)
    share = (step - self.warmup) / max(self.steps - self.warmup, 1)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
    return self.learning_rate * jnp.where(
      step < self.warmup, rise, self.final_scale + (1 - self.final_scale) * fall
    )

  def transform(self, table: Table) -> optax.GradientTransformation:
    """The optax transformation for parameters of this table. Its gradients are already clipped."""
    names = weights.named_rows(table)
    for group in self.groups:
      if not any(re.search(group.pattern, name) for name, _ in names):
        raise ValueError(f"optimizer: group pattern {group.pattern!r} matches no parameter")
    per_leaf = [self._leaf(name, row.decay) for name, row in names]

    def scale(updates: Params, state: Any, params: Params = None) -> tuple[Params, Any]:
      rate = -self.schedule(state.count)
      flat, tree = jax.tree.flatten(updates)
      flat = [
        rate * lr_scale * (u + decay * p.astype(jnp.float32)) if lr_scale else jnp.zeros_like(u)
        for u, p, (lr_scale, decay) in zip(flat, jax.tree.leaves(params), per_leaf)
      ]
      return tree.unflatten(flat), optax.ScaleByScheduleState(state.count + 1)

    count = lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
    adam = optax.scale_by_adam(self.b1, self.b2, self.epsilon, mu_dtype=jnp.float32)
    return optax.chain(adam, optax.GradientTransformation(count, scale))

  def _leaf(self, name: str, decay: bool) -> tuple[float, float]:
    for group in self.groups:
      if re.search(group.pattern, name):
        rate = self.weight_decay if group.weight_decay is None else group.weight_decay
        return group.lr_scale, rate * decay
    return 1.0, self.weight_decay * decay
