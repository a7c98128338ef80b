"""What several devices compute alike, read off compiled programs."""

from __future__ import annotations

import re

import jax
import pytest
from jax.sharding import AbstractMesh

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.models.accounting import products
from moe_diffusion.models.stack import abstract_inputs, abstract_variables
from moe_diffusion.parallel.mesh import AXES, make_mesh
from moe_diffusion.planning import hlo, report
from moe_diffusion.planning.presets import Outcome, layout_of, recommend
from moe_diffusion.planning.repeats import _path_of, repeats_of, repeats_text
from moe_diffusion.planning.topologies import describe

QUIET = [].append


def load(**changes):
    keys = {"model.num_heads": 8, "model.flux.rope_axes": "(2,4,2)"}
    keys |= {"model.flux.single_depth": 2, "sampling.steps": 2, "sampling.time_shift": "none"}
    keys |= {"model.image_size": 16, "model.depth": 1, "parallel.preset": "tp"}
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    overrides = [f"{name}={value}" for name, value in keys.items()]
    return configs.load("configs/flux_tiny.py", overrides)


# One sample on eight devices, two steps: a product in which the devices share the heads, one of the
# vector of time that each of them computes, as a sum of products, and q k^T of two of eight heads.
NAMES = {
    "@qkv": "layers_1/while/body/checkpoint/block_0/attn.heads/qkv/dot_general",
    "@maps": "layers_1/while/body/block_0/attend/attention_maps/dot_general",
    "@time": "time_embed/dense_0/dot_general",
}
SHARED = """HloModule example

%condition (p.1: (s32[])) -> pred[] {
  %p.1 = (s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] constant(2)
  ROOT %lt.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%fused (a.1: f32[72,64], b.1: f32[64,3,1,8]) -> f32[72,3,1,8] {
  %a.1 = f32[72,64]{1,0} parameter(0)
  %b.1 = f32[64,3,1,8]{3,2,1,0} parameter(1)
  ROOT %c.1 = f32[72,3,1,8]{3,2,1,0} convolution(%a.1, %b.1), window={size=3x1}, @qkv
}

%body (p.2: (s32[])) -> (s32[]) {
  %p.2 = (s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %tokens = f32[72,64]{1,0} constant(0)
  %kernel = f32[64,3,1,8]{3,2,1,0} constant(0)
  %qkv = f32[72,3,1,8]{3,2,1,0} fusion(%tokens, %kernel), kind=kOutput, calls=%fused
  %q = f32[2,72,8]{2,1,0} constant(0)
  %k = f32[2,72,8]{2,1,0} constant(0)
  %maps = f32[2,72,72]{2,1,0} dot(%q, %k), @maps
  %products = f32[256,64]{1,0} constant(0)
  %sum = f32[64]{0} reduce(%products, %i.2), dimensions={0}, to_apply=%add, @time
  ROOT %t.2 = (s32[]) tuple(%i.2)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %zero = s32[] constant(0)
  %init = (s32[]) tuple(%zero)
  ROOT %loop = (s32[]) while(%init), condition=%condition, body=%body
}
"""


def test_products_are_counted_by_hand():
    """72 tokens of width 64, eight heads of 8 channels, two single blocks, eight devices.

    qkv of a device: 2 x 72 x 64 x 24 FLOPs, an eighth of one block's, and here it runs for one of
    two blocks: factor 1/2. Time: 2 x 256 x 64, all of it: factor 8. Of the attention q k^T alone,
    half of it, for two of eight heads and one of two blocks: 8 x 1/2 x 2/8 x 1/2 = 1/2; of six
    heads it would be 3/2.
    """
    config = load(data__batch_size=1)
    model = build(config.model)

    def of(text):
        for short, name in NAMES.items():
            text = text.replace(
                short, f'metadata={{op_name="jit(sampler)/while/body/Flux/{name}"}}'
            )
        return repeats_of(hlo.parse(text), model, config, "sample", 8)

    assert of(SHARED) == {"time_embed/dense_0": 8}
    assert of(SHARED.replace("[2,72", "[6,72")) == {
        "time_embed/dense_0": 8,
        "single (attention maps)": 1.5,
    }
    whole = SHARED.replace("3,1,8]", "3,8,8]")
    assert of(whole)["single attn/qkv"] == 4
    gradient = 'metadata={op_name="transpose(jvp(Flux))/layers_1/block_0/attn/qkv/dot_general"}'
    assert of(whole.replace("@qkv", gradient)) == of(SHARED)
    assert of(SHARED.replace(", @maps", "")) is None  # a product without a name


def test_products_of_grouped_blocks_have_their_path():
    """Blocks of a group are applied apart from the model, in a loop: a computation of its own.

    XLA puts its names behind those of the call.
    """
    model = build(load(model__mob__groups="1-2").model)
    weights, maps = products(model)
    wanted = {path.rpartition("/")[0] for path in weights if "/members/" in path}
    wanted |= {f"{path}/attention_maps" for path in maps if "/members/" in path}
    assert len(wanted) == 6  # qkv, proj, up, down, adaLN; maps
    apply = jax.jit(lambda variables, *inputs: model.apply(variables, *inputs, False))
    lowered = apply.lower(abstract_variables(model), *abstract_inputs(model, 1))
    text = lowered.as_text("hlo", debug_info=True)
    names = [f"layers_1/block_0/{name}" for name in re.findall(r'op_name="(checkpoint/.*?)"', text)]
    assert {_path_of(name, dict.fromkeys(wanted)) for name in names} >= wanted


def test_devices_share_one_sample():
    plan = report.make_plan(load(data__batch_size=1), "sample", describe("local"), QUIET)
    assert plan.times == 1 and plan.micro_batch == 1 / 8 and plan.collectives
    assert plan.layout == "weights: heads, mlp over tensor=8; batch over nothing"
    assert "1 image on 8 chips at a time" in report.table(plan)


def test_presets_that_fill_a_batch_up_say_so():
    """Two images for eight devices: `dp` draws eight, `tp` lets four devices share each."""
    config = load(data__batch_size=2, parallel__preset="dp")
    plan = report.make_plan(config, "sample", describe("local"), QUIET)
    assert plan.repeats["everything"] == plan.times == 4 and plan.batch_size == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "ORDER", ("dp", "tp"))
        report.compare_presets(plan, config, QUIET)
    assert plan.recommended == "tp" and "parallel.tensor=4" in plan.reason
    assert "dp computes 4 times as much" in plan.reason
    text = report.table(plan)
    assert "computed 4 times: everything" in text and "heads, mlp over tensor=4" in text
    assert plan.to_json()["presets"]["tp"]["times"] == 1


@pytest.mark.parametrize(
    ("tensor", "batch", "message"),
    [(3, 8, "parallel.tensor = 3 does not divide the 8 devices"), (2, 6, "over 4 groups of dev")],
)
def test_what_cannot_be_shared(tensor, batch, message):
    config = load(parallel__tensor=tensor, data__batch_size=batch)
    with pytest.raises(UserError, match=message):
        report.make_plan(config, "train", describe("local"), QUIET)


def test_a_preset_that_computes_more_is_recommended_only_if_nothing_else_fits():
    found = {"dp": Outcome(True, 1, 0, times=8), "tp": Outcome(True, 1, 10**9)}
    assert recommend(found, 2)[0] == "tp"
    found["tp"] = Outcome(False, 3, None)
    assert recommend(found, 2)[0] == "dp"


def test_how_a_preset_splits():
    config = load(parallel__preset="fsdp").parallel
    layout = layout_of(make_mesh(config), "fsdp", 1152)
    assert layout == "weights: embed over fsdp=8; batch over fsdp=8"
    layout = layout_of(make_mesh(load(parallel__preset="dp").parallel), "dp", 1152)
    assert layout == "weights: whole; batch over data=8"
    mesh = AbstractMesh((1, 16, 16, 1, 1), AXES)  # v5e:16x16; 1152 = 2**7 * 9
    assert layout_of(mesh, "fsdp", 1152) == (
        "weights: embed over fsdp=16 (fsdp=16 x data=16 does not divide 1152); "
        "batch over data=16 x fsdp=16"
    )


def test_text():
    assert repeats_text({}) == ["computed more than once: nothing"]
    assert repeats_text(None) == ["computed more than once: unknown"]
    assert repeats_text({"a": 8.0, "b": 2.0, "c": 8.01}) == [
        "computed 8 times: a, c",
        "computed 2 times: b",
    ]


# A loop that XLA unrolled: it adds 2 to its counter, which begins at 0 and stays below 5.
UNROLLED = """HloModule example

%condition (p.1: (s32[], f32[8,4])) -> pred[] {
  %p.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] constant(5)
  ROOT %lt.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%body (p.2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.2 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i.2, %two)
  %part = f32[2,4]{1,0} parameter(1)
  %whole = f32[8,4]{1,0} all-gather(%part), replica_groups=[1,4]<=[4], metadata={"x":
"y"
}}, dimensions={0}
  ROOT %t.2 = (s32[], f32[8,4]{1,0}) tuple(%next, %whole)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8,4]{1,0}) tuple(%zero, %x)
  ROOT %loop = (s32[], f32[8,4]{1,0}) while(%init), condition=%condition, body=%body
}
"""


def test_an_unrolled_loop_counts_its_steps():
    """0, 2, 4: three runs, each with an all-gather of 128 bytes of which a device sends 3 / 4."""
    program = hlo.parse(UNROLLED)
    assert hlo.collective_bytes(program) == {"all-gather": 3 * 96}
    assert "dimensions={0}" in program.computations["body"]["whole"].text
