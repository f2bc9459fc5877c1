"""The page that a plan prints."""

from collections.abc import Sequence

from pt_jax.experiment import Online
from pt_jax.plan import engine, estimate
from pt_jax.plan.compile import Plan
from pt_jax.plan.measure import Analysis, Measured
from pt_jax.plan.roofline import Roofline
from pt_jax.plan.schedule import schedule_of
from pt_jax.plan.stage import model_of, work_of

GIB = 1 << 30
SMALL = 1 << 20  # bytes each way: collectives of less are told together


def page(plan: Plan) -> str:
  """All of a plan as text."""
  lines = [*_head(plan), *(line for one in plan.programs for line in _program(one, plan))]
  return "\n".join([*lines, *_round(plan)])


def _head(plan: Plan) -> list[str]:
  config, work, chip = model_of(plan.experiment), work_of(plan.stage), plan.piece.chip
  mesh = " ".join(f"{name}={size}" for name, size in (plan.choice.mesh or {}).items())
  host = " (what goes to the host and back is in no time below)" * (config.remat == "offload")
  lines = [
    f"{plan.experiment.name}, stage {plan.stage.name}, on {plan.piece.name} "
    f"({plan.piece.chips} chips): {'fits' if plan.fits else 'DOES NOT FIT'}",
    f"  model     {estimate.parameters(config) / 1e9:.2f} B parameters in {config.param_dtype}, "
    f"computes in {config.compute_dtype}, remat {config.remat}{host}",
    f"  mesh      {mesh}; ZeRO {plan.experiment.zero}",
    f"  update    {work.microbatches} x {work.rows} rows x {work.length} tokens = "
    f"{work.tokens:,} tokens, {work.tokens // plan.piece.chips:,} a chip",
    f"  a chip    {chip.bf16_flops / 1e12:.0f} TFLOP/s bfloat16, {chip.usable_hbm / GIB:.2f} GiB "
    f"usable HBM a device at {chip.hbm_bandwidth / 1e9:.0f} GB/s",
  ]
  return lines + _engine(plan)


def _engine(plan: Plan) -> list[str]:
  if not isinstance(plan.stage, Online):
    return []
  config, sizes = model_of(plan.experiment), {"data": 1, "expert": 1} | dict(plan.choice.mesh or {})
  work = engine.round_of(config, plan.stage, sizes)
  shapes, token = work.shapes, estimate.cache_bytes(config, 1)
  return [
    f"  engine    {plan.stage.slots:,} slots; prompts of {work.prompt:,} tokens, completions of "
    f"{work.completion:,}; {shapes.parts} x {shapes.pages:,} pages of {shapes.rows} tokens",
    f"            a token of the cache: 2 x {config.layers} layers x {config.kv_heads} heads x "
    f"{config.head_dim} x {estimate.BYTES[config.compute_dtype]} bytes = {token / 1024:.0f} KiB "
    f"over tensor={sizes.get('tensor', 1)}",
  ]


def _program(one: Measured, plan: Plan) -> list[str]:
  note = f"; {one.program.note}" if one.program.note else ""
  if one.depths:
    note = f" with {' and '.join(map(str, one.depths))} layers, and extrapolated{note}"
  lines = ["", f"{one.program.name} (compiled in {one.seconds:.0f} s{note})", *_memory(one)]
  if one.xla is None:
    return lines
  kernels = _kernels(one.xla, plan.piece.chip.name, one.program.kind)
  return [*lines, *_collectives(one.xla), *kernels, *_time(one, one.xla, plan)]


def _memory(one: Measured) -> list[str]:
  memory = one.memory
  verdict = "fits" if memory.fits else "does not fit"
  if not memory.compiled:
    verdict += ": libtpu refuses it"
  rows = [(name, gib(size)) for name, size in memory.parts.items()]
  rows.append(("total", f"{gib(memory.total)} of {memory.usable / GIB:.2f}: {verdict}"))
  return ["  HBM of a device, GiB", *columns(rows)]


def _collectives(xla: Analysis) -> list[str]:
  head = ("kind", "axis", "dtype", "runs", "GiB", "GiB each way", "beside other work")
  rows = [
    (
      c.kind,
      ",".join(c.axes) or "-",
      c.dtype,
      f"{c.runs:.0f}",
      gib(c.bytes),
      gib(c.moved),
      f"{c.beside / c.bytes:.0%}" if c.bytes else "-",
    )
    for c in xla.collectives
    if c.moved > SMALL
  ]
  small = [c.moved for c in xla.collectives if c.moved <= SMALL]
  if small:
    rows.append(("others", "", "", str(len(small)), "", gib(sum(small)), ""))
  return ["  collectives of a device, one call", *columns([head, *rows])] if rows else []


def _kernels(xla: Analysis, chip: str, kind: str) -> list[str]:
  rows = [
    (
      k.name,
      f"{k.runs:.0f} runs",
      f"{k.cost.flops / 1e9:.1f} GFLOP each" if k.cost else "no cost given",
      _schedule(k.name, chip, kind),
    )
    for k in xla.kernels
  ]
  return ["  Pallas kernels", *columns(rows)] if rows else []


def _schedule(kernel: str, chip: str, kind: str) -> str:
  found = schedule_of(kernel, chip, kind)
  if found is None:
    return ""
  call = "" if found.cycles is None else f" {found.cycles:,.0f} a call,"
  return (
    f"static schedule of {found.case}: {found.turn:,.0f} cycles a turn,{call} "
    f"{found.spills:,} spills"
  )


def _time(one: Measured, xla: Analysis, plan: Plan) -> list[str]:
  r = xla.roofline
  again = f", {xla.flops / r.model_flops:.2f} x the model's" if r.model_flops else ""
  rows = [
    ("compute", seconds(r.compute), f"{xla.flops / 1e12:.2f} TFLOP{again}"),
    ("HBM", seconds(r.hbm), f"{xla.bytes / GIB:.1f} GiB"),
    ("ICI", seconds(r.ici), f"{seconds(r.exposed)} of it with nothing beside"),
  ]
  lines = ["  time at the published peaks", *columns(rows)]
  if any(kernel.cost is None for kernel in xla.kernels):
    return [*lines, "    no bound: the time of the kernels, which state no cost, is not in it"]
  for name, time in (("roofline", r.seconds), ("in order", r.in_order)):
    what = f"bound by {r.binding}" if name == "roofline" else "no two operations at a time"
    lines.append(f"    {name}: {seconds(time)} ({what}){_rate(one, r, time, plan.piece.chips)}")
  return lines


def _rate(one: Measured, r: Roofline, time: float, chips: int) -> str:
  """Tokens per second and chip; how much of the peak a train step uses, of the bandwidth decode."""
  if not one.program.tokens:
    return ""
  text = f": {one.program.tokens / chips / time:,.0f} tokens/s/chip"
  if one.program.kind == "decode":
    return f"{text}, {seconds(time / one.program.trips)} a token, HBM {r.hbm / time:.1%}"
  return f"{text}, MFU {r.mfu(time):.1%}"


def _round(plan: Plan) -> list[str]:
  """What a step of an online stage takes, all programs in order."""
  if not isinstance(plan.stage, Online) or plan.unknown or not plan.compiled:
    return []
  rows = [("program", "calls", "each", "all", "share")]
  for one in plan.programs:
    time, calls = one.in_order, one.program.calls
    share = f"{calls * time / plan.seconds:.0%}"
    rows.append((one.program.name, f"{calls:,}", seconds(time), seconds(calls * time), share))
  rows.append(("all", "", "", seconds(plan.seconds), ""))
  head = "a step of the stage at its fullest: every completion as long as it may be, in order"
  return ["", head, *columns(rows)]


def gib(size: float) -> str:
  """Bytes in GiB, aligned."""
  return f"{size / GIB:9.3f}"


def seconds(time: float) -> str:
  """A duration in the unit that suits it."""
  return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.2f} ms"


def columns(rows: Sequence[tuple[str, ...]], indent: str = "    ") -> list[str]:
  """Rows of text with aligned columns."""
  widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
  line = lambda row: "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
  return [indent + line(row).rstrip() for row in rows]
