"""Counts of compiled programs: answers known from how the programs were made."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.plan.compiled_text import bytes_of, count


def compiled(function, mesh, *arguments):
    """The text of `function` of (shape, dtype, spec)s under a shard_map of those specs."""
    specs = tuple(spec for *_, spec in arguments)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in arguments
    ]
    return jax.jit(mapped).lower(*shapes).compile().as_text()


def make_mesh(devices, shape=(8,), names=("x",)):
    devices = np.array(devices[:8]).reshape(shape)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(shape))


def scanned(weights, rows, length=5):
    """Five times: rows gathered, multiplied by all weights, each chip's rows of the sum kept."""

    def body(rows, _):
        whole = jax.lax.all_gather(rows, "x", tiled=True)
        product = jnp.dot(whole, weights, preferred_element_type=jnp.float32)
        kept = jax.lax.psum_scatter(product, "x", tiled=True)
        return jnp.tanh(kept).astype(rows.dtype), None

    rows, _ = jax.lax.scan(body, rows, None, length=length)
    return jax.lax.psum(rows.astype(jnp.float32).sum(), "x")


def check_scanned(counted):
    """`scanned` of [1024, 1024] float32 on 8 chips; TPUs may gather after a cast to bfloat16."""
    many, size = counted.collectives["all-gather"]
    assert many == 5
    assert size in (5 * 1024 * 1024 * 4, 5 * 1024 * 1024 * 2)
    assert counted.collectives["reduce-scatter"] == (5, 5 * 128 * 1024 * 4)
    assert counted.collectives["all-reduce"] == (1, 4)
    assert counted.kernels == {}
    assert {each.chips for each in counted.calls} == {8}


SQUARE = (1024, 1024)


def arguments():
    return (SQUARE, jnp.float32, P()), (SQUARE, jnp.float32, P("x"))


def test_a_loop_multiplies_what_is_in_it():
    counted = count(compiled(scanned, make_mesh(jax.devices()), *arguments()), 8)
    check_scanned(counted)
    assert counted.flops == 5 * 2 * 1024**3
    assert counted.cycles == 0
    assert counted.shapes(in_loop=True) == {
        "all-gather f32[1024,1024]": 5,
        "reduce-scatter f32[128,1024]": 5,
    }
    assert counted.shapes(in_loop=False) == {"all-reduce f32[]": 1}
    assert counted.collective_bytes == 5 * (1024 + 128) * 1024 * 4 + 4
    # A ring: everything but one's own eighth is received, and sent on.
    assert counted.sent_bytes(overlapped=False) == 2 * 5 * 1024 * 1024 * 4 * 7 / 8 + 2 * 4 * 7 / 8


def test_loops_in_loops_multiply():
    def twice(weights, rows):
        def outer(total, _):
            return total + scanned(weights, rows * total, length=3), None

        return jax.lax.scan(outer, jnp.ones(()), None, length=7)[0]

    counted = count(compiled(twice, make_mesh(jax.devices()), *arguments()), 8)
    assert counted.collectives["reduce-scatter"][0] == 21
    assert counted.collectives["all-reduce"][0] == 7


def test_a_loop_whose_count_depends_on_data_is_counted_as_told_and_said():
    def loop(rows):
        def body(total):
            return total + jax.lax.psum(jnp.sum(rows * total), "x")

        return jax.lax.while_loop(lambda total: total < 9, body, jnp.ones(()))

    rows = ((64, 8), jnp.float32, P("x"))
    text = compiled(loop, make_mesh(jax.devices()), rows)
    assert count(text, 8).collectives["all-reduce"] == (1, 4)
    assert count(text, 8, passes=3).collectives["all-reduce"] == (3, 12)


def test_what_a_loops_condition_exchanges_is_counted():
    def loop(rows):
        def goes(total):
            return jax.lax.pmax(total, "x") < 9

        return jax.lax.while_loop(goes, lambda total: total + 1, rows[0, 0])

    text = compiled(loop, make_mesh(jax.devices()), ((64, 8), jnp.float32, P("x")))
    assert count(text, 8, passes=3).collectives["all-reduce"] == (3, 12)


def test_a_group_is_the_axis_that_a_collective_is_over():
    mesh = make_mesh(jax.devices(), (2, 4), ("data", "x"))

    def reduce(rows):
        return jax.lax.psum(jax.lax.all_gather(rows, "x", tiled=True).sum(0), "data")

    counted = count(compiled(reduce, mesh, ((64, 8), jnp.float32, P(("data", "x")))), 8)
    groups = {each.kind: each.chips for each in counted.calls}
    assert groups == {"all-gather": 4, "all-reduce": 2}
    spans = {each.kind: each.span for each in counted.calls}
    assert spans == {"all-gather": 4, "all-reduce": 5}  # chips 0 to 3, and 0 and 4


@pytest.mark.parametrize(
    ("stated", "chips", "span"),
    [
        ("replica_groups={{0,4},{1,5}}", 2, 5),
        ("replica_groups=[2,8]<=[16]", 8, 8),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", 2, 9),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'data','tensor'}", 4, 10),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'fsdp'}", 4, 7),
        ("replica_groups={}", 16, 16),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", 16, 3),
    ],
)
def test_how_far_apart_the_chips_of_a_collective_are(stated, chips, span):
    kind = "collective-permute" if "source" in stated else "all-reduce"
    text = f"""ENTRY %main () -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %r = f32[8]{{0}} {kind}(%p), channel_id=1, {stated}, use_global_device_ids=true
}}
"""
    (collective,) = count(text, 16).calls
    assert (collective.chips, collective.span) == (chips, span)


def test_what_a_chip_would_exchange_with_itself_is_no_collective():
    mesh = make_mesh(jax.devices(), (1, 8), ("data", "x"))

    def reduce(rows):
        return jax.lax.psum(rows.sum(), "x") + jax.lax.psum(rows[0, 0], "data")

    counted = count(compiled(reduce, mesh, ((64, 8), jnp.float32, P("x"))), 8)
    assert counted.collectives == {"all-reduce": (1, 4)}


def test_of_a_conditional_the_costliest_branch_counts():
    def choose(rows):
        far = functools.partial(jax.lax.all_gather, axis_name="x", tiled=True)
        total = jax.lax.psum(rows.sum(), "x")
        return jax.lax.cond(
            total > 0, lambda x: jax.lax.psum(x[0, 0], "x"), lambda x: far(x).sum(), rows
        )

    counted = count(compiled(choose, make_mesh(jax.devices()), ((64, 8), jnp.float32, P("x"))), 8)
    assert counted.collectives == {"all-gather": (1, 64 * 8 * 4), "all-reduce": (1, 4)}


@pytest.mark.parametrize(
    "text, size",
    [
        ("bf16[8,2048]{1,0:T(8,128)(2,1)S(1)}", 32768),
        ("(f32[2,3]{1,0}, pred[5], s32[])", 24 + 5 + 4),
        ("f8e4m3fn[16]", 16),
        ("s4[3]", 2),
        ("token[]", 0),
        ("c64[2]", 16),
    ],
)
def test_bytes_of_a_type(text, size):
    assert bytes_of(text) == size


# Written as the compilers write them, with what is not read left out.
GPU = """HloModule step

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %g = ((f32[8,4]{1,0}, s32[2]{0}), (f32[64,4]{1,0}, s32[16]{0})) all-gather-start(%p, %q), \
replica_groups=[2,4]<=[8], dimensions={0}
  %g.1 = (f32[64,4]{1,0}, s32[16]{0}) all-gather-done(%g)
  %s = ((f32[64,4]{1,0}), f32[8,4]{1,0}) reduce-scatter-start(%h), replica_groups={{0,1},{2,3}}
  %s.1 = f32[8,4]{1,0} reduce-scatter-done(%s)
  %r = ((f32[8,4]{1,0}), f32[8,4]{1,0}) all-reduce-start(%s.1), replica_groups={}
  %r.1 = f32[8,4]{1,0} all-reduce-done(%r)
  %k = (f32[8,4]{1,0}, u8[64]{0}) custom-call(%r.1), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %c = f32[8,4]{1,0} copy(%r.1)
}
"""


def test_an_asynchronous_collective_counts_once_and_without_its_operand():
    counted = count(GPU, 8)
    assert counted.collectives == {
        "all-gather": (1, 64 * 4 * 4 + 16 * 4),
        "all-reduce": (1, 8 * 4 * 4),
        "reduce-scatter": (1, 8 * 4 * 4),
    }
    groups = {each.kind: each.chips for each in counted.calls}
    assert groups == {"all-gather": 4, "reduce-scatter": 2, "all-reduce": 8}
    assert counted.shapes(in_loop=False)["all-gather f32[64,4] s32[16]"] == 1
    assert all(each.overlapped for each in counted.calls)
    assert counted.kernels == {"__cudnn$fmhaSoftmax": 1}


TPU = """HloModule step

%begun (p: bf16[8,4]) -> (bf16[8,4], bf16[64,4], u32[]) {
  %g = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=mesh['x'=8] {'x'}
  ROOT %k = (bf16[8,4], bf16[64,4]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: bf16[8,4]) -> (bf16[64,4], bf16[8,8]) {
  %g = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=mesh['x'=8] {'x'}
  %v = bf16[8,8]{1,0} convolution(%p, %p), backend_config={"estimated_cycles":"70"}
  ROOT %t = (bf16[64,4], bf16[8,8]) tuple(%g, %v)
}

%ended (p: bf16[8,4]) -> bf16[64,4] {
  %g = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=mesh['x'=8] {'x'}
  ROOT %k = bf16[64,4] custom-call(%g), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.2 (p: bf16[64,4]) -> bf16[8,4] {
  %r = bf16[64,4]{1,0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %s = bf16[8,4]{1,0} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={8,4}
}

%body (t: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %a = (bf16[8,4], bf16[64,4], u32[]) fusion(%p), kind=kCustom, calls=%begun
  %b = (bf16[64,4], bf16[8,8]) fusion(%p), kind=kOutput, calls=%async_collective_fusion.1, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %c = bf16[64,4]{1,0} fusion(%p), kind=kCustom, calls=%ended
  %d = bf16[8,4]{1,0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.2
  %e = bf16[8,4]{1,0} custom-call(%d), custom_call_target="tpu_custom_call", \
backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %t.1 = (s32[], bf16[8,4]) tuple(%i, %e)
}

%condition (t: (s32[], bf16[8,4])) -> pred[] {
  %n = u32[]{:T(128)} constant(6)
  ROOT %l = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %w = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %o = bf16[8,4]{1,0} get-tuple-element(%w), index=1
}
"""


def test_a_tpus_spellings_of_collectives_loops_and_cycles():
    counted = count(TPU, 8)
    assert counted.collectives == {
        "all-gather": (6, 6 * 64 * 4 * 2),  # not where it goes on, nor where it ends
        "reduce-scatter": (6, 6 * 8 * 4 * 2),  # the share that a chip keeps
    }
    overlapped = {each.kind: each.overlapped for each in counted.calls}
    assert overlapped == {"all-gather": True, "reduce-scatter": False}
    assert counted.cycles == 600  # a fusion's estimate holds what is in it; 2^63 - 1 is none
    assert counted.kernels == {"tpu_custom_call": 6}


CUBLAS = """HloModule step

ENTRY %main (p: bf16[64,32], q: bf16[16,32]) -> bf16[64,16] {
  %p = bf16[64,32]{1,0} parameter(0)
  %q = bf16[16,32]{1,0} parameter(1)
  %m = (bf16[64,16]{1,0}, s8[4096]{0}) custom-call(%p, %q), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  ROOT %o = bf16[64,16]{1,0} get-tuple-element(%m), index=0
}
"""


def test_a_product_of_cublas_counts_as_a_product():
    counted = count(CUBLAS, 1)
    assert counted.flops == 2 * 64 * 16 * 32
    assert counted.kernels == {"__cublas$lt$matmul": 1}


TPU7X = """HloModule step

%called (part: bf16[64,256]) -> bf16[64,2048] {
  %part = bf16[64,256]{1,0} parameter(0)
  ROOT %gathered = bf16[64,2048]{1,0} all-gather(%part), replica_groups={{0,1,2,3,4,5,6,7}}
}, execution_thread="sparsecore"

ENTRY %main (part: bf16[64,256]) -> bf16[64,2048] {
  %part = bf16[64,256]{1,0} parameter(0)
  %start = ((), (), (s32[])) custom-call-start(), called_computations={%called}
  %update = ((bf16[64,256]{1,0}), bf16[64,2048]{1,0}, (s32[])) custom-call-update(%start, %part)
  ROOT %done = bf16[64,2048]{1,0} custom-call-done(%update)
}
"""


def test_sparse_cores_exchange_while_the_others_compute():
    counted = count(TPU7X, 8)
    assert counted.collectives == {"all-gather": (1, 64 * 2048 * 2)}
    assert counted.sent_bytes(overlapped=False) == 0
    assert counted.sent_bytes(overlapped=True) == 64 * 2048 * 2 * 7 / 8
