"""What is read from scheduled HLO, on small programs that are compiled here for four v5e chips."""

import jax
import jax.numpy as jnp
import pytest

from pt_jax.plan import collectives, cost, hlo
from pt_jax.plan.topology import mesh_on, open_slice

pytest.importorskip("libtpu")
N, D, F, LAYERS = 512, 1024, 2048, 5


@pytest.fixture(scope="module")
def mesh():
  """data=2, tensor=2."""
  return mesh_on(open_slice("v5e:2x2"), {"data": 2, "tensor": 2})


def _compiled(mesh, function, *args):
  shaped = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
    for shape, spec in args
  ]
  with jax.set_mesh(mesh):
    return hlo.parse(jax.jit(function).lower(*shaped).compile().as_text())


@pytest.fixture(scope="module")
def layers(mesh):
  """A scan of x + silu(x W) V, W and V gathered over data, the product summed over tensor."""

  def layer(x, w):
    up, down = (
      jax.reshard(m, spec) for m, spec in zip(w, (jax.P(None, "tensor"), jax.P("tensor")))
    )
    h = jax.nn.silu(jnp.einsum("nd,df->nf", x, up))
    return x + jnp.einsum("nf,fd->nd", h, down, out_sharding=jax.P("data", None)), None

  return _compiled(
    mesh,
    lambda x, w, v: jax.lax.scan(layer, x, (w, v))[0],
    ((N, D), jax.P("data")),
    ((LAYERS, D, F), jax.P(None, "data", "tensor")),
    ((LAYERS, F, D), jax.P(None, "tensor", "data")),
  )


def test_loops_count_as_often_as_they_run(layers):
  operations = cost.operations(layers, dynamic_trips=1)
  flops = sum(op.cost.flops * op.runs for op in operations)
  assert flops == 2 * 2 * (N // 2) * D * (F // 2) * LAYERS
  # Each weight is read from where it is stored, written and read where it was gathered, at most.
  stored = 2 * LAYERS * D * F * 2 / 4
  moved = sum(op.cost.bytes * op.runs for op in operations)
  assert stored < moved < 8 * stored


def test_kind_axes_and_bytes_of_collectives(layers, mesh):
  found = {(c.kind, c.axes): c for c in collectives.collectives(layers, mesh.shape, 1)}
  assert set(found) == {("all-gather", ("data",)), ("all-reduce", ("tensor",))}
  gathered, summed = found["all-gather", ("data",)], found["all-reduce", ("tensor",)]
  assert gathered.bytes == 2 * LAYERS * D * (F // 2) * 2
  assert gathered.moved == gathered.bytes / 2
  assert summed.runs == LAYERS
  assert summed.bytes == summed.moved == LAYERS * (N // 2) * D * 2  # 2 (n - 1) / n = 1 for two


def test_a_loop_whose_trips_are_data(mesh):
  def many(x, n):
    count = n[0, 0].astype(jnp.int32)
    square = lambda _, y: jnp.einsum("nd,de->ne", y, y)
    return jax.lax.fori_loop(0, count, square, x)

  whole = jax.P(None, None)
  module = _compiled(mesh, many, ((256, 256), whole), ((1, 1), whole))
  flops = lambda trips: sum(op.cost.flops * op.runs for op in cost.operations(module, trips))
  assert flops(7) == 7 * 2 * 256**3


@pytest.mark.parametrize(
  ("groups", "axes"),
  [
    ("replica_groups={{0,1},{2,3}}", ("tensor",)),
    ("replica_groups={{0,2},{1,3}}", ("data",)),
    ("replica_groups=[2,2]<=[4]", ("tensor",)),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", ("data",)),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", ("tensor",)),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ("data",)),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", ("data",)),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", ("tensor",)),
    ("replica_groups=[1,4]<=[4]", ("data", "tensor")),
    ("source_target_pairs={{0,2},{2,0}}", ("data",)),
    ("replica_groups={}", ("data", "tensor")),
  ],
)
def test_every_form_of_replica_groups(groups, axes):
  text = (
    "HloModule m, is_scheduled=true\n\n"
    "ENTRY %main (p: f32[8]) -> f32[8] {\n"
    "  %p = f32[8]{0} parameter(0)\n"
    f"  ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add\n"
    "}\n"
  )
  mesh = {"data": 2, "context": 1, "expert": 1, "tensor": 2}
  (found,) = collectives.collectives(hlo.parse(text), mesh, 1)
  assert (found.kind, found.axes, found.bytes) == ("all-reduce", axes, 32)


def test_arrays_in_vmem_cost_no_hbm():
  text = (
    "HloModule m\n\n"
    "ENTRY %main (p: f32[8]) -> f32[8] {\n"
    "  %p = f32[8]{0:T(128)} parameter(0)\n"
    "  %v = f32[8]{0:T(128)S(1)} negate(%p)\n"
    "  ROOT %r = f32[8]{0:T(128)} negate(%v)\n"
    "}\n"
  )
  read, written = cost.operations(hlo.parse(text), 1)
  assert (read.cost.bytes, written.cost.bytes) == (32, 32)


def test_a_slice_that_is_fetched_ahead_costs_what_it_holds():
  """A quarter of a weight to VMEM, as the engine's programs fetch those of the next layer."""
  text = (
    "HloModule m\n\n"
    "%ahead (q: bf16[64,8]) -> bf16[16,8] {\n"
    "  %q = bf16[64,8]{1,0:T(8,128)} parameter(0)\n"
    "  ROOT %s = bf16[16,8]{1,0:T(8,128)S(1)} slice(%q), slice={[0:16], [0:8]}\n"
    "}\n\n"
    "ENTRY %main (p: bf16[64,8]) -> bf16[16,8] {\n"
    "  %p = bf16[64,8]{1,0:T(8,128)} parameter(0)\n"
    "  %a = ((bf16[64,8]{1,0:T(8,128)}), bf16[16,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)})"
    " async-start(%p), calls=%ahead\n"
    "  ROOT %d = bf16[16,8]{1,0:T(8,128)S(1)} async-done(%a)\n"
    "}\n"
  )
  (ahead,) = cost.operations(hlo.parse(text), 1)
  assert ahead.cost.bytes == 16 * 8 * 2


def test_a_weight_under_another_shape_is_read():
  """Its bitcast may be a fusion of its own, inside that of the product."""
  text = (
    "HloModule m\n\n"
    "%cast (r: bf16[64,8]) -> bf16[512] {\n"
    "  %r = bf16[64,8]{1,0:T(8,128)} parameter(0)\n"
    "  ROOT %b = bf16[512]{0:T(128)} bitcast(%r)\n"
    "}\n\n"
    "%twice (q: bf16[64,8]) -> bf16[512] {\n"
    "  %q = bf16[64,8]{1,0:T(8,128)} parameter(0)\n"
    "  %f = bf16[512]{0:T(128)} fusion(%q), kind=kLoop, calls=%cast\n"
    "  ROOT %n = bf16[512]{0:T(128)S(1)} negate(%f)\n"
    "}\n\n"
    "ENTRY %main (p: bf16[64,8]) -> bf16[512] {\n"
    "  %p = bf16[64,8]{1,0:T(8,128)} parameter(0)\n"
    "  ROOT %t = bf16[512]{0:T(128)S(1)} fusion(%p), kind=kOutput, calls=%twice\n"
    "}\n"
  )
  (product,) = cost.operations(hlo.parse(text), 1)
  assert product.cost.bytes == 64 * 8 * 2
