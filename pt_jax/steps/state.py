"""`TrainState`, gradient accumulation and the one update that every step ends with.

The rules of a `Layout` say where parameters, gradients and optimizer state live; the code is the
same for every ZeRO stage and every mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from pt_jax import weights
from pt_jax.losses.reduce import Sum
from pt_jax.sharding import Layout
from pt_jax.steps.optimizer import AdamW
from pt_jax.weights import Params, Table


@flax.struct.dataclass
class TrainState:
  """Everything that an update reads and writes."""

  step: jax.Array  # [] int32, updates done
  params: Params  # where layout.params says
  optimizer: optax.OptState  # where layout.optimizer says


@flax.struct.dataclass
class Max:
  """A metric that accumulates as the largest value, not as a mean."""

  value: jax.Array  # [] >= 0

  def __add__(self, other: "Max") -> "Max":
    return Max(jnp.maximum(self.value, other.value))

  def mean(self) -> jax.Array:
    """The largest value seen."""
    return self.value


class Creator(Protocol):
  """What makes a state, a pytree with `params` that a checkpoint can hold."""

  def create(self, params: Params) -> Any:
    """The state before the first update."""
    ...


class Updater(NamedTuple):
  """What turns accumulated gradients into a new state. Static: closed over by a jitted step."""

  optimizer: AdamW
  table: Table
  layout: Layout

  def create(self, params: Params) -> TrainState:
    """The state before the first update. `params` may live anywhere."""
    transform = self.optimizer.transform(self.table)
    moments = transform.init(
      jax.tree.map(
        lambda w: w.astype(jnp.float32),
        weights.reshard(params, self.table, self.layout.optimizer),
      )
    )
    params = weights.reshard(params, self.table, self.layout.params)
    return TrainState(jnp.zeros((), jnp.int32), params, moments)

  def apply(
    self, state: TrainState, grads: Params, weight: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Divides summed gradients by the global weight, once, clips them, and updates.

    Args:
      state: the state before.
      grads: sums over all microbatches, float32.
      weight: [] what the objective is averaged over; 0 where nothing was trained, and the gradients
        are 0 then.
    """
    to_optimizer = lambda tree: weights.reshard(tree, self.table, self.layout.optimizer)
    weight = jnp.where(weight == 0, 1, weight)
    grads = jax.tree.map(lambda g: g / weight, to_optimizer(grads))
    norm = optax.global_norm(grads)
    clip = jnp.minimum(1.0, self.optimizer.clip_norm / (norm + 1e-9))
    grads = jax.tree.map(lambda g: g * clip, grads)
    params = to_optimizer(state.params)
    transform = self.optimizer.transform(self.table)
    updates, moments = transform.update(grads, state.optimizer, params)
    params = jax.tree.map(lambda w, u: (w.astype(jnp.float32) + u).astype(w.dtype), params, updates)
    params = weights.reshard(params, self.table, self.layout.params)
    metrics = {
      "optimizer/grad_norm": norm,
      "optimizer/update_norm": optax.global_norm(updates),
      "optimizer/learning_rate": self.optimizer.schedule(state.step),
    }
    return TrainState(state.step + 1, params, moments), metrics

  def accumulate(
    self,
    loss: Callable[[Params, Any], tuple[Sum, Any]],
    params: Params,
    batch: Any,
    count: jax.Array | int | None = None,
  ) -> tuple[Params, Sum, Any]:
    """Sums gradients, objective and metrics over microbatches (the leading axis of every leaf).

    Args:
      loss: (params, microbatch) -> (Sum of the objective, metrics whose `+` accumulates).
      params: differentiated.
      batch: pytree with leaves [A, ...].
      count: microbatches to compute, from the first, at least 1 (default: A). It may be traced, so
        that one program serves batches that are filled to a different degree.

    Returns:
      (gradients of the total in float32 where layout.grads says, the Sum, the metrics).
    """

    def one(part: Any) -> tuple[Params, Sum, Any]:
      def total(params: Params) -> tuple[jax.Array, Any]:
        value, metrics = loss(params, part)
        return value.total, (value, metrics)

      grads, (value, metrics) = jax.grad(total, has_aux=True)(params)
      grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
      return weights.reshard(grads, self.table, self.layout.grads), value, metrics

    def add(a: Any, b: Any) -> tuple[Params, Sum, Any]:
      summed = lambda x: isinstance(x, Sum | Max)
      return (
        jax.tree.map(jnp.add, a[0], b[0]),
        a[1] + b[1],
        jax.tree.map(lambda x, y: x + y, a[2], b[2], is_leaf=summed),
      )

    size = jax.tree.leaves(batch)[0].shape[0]
    if size == 1:
      return one(microbatch(batch, 0))
    shapes = jax.eval_shape(one, microbatch(batch, 0))
    nothing = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding.spec), shapes
    )
    step = lambda i, seen: add(seen, one(microbatch(batch, i)))
    return jax.lax.fori_loop(0, size if count is None else count, step, nothing)


def microbatch(batch: Any, i: ArrayLike) -> Any:
  """Microbatch i of a batch with leaves [A, ...]."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)


def filled(batch: Any) -> jax.Array:
  """[] int32, microbatches of packed rows [A, B, S] up to the last one that holds a token."""
  held = (batch.segment_ids >= 0).any((1, 2))
  return jnp.max(jnp.where(held, jnp.arange(1, len(held) + 1), 0))


def means(metrics: dict[str, Sum | Max]) -> dict[str, jax.Array]:
  """The value of every accumulated metric."""
  return {name: value.mean() for name, value in metrics.items()}
