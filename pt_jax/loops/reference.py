"""Log-probs under the reference, computed once and kept on disk by what they were computed from.

`FOLDER/<hash of the reference parameters>/*.npz` holds the log-probs of many completions, each
under the hash of its tokens and mask. Other parameters have another folder and a changed row
another hash, so neither is ever given what is not its own.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pt_jax.data import pipeline
from pt_jax.data.batch import ComparisonBatch
from pt_jax.data.groups import Group
from pt_jax.data.packing import Example
from pt_jax.data.pipeline import Layout
from pt_jax.data.sources import Concatenated
from pt_jax.experiment import ComparisonData
from pt_jax.loops.batches import data_host, global_batch
from pt_jax.weights import Params

SHARD = 4096  # completions in one file

Logprobs = Mapping[bytes, np.ndarray]  # hash of a completion -> [n] float32


def params_hash(params: Params) -> str:
  """Hash of names, dtypes and values; the same on every mesh."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    value = np.asarray(jax.device_get(jax.reshard(leaf, jax.P())))  # on a pod a part is elsewhere
    digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()


def completion_hash(completion: Example) -> bytes:
  """Hash of the tokens and of which of them are in the mask, the first one never."""
  tokens = np.asarray(completion.tokens, np.int32)
  mask = np.asarray(completion.mask, np.float32).copy()
  mask[:1] = 0
  return hashlib.sha256(tokens.tobytes() + mask.tobytes()).digest()


def with_references(data: ComparisonData, known: Logprobs) -> ComparisonData:
  """The data, each completion with its log-probs under the reference."""

  def encode(row: Mapping[str, Any]) -> Group:
    group = data.encode(row)
    keys = [completion_hash(completion) for completion in group.completions]
    if not known.keys() >= set(keys):
      raise ValueError("the row is encoded otherwise than when its reference log-probs were cached")
    return group._replace(references=tuple(known[key] for key in keys))

  return dataclasses.replace(data, encode=encode)


def cached(
  data: ComparisonData,
  layout: Layout,
  score: Callable[[Any], jax.Array],
  folder: Path,
  mesh: jax.sharding.Mesh,
) -> dict[bytes, np.ndarray]:
  """The log-probs of all completions, train and held out; computes and saves those not in `folder`.

  Args:
    data: of the stage.
    layout: rows of one scoring pass and their length.
    score: batch with leaves [B, S] -> [B, S] float32 log-probs, 0 outside the mask.
    folder: of these reference parameters.
    mesh: where `score` runs.
  """
  known = _read(folder)
  fresh: dict[bytes, np.ndarray] = {}
  sources = Concatenated([*data.train.sources.values(), data.held_out])
  share = data_host(mesh).rows(layout.batch_size)
  for batch in pipeline.eval_batches(sources, data.encode, layout, form=data.form):
    places = [(b, at, key) for b, at, key in _completions(batch) if key not in known]
    if not places:
      continue
    mine = jax.tree.map(lambda x: x[share], batch)
    scores = np.asarray(jax.device_get(_replicated(score(global_batch(mine, mesh)))))
    fresh |= {key: scores[b, at] for b, at, key in places}
    if len(fresh) >= SHARD:
      _write(folder, fresh)
      known, fresh = known | fresh, {}
  if fresh:
    _write(folder, fresh)
  return known | fresh


def _completions(batch: ComparisonBatch) -> list[tuple[int, slice, bytes]]:
  """Row, positions and hash of every completion of a packed NumPy batch."""
  ids = np.asarray(batch.segment_ids)
  found: list[tuple[int, slice, bytes]] = []
  for b, row in enumerate(ids):
    starts = np.flatnonzero(np.diff(row, prepend=-1) > 0)
    stops = np.append(starts[1:], (row >= 0).sum())
    for start, stop in zip(starts.tolist(), stops.tolist()):
      at = slice(start, stop)
      completion = Example(np.asarray(batch.tokens[b, at]), np.asarray(batch.mask[b, at]))
      found.append((b, at, completion_hash(completion)))
  return found


_replicated = jax.jit(lambda x: jax.reshard(x, jax.P()))


def _read(folder: Path) -> dict[bytes, np.ndarray]:
  known: dict[bytes, np.ndarray] = {}
  for path in sorted(folder.glob("*.npz")):
    with np.load(path) as saved:
      parts = np.split(saved["logprobs"], np.cumsum(saved["lengths"])[:-1])
      known |= dict(zip((key.tobytes() for key in saved["keys"]), parts))
  return known


def _write(folder: Path, logprobs: Logprobs) -> None:
  """One more file, which appears under its name when it is complete."""
  if jax.process_index() != 0:
    return
  folder.mkdir(parents=True, exist_ok=True)
  number = len(list(folder.glob("*.npz")))
  half_written = folder / f"{number:05d}.tmp"
  with half_written.open("wb") as file:
    np.savez(
      file,
      keys=np.array([np.frombuffer(key, np.uint8) for key in logprobs]),
      lengths=np.array([len(values) for values in logprobs.values()]),
      logprobs=np.concatenate([*logprobs.values()]).astype(np.float32),
    )
  os.replace(half_written, folder / f"{number:05d}.npz")
