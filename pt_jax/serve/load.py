"""From a folder to a model that can be served: what a run left, or a checkpoint in HF format."""

import dataclasses
import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pt_jax import checkpoint, sharding, weights
from pt_jax.data.chat_templates import ChatTemplate, load_template
from pt_jax.data.masks import stop_tokens
from pt_jax.data.tokenizers import Tokenizer, load_tokenizer
from pt_jax.models import decoder, hf
from pt_jax.models.config import Llama3Rope, ModelConfig
from pt_jax.serve.served import Served
from pt_jax.weights import Params

CONFIG, PARAMS = "config.json", "params"
TRUSTED = ("pt_jax.", "experiments.")  # where functions that a run's config names may live


@dataclasses.dataclass(frozen=True)
class Source:
  """A model that is found, and not loaded."""

  config: ModelConfig
  tokenizer: Tokenizer
  template: ChatTemplate | None
  params: Callable[[jax.sharding.Mesh], Params]  # reads the weights to where they are used

  def served(self, name: str, max_length: int, *, scores: bool) -> Served:
    """What clients see of it. Raises ValueError where nothing could end an answer."""
    ends = (self.tokenizer.eos_id,) if self.tokenizer.eos_id is not None else ()
    if self.template is not None:
      ends = stop_tokens(self.tokenizer, self.template)
    if not ends:
      raise ValueError(
        f"tokenizer {self.tokenizer.name}: expected an end of text or a chat template, found "
        "neither: an answer could not end"
      )
    if not 1 < max_length <= self.config.max_length:
      raise ValueError(
        f"max_length: expected 2 to {self.config.max_length}, the model's, found {max_length}"
      )
    return Served(
      name=name,
      tokenizer=self.tokenizer,
      template=self.template,
      vocab_size=self.config.vocab_size,
      max_length=max_length,
      stop_tokens=tuple(ends),
      created=int(time.time()),
      scores=scores,
    )


def find(folder: Path, *, tokenizer: str | None = None, template: str | None = None) -> Source:
  """Finds what `folder` has: RUN/params/STAGE, a RUN (its last policy), or a HF checkpoint.

  Args:
    folder: where it is.
    tokenizer: in place of the run's or the checkpoint's own, see `load_tokenizer`.
    template: in place of the run's or the tokenizer's own, see `load_template`.

  Raises ValueError, naming the folder, where there is no such thing.
  """
  run = folder.parent.parent if folder.parent.name == PARAMS else folder
  record = _read(run / CONFIG)
  if "model_type" in record:
    return _checkpoint(folder, tokenizer, template)
  if "config" not in record:
    raise ValueError(f"{folder}: expected RUN/{PARAMS}/STAGE, a run or a HF checkpoint")
  return _run(folder, run, record["config"], tokenizer, template)


def _checkpoint(folder: Path, tokenizer: str | None, template: str | None) -> Source:
  config = hf.read_config(folder)
  made = load_tokenizer(tokenizer or folder)
  if template is None and made.chat_template is not None:
    template = "tokenizer"
  chat = None if template is None else load_template(template, tokenizer=made)
  return Source(config, made, chat, lambda mesh: hf.load(folder, config, mesh, sharding.USE))


def _run(
  folder: Path, run: Path, record: Mapping[str, Any], tokenizer: str | None, template: str | None
) -> Source:
  stage = folder if folder != run else run / PARAMS / _last_policy(run, record)
  if not stage.is_dir():
    raise ValueError(f"{stage}: no such stage of this run, or it is not finished")
  config = _config(record, run)
  made = load_tokenizer(tokenizer) if tokenizer else _call(record["tokenizer"], run)
  template = template or next(_values(record["stages"], "template"), None)
  chat = None if template is None else load_template(template, tokenizer=made)

  def params(mesh: jax.sharding.Mesh) -> Params:
    dtype = np.dtype(config.param_dtype)
    like = weights.abstract(decoder.table(config), sharding.USE, mesh, dtype)
    return checkpoint.restore_params(stage, like)

  return Source(config, made, chat, params)


def _last_policy(run: Path, record: Mapping[str, Any]) -> str:
  """The last finished stage that leaves a policy; reward models, which have members, leave none."""
  names = [stage["name"] for stage in record["stages"] if "members" not in stage]
  done = [name for name in names if (run / PARAMS / name).is_dir()]
  if not done:
    raise ValueError(f"{run}: expected a finished stage among {', '.join(names)}, found none")
  return done[-1]


def _config(record: Mapping[str, Any], run: Path) -> ModelConfig:
  if record["model"] is None:
    return hf.read_config(record["checkpoint"])
  fields = dict(record["model"])
  if fields.get("rope_scaling"):
    fields["rope_scaling"] = Llama3Rope(**fields["rope_scaling"])
  try:
    return ModelConfig(**fields)
  except TypeError as error:
    raise ValueError(f"{run / CONFIG}: model: {error}") from error


def _call(function: Any, run: Path) -> Any:
  """Calls the function that a config names, with the arguments beside it."""
  given = dict(function) if isinstance(function, Mapping) else {"function": function}
  name, arguments = given.pop("function"), given.pop("args", [])
  if not isinstance(name, str) or not name.startswith(TRUSTED):
    raise ValueError(
      f"{run / CONFIG}: tokenizer: expected a function of {' or '.join(TRUSTED)}, found {name!r}; "
      "name a tokenizer"
    )
  module, _, attribute = name.rpartition(".")
  return getattr(importlib.import_module(module), attribute)(*arguments, **given)


def _values(tree: Any, name: str) -> Iterator[str]:
  """Strings under `name` anywhere in a tree of JSON."""
  items = tree.items() if isinstance(tree, Mapping) else ()
  for key, value in items:
    if key == name and isinstance(value, str):
      yield value
  for value in tree.values() if isinstance(tree, Mapping) else tree:
    if isinstance(value, Mapping | list):
      yield from _values(value, name)


def _read(path: Path) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(f"{path}: no such file")
  try:
    value = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error})") from error
  return value if isinstance(value, dict) else {}
