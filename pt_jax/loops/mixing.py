"""Pairs that an online stage trains on beside its own completions."""

from typing import Any

import jax

from pt_jax.data import pipeline
from pt_jax.data.batch import ComparisonBatch
from pt_jax.experiment import Mix
from pt_jax.loops import preference
from pt_jax.loops.batches import data_host, device_batch
from pt_jax.loops.context import Context


class MixedPairs:
  """An endless stream of batches of pairs, with their log-probs under the starting policy."""

  def __init__(self, mix: Mix, context: Context):
    self._mix, self._context = mix, context
    data = preference.checked(mix.data(context.tokenizer))
    batches = pipeline.train_batches(
      data.train, data.encode, mix.layout, host=data_host(context.mesh), form=data.form
    )
    self._batches = iter(batches)
    self._score = preference.compiled_microbatch_scores(context.config)

  def take(self) -> ComparisonBatch:
    """The next batch, on the mesh, as [1, B, S]."""
    batch = device_batch(next(self._batches), 1, self._context.mesh)
    if not self._mix.objective.reference:
      return batch
    scores: jax.Array = self._score(self._context.params, batch)
    return batch.replace(reference_logprobs=scores)

  def state(self) -> dict[str, Any]:
    """Where the next batch starts, JSON-able."""
    return self._batches.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from a former `state()`."""
    self._batches.set_state(state)
