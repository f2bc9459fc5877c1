"""What a stage needs on a slice, by closed forms: no program is made. `launch.plan --sweep` orders
choices by it before it compiles the best, and tests compare it with what is compiled.

Letters as in `models.decoder`; t tokens of a microbatch on a device, A microbatches, z parts of the
`data` axis, x parts of `tensor`, b bytes of the compute dtype.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax

from pt_jax import sharding
from pt_jax.experiment import Experiment, Online, Preference, Stage, Supervised
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig, Remat
from pt_jax.parts import Critic
from pt_jax.plan import estimate
from pt_jax.plan.collectives import traffic
from pt_jax.plan.cost import Cost
from pt_jax.plan.engine import PAGES, WEIGHTS, Round, round_of
from pt_jax.plan.estimate import BYTES
from pt_jax.plan.memory import TEMPORARIES
from pt_jax.plan.stage import Work, model_of, scores_of, work_of
from pt_jax.plan.topology import Slice, axis_bandwidth
from pt_jax.rollout.engine import CHUNK, LAUNCH


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Of one device."""

  parts: Mapping[str, int]  # name -> bytes, together the peak of the train step
  seconds: Mapping[str, float]  # program -> seconds in an update, or in a step of an online stage
  binding: Mapping[str, float]  # resource -> seconds of the train step at its peak

  @property
  def total(self) -> int:
    """Bytes of all parts."""
    return sum(self.parts.values())

  @property
  def time(self) -> float:
    """Seconds of all programs."""
    return sum(self.seconds.values())


def forecast(
  experiment: Experiment, stage: Stage, piece: Slice, mesh: jax.sharding.Mesh
) -> Forecast:
  """Memory and time of a stage; `experiment` and `stage` as `choices.applied` leaves them.

  Raises ValueError for a stage that a plan does not know.
  """
  model = _Model(model_of(experiment), work_of(stage), piece, mesh, experiment.zero)
  parts = model.resident(stage)
  parts[TEMPORARIES] = model.temporaries()
  binding = model.train()
  calls = stage.epochs * stage.minibatches if isinstance(stage, Online) else 1
  # The engine is beside the train step in time, and what collectives hide is not known here.
  seconds = {"train step": calls * (max(binding["compute"], binding["HBM"]) + binding["ICI"])}
  if isinstance(stage, Online):
    seconds |= model.scores(stage) | model.engine(round_of(model.config, stage, mesh.shape))
  return Forecast(parts, seconds, binding)


def kept(c: ModelConfig, remat: Remat, tensor: int) -> float:
  """Bytes that a block keeps of a token for its backward pass, on a device; see `models.remat`.

  D and H K, (H + 2 G) K, 2 F of what `tensor` splits; without rematerialisation also what norms
  compute in float32, five times D, and the gated product, F.
  """
  item = BYTES[c.compute_dtype]
  attention = c.heads * c.head_dim * item + 4 * c.heads
  heads = (c.heads + 2 * c.kv_heads) * c.head_dim * item
  steps = {"attention": attention, "heads": heads, "projections": 2 * c.hidden * item}
  split, order = 0.0, [*steps]
  if remat in ("none", *order):
    last = len(order) if remat == "none" else order.index(remat) + 1
    split = sum(steps[name] for name in order[:last]) + (remat == "none") * c.hidden * item
  whole = c.width * ({"offload": 0}.get(remat, item) + (remat == "none") * 5 * BYTES["float32"])
  return whole + split / tensor


def again(c: ModelConfig, remat: Remat, length: int) -> float:
  """FLOPs of a token and a block that its backward pass computes once more: products whose results
  are not kept, and attention, 2 S H K."""
  o = c.width * c.heads * c.head_dim
  mlp = 2 * c.width * c.hidden
  qkv = c.width * (c.heads + 2 * c.kv_heads) * c.head_dim
  attention = 2.0 * length * c.heads * c.head_dim
  found = {"none": 0.0, "projections": 2.0 * o, "heads": 2.0 * (o + mlp)}
  found["attention"] = found["heads"] + 2.0 * qkv
  return found.get(remat, found["attention"] + attention)


@dataclasses.dataclass(frozen=True)
class _Model:
  """A model whose rows are computed on a mesh."""

  config: ModelConfig
  work: Work
  piece: Slice
  mesh: jax.sharding.Mesh
  zero: int

  @property
  def tensor(self) -> int:
    return self.mesh.shape["tensor"]

  @property
  def tokens(self) -> float:
    """t."""
    sizes = self.mesh.shape
    parts = sizes["data"] * sizes["expert"] * sizes["context"]
    return self.work.rows * self.work.length / parts

  def held(self, rules: sharding.Rules, item: int) -> int:
    return estimate.held_bytes(decoder.table(self.config), rules, self.mesh, item)

  def resident(self, stage: Stage) -> dict[str, int]:
    """What is in memory during the train step, by role: policy, reference, critic, rollout."""
    layout = sharding.zero(self.zero)
    params = self.held(layout.params, BYTES[self.config.param_dtype])
    trained = {
      "parameters": params,
      "optimizer": self.held(layout.optimizer, estimate.ADAM),
      "gradients": self.held(layout.grads, estimate.GRADIENT),
    }
    parts = dict(trained)
    if _has_reference(stage):
      parts["reference"] = params
    if isinstance(stage, Online):
      if isinstance(stage.critic, Critic):
        parts["critic"] = sum(trained.values())
      if stage.reward_model is not None:
        parts["reward model"] = stage.reward_model.members * params
      work = round_of(self.config, stage, self.mesh.shape)
      parts[WEIGHTS] = self.held(sharding.USE, BYTES[self.config.compute_dtype])
      parts[PAGES] = estimate.pages_bytes(
        self.config, (work.shapes.pages + 1) * work.shapes.rows, self.tensor
      )
    return parts

  def temporaries(self) -> int:
    """t L `kept`; the widths of one block, whose backward pass runs; the gathered weights of two
    blocks and the gradients of one, or where they are stored whole, all gradients of a microbatch
    and of those before; the output matrix with its gradient, and that of the embedding."""
    c, item, x = self.config, BYTES[self.config.compute_dtype], self.tensor
    blocks = self.tokens * c.layers * kept(c, c.remat, x)
    one = 4 * c.width + ((c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.hidden) / x
    gathered = 3 * self._block() * item
    if self.zero < 3:
      gathered = 2 * self.held(sharding.USE, estimate.GRADIENT)
    vocabulary = self._vocabulary() * (2 * item + estimate.GRADIENT)
    return int(blocks + self.tokens * one * item + gathered + vocabulary)

  def _block(self) -> float:
    """Parameters of a block where it is used."""
    c = self.config
    return (estimate.multiplied(c) - c.vocab_size * c.width) / c.layers / self.tensor

  def _vocabulary(self) -> int:
    """Elements of the output matrix where it is used."""
    return self.config.vocab_size * self.config.width // self.tensor

  def train(self) -> dict[str, float]:
    """Seconds of each resource, each at its published peak."""
    c, chip, count = self.config, self.piece.chip, self.work.microbatches
    forward = estimate.forward_flops(c, self.work.length)
    repeated = c.layers * again(c, c.remat, self.work.length)
    flops = count * self.tokens * (3 * forward + repeated) / self.tensor
    return {
      "compute": flops / (chip.bf16_flops * chip.device_share),
      "HBM": count * self._moved() / (chip.hbm_bandwidth * chip.device_share),
      "ICI": count * self._sent() + self._sent_once(),
    }

  def _moved(self) -> float:
    """Bytes of a microbatch: weights three times and their gradients; kept values, and about ten
    passes over the widths of a block forward and twenty backward."""
    c, item = self.config, BYTES[self.config.compute_dtype]
    weights = (self._block() * c.layers + self._vocabulary()) * (3 * item + 2 * estimate.GRADIENT)
    widths = 2 * c.width + ((c.heads + c.kv_heads) * c.head_dim + 1.5 * c.hidden) / self.tensor
    again_ = 1 if c.remat in ("none", "projections") else 1.5
    return weights + self.tokens * c.layers * item * widths * 10 * again_

  def _sent(self) -> float:
    """Seconds of a microbatch's collectives, on a ring each.

    data: blocks are gathered forward and backward where ZeRO 3 splits them, and gradients are
    scattered, or summed under ZeRO 1; over a whole slice all of these become all-reduces (see
    docs/results.md); expert: gradients are summed; tensor: sums of [t, D], two forward, two
    backward, and what is computed again; context: keys and values are gathered, and their
    gradients scattered.
    """
    c, sizes, item = self.config, self.mesh.shape, BYTES[self.config.compute_dtype]
    params = (self._block() * c.layers + self._vocabulary()) * item
    half = lambda axis: traffic("all-gather", sizes[axis])
    total = 0.0
    if sizes["data"] > 1:
      times = {1: 2, 2: 1, 3: 3}[self.zero] * (2 if sizes["data"] == self.mesh.size else 1)
      total += times * params * half("data") / self._bandwidth("data")
    if sizes["expert"] > 1:
      grads = params / (sizes["data"] if self.zero > 1 else 1)
      total += 2 * grads * half("expert") / self._bandwidth("expert")
    if sizes["tensor"] > 1:
      sums = 4 + (c.remat not in ("none", "projections"))
      moved = sums * c.layers * self.tokens * c.width * item * 2 * half("tensor")
      total += moved / self._bandwidth("tensor")
    if sizes["context"] > 1:
      keys = 2 * c.kv_heads * c.head_dim / self.tensor * item
      row = self.tokens * sizes["context"] * c.layers * keys
      times = 2 + (c.remat not in ("none", "projections", "heads"))
      total += times * row * half("context") / self._bandwidth("context")
    return total

  def _sent_once(self) -> float:
    """Seconds of gathering new parameters after an update, where they are stored whole."""
    if self.zero == 3 or self.mesh.shape["data"] == 1:
      return 0.0
    whole = self.held(sharding.USE, BYTES[self.config.param_dtype])
    return whole * traffic("all-gather", self.mesh.shape["data"]) / self._bandwidth("data")

  def _bandwidth(self, axis: str) -> float:
    return axis_bandwidth(self.piece, self.mesh, (axis,))

  def scores(self, stage: Online) -> dict[str, float]:
    """Forward passes of a step that score its rows."""
    calls = scores_of(stage) * stage.minibatches
    flops = (
      self.work.microbatches * self.tokens * estimate.forward_flops(self.config, self.work.length)
    )
    chip = self.piece.chip
    peak = chip.bf16_flops * chip.device_share * self.tensor
    return {"score": calls * flops / peak} if calls else {}

  def engine(self, work: Round) -> dict[str, float]:
    """Prefill and decode of a step, bound by HBM or compute, the sums over `tensor` behind; and
    the gathering of weights."""
    c, x, slots = self.config, self.tensor, work.shapes.slots
    item, bandwidth = BYTES[c.compute_dtype], self._bandwidth("tensor") if x > 1 else math.inf
    weights = self.held(sharding.USE, item)
    summed = lambda tokens: 2 * c.layers * tokens * c.width * item * traffic("all-reduce", x)
    step = self._bound(
      estimate.decode_attention(c, slots, work.cached, x),
      Cost(2.0 * slots * estimate.multiplied(c) / x, weights),
    )
    chunk = self._bound(
      estimate.prefill_attention(c, CHUNK, work.prompt, x),
      Cost(CHUNK * 2.0 * (estimate.multiplied(c) - c.vocab_size * c.width) / x, weights),
    )
    found = {
      "decode": work.launches * LAUNCH * (step + summed(slots) / bandwidth),
      "prefill": work.chunks * (chunk + summed(CHUNK) / bandwidth),
    }
    if self.zero == 3 and self.mesh.shape["data"] > 1:
      share = traffic("all-gather", self.mesh.shape["data"])
      found["weights to the engine"] = weights * share / self._bandwidth("data")
    return found

  def _bound(self, attention: Cost, matrices: Cost) -> float:
    """Seconds of all layers' attention and of the products."""
    chip, layers = self.piece.chip, self.config.layers
    flops = layers * attention.flops + matrices.flops
    moved = layers * attention.bytes + matrices.bytes
    return max(flops / chip.bf16_flops, moved / chip.hbm_bandwidth) / chip.device_share


def _has_reference(stage: Stage) -> bool:
  """Whether a copy of the parameters stays in memory to be compared with."""
  if isinstance(stage, Preference):
    return stage.objective.reference and stage.reference == "online"
  if isinstance(stage, Supervised):
    return stage.objective.needs_reference or bool(stage.objective.refresh_every)
  return isinstance(stage, Online) and stage.objective.kl is not None
