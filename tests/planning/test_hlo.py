from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_diffusion.planning import hlo

# Three runs of a loop that gathers; then a conditional whose second branch sends more.
LOOP = """HloModule example

FileNames
1 "/x/moe_diffusion/kernels/blocked.py"
2 "/x/train.py"

%condition (p.1: (s32[], f32[8,4])) -> pred[] {
  %p.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] constant(3)
  ROOT %lt.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%body (p.2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.2 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %part = f32[2,4]{1,0} parameter(1)
  %whole = f32[8,4]{1,0} all-gather(%part), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %t.2 = (s32[], f32[8,4]{1,0}) tuple(%i.2, %whole)
}

%small (p.3: f32[10]) -> f32[10] {
  %p.3 = f32[10]{0} parameter(0)
  ROOT %r.3 = f32[10]{0} all-reduce(%p.3), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%large (p.4: f32[10]) -> f32[10] {
  %p.4 = f32[10]{0} parameter(0)
  ROOT %r.4 = f32[10]{0} all-reduce(%p.4), replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (x: f32[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8,4]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,4]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %c = f32[10]{0} conditional(%zero, %x, %x), branch_computations={%small, %large}
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_the_dearest_branch_counts():
    program = hlo.parse(LOOP)
    gathered, reduced = 3 * (8 * 4 * 4) * 3 / 4, 2 * (10 * 4) * 3 / 4
    assert hlo.collective_bytes(program) == {"all-gather": gathered, "all-reduce": reduced}
    assert program.files == ("/x/moe_diffusion/kernels/blocked.py", "/x/train.py")


@pytest.mark.parametrize(
    "change,runs",
    [
        (("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'), 7),
        (("direction=LT", "direction=NE"), 1),  # unknown
        # The bound is carried through the loop.
        (("%n.1 = s32[] constant(3)", "%n.1 = s32[] get-tuple-element(%p.1), index=1"), 5),
    ],
)
def test_trip_counts(change, runs):
    text = LOOP.replace(*change).replace("tuple(%zero, %x)", "tuple(%zero, %five)")
    text = text.replace("  %init", "  %five = s32[] constant(5)\n  %init")
    sent = hlo.collective_bytes(hlo.parse(text))
    assert sent["all-gather"] == runs * 8 * 4 * 4 * 3 / 4


@pytest.mark.parametrize(
    "groups,size",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
    ],
)
def test_group_sizes(groups, size):
    assert hlo.group_size(f"f32[8] all-reduce(%x), {groups}, to_apply=%add") == size


def test_asynchronous_collectives_count_once_with_their_result():
    text = """
ENTRY %main (x: bf16[2,4]) -> bf16[8,4] {
  %x = bf16[2,4]{1,0} parameter(0)
  %s = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}
  %d = bf16[8,4]{1,0} all-gather-done(%s)
  %p = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) collective-permute-start(%d), channel_id=1
  ROOT %e = bf16[8,4]{1,0} collective-permute-done(%p)
}
"""
    sent = hlo.collective_bytes(hlo.parse(text))
    assert sent == {"all-gather": 8 * 4 * 2 * 3 / 4, "collective-permute": 8 * 4 * 2}


def test_pieces_of_one_collective_in_fusions_count_once():
    """As the TPU compiler writes them, layouts with parentheses and pieces in a loop included."""
    text = """
%fused_computation.1 (a: f32[2,128]) -> f32[8,128] {
  %a = f32[2,128]{1,0:T(8,128)} parameter(0)
  ROOT %g = f32[8,128]{1,0:T(8,128)} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3}}
}

%async_collective_fusion.5 (a.5: f32[2,128]) -> f32[8,128] {
  %a.5 = f32[2,128]{1,0:T(8,128)} parameter(0)
  ROOT %g.5 = f32[8,128]{1,0:T(8,128)} all-gather(%a.5), channel_id=1, replica_groups={{0,1,2,3}}
}

%body (y: f32[2,128]) -> f32[2,128] {
  %y = f32[2,128]{1,0:T(8,128)} parameter(0)
  %f5 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%y), kind=kCustom, calls=%async_collective_fusion.5
  ROOT %z = f32[2,128]{1,0:T(8,128)} copy(%y)
}

%all-reduce-scatter.1 (b: f32[8,128]) -> f32[2,128] {
  %b = f32[8,128]{1,0:T(8,128)} parameter(0)
  %r = f32[8,128]{1,0:T(8,128)} all-reduce(%b), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %s = f32[2,128]{1,0:T(8,128)} dynamic-slice(%r, %b), dynamic_slice_sizes={2,128}
}

ENTRY %main (x: f32[2,128]) -> f32[2,128] {
  %x = f32[2,128]{1,0:T(8,128)} parameter(0)
  %async-collective-start.1 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x), calls=%fused_computation.1
  %async-collective-start.2 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x), calls=%fused_computation.1
  %w = f32[2,128]{1,0:T(8,128)} while(%x), body=%body, backend_config={"known_trip_count":{"n":"9"}}
  %async-collective-done.1 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%w), calls=%fused_computation.1
  %f3 = f32[2,128]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %f4 = f32[2,128]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    whole = 8 * 128 * 4 * 3 / 4
    sent = hlo.collective_bytes(hlo.parse(text))
    assert sent == {"all-gather": 2 * whole, "reduce-scatter": 2 * whole}


def test_a_compiled_scan_over_sharded_weights_gathers_every_layer():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    layers, width = 5, 64
    weights = jax.ShapeDtypeStruct(
        (layers, width, width),
        jnp.float32,
        sharding=NamedSharding(mesh, PartitionSpec(None, "data")),
    )
    x = jax.ShapeDtypeStruct(
        (256, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )

    def model(weights, x):
        whole = NamedSharding(mesh, PartitionSpec())

        def layer(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    program = hlo.parse(jax.jit(model).lower(weights, x).compile().as_text())
    sent = hlo.collective_bytes(program)
    assert sent["all-gather"] == layers * width * width * 4 * 7 / 8
    assert sent["all-reduce"] == 2 * 4 * 7 / 8  # of the sum


@pytest.mark.parametrize(
    "call,found",
    [
        ('custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/pallas_call"}', 1),
        ('custom_call_target="tpu_custom_call"', 0),  # one of XLA's own
        ('custom_call_target="TopK", metadata={op_name="jit(f)/top_k"}', 0),
    ],
)
def test_pallas_kernels_are_counted(call, found):
    text = (
        f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  ROOT %up.3 = f32[8] custom-call(%x), {call}\n}}"
    )
    assert hlo.kernels(hlo.parse(text)) == ({"up": 1} if found else {})


def send(kind, target, shape="f32[128,8,128]{2,1,0}"):
    """As the compiler writes it for several slices; the names are those of one program."""
    attributes = (
        f'_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_megascale_target="{target}",_xla_megascale_transfer_type="{kind}"'
    )
    lines = ["HloModule slices", "", "ENTRY %main (p: f32[128,8,128]) -> f32[128,8,128] {"]
    lines += [f"  %p = {shape} parameter(0)", "  %all = token[] after-all()"]
    lines.append(f"  %send = ({shape}, u32[], token[]) send(%p, %all), channel_id=2, "
                 f"is_host_transfer=true, frontend_attributes={{{attributes}}}")  # fmt: skip
    lines += ["  ROOT %done = token[] send-done(%send), channel_id=2", "}", ""]
    return hlo.collective_bytes(hlo.parse("\n".join(lines)))


@pytest.mark.parametrize(
    ("kind", "target", "times"),
    [
        ("ALL_REDUCE", "{1,2}x{0:7}", 1),  # 2 (n - 1) / n of it
        ("ALL_REDUCE", "{1:4}x{0:7}", 1.5),
        ("REDUCE_SCATTER", "{1,2}x{0:7}", 0.5),
        ("ALL_GATHER", "{1:4}x{0}", 3),  # each sends its part to three others
        ("ALL_TO_ALL", "{1:4}x{0}", 0.75),
    ],
)
def test_bytes_between_slices_are_apart(kind, target, times):
    assert send(kind, target) == {hlo.BETWEEN_SLICES: times * 4 * 128 * 8 * 128}
