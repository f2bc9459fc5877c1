"""From a process's share of a NumPy batch to the global batch on the mesh."""

import jax
import numpy as np

from pt_jax import sharding
from pt_jax.data import pipeline
from pt_jax.data.pipeline import Host, Tree


def data_host(mesh: jax.sharding.Mesh) -> Host:
  """The share of every batch that this process must bring: the rows of its own devices.

  Raises ValueError when those are not one aligned block of the batch axes.
  """
  parts = mesh.shape["data"] * mesh.shape["expert"]
  mine = [d.process_index == jax.process_index() for d in mesh.devices.flat]
  axes = [mesh.axis_names.index(name) for name in ("data", "expert")]
  places = np.argwhere(np.reshape(mine, mesh.devices.shape))[:, axes]
  rows = sorted({int(d * mesh.shape["expert"] + e) for d, e in places})
  count = len(rows)
  if parts % count or rows[0] % count or rows[-1] - rows[0] != count - 1:
    raise ValueError(f"mesh: this process holds parts {rows} of {parts} of the batch, not a block")
  return Host(rows[0] // count, parts // count)


def global_batch(batch: Tree, mesh: jax.sharding.Mesh, leading: int = 0) -> Tree:
  """This process's rows [..., B / hosts, S], behind `leading` axes, as part of the global batch."""
  where = jax.NamedSharding(mesh, sharding.batch_spec(leading))
  hosts = data_host(mesh).count

  def place(x: np.ndarray) -> jax.Array:
    shape = (*x.shape[:leading], x.shape[leading] * hosts, x.shape[-1])
    return jax.make_array_from_process_local_data(where, np.asarray(x), shape)

  return jax.tree.map(place, batch)


def device_batch(batch: Tree, microbatches: int, mesh: jax.sharding.Mesh) -> Tree:
  """This process's rows [B / hosts, S] as part of the global [A, B / A, S]."""
  return global_batch(pipeline.microbatches(batch, microbatches), mesh, leading=1)
