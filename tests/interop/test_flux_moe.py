"""FLUX.1-MoE under PyTorch's names: there and back, and the numbers that the names compute."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from configs.families import flux
from moe_diffusion import config as configs
from moe_diffusion import convert, interop
from moe_diffusion.errors import UserError
from moe_diffusion.interop import describe, families, files, keymap, transfer
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.models import abstract_variables, build
from moe_diffusion.models.blocks import time_features
from moe_diffusion.models.flux_blocks import rope_angles
from tests import cli

FLUX = {"in_channels": 16, "vec_in_dim": 5, "context_in_dim": 6, "hidden_size": 16, "num_heads": 2}
FLUX |= {"depth": 3, "depth_single_blocks": 4, "axes_dim": [2, 4, 2], "guidance_embed": True}
MOE = {"num_experts": 3, "hidden_size": 4, "shared_hidden_size": 16, "skip_first": 1}
ROUTER = {"top_k": 2}
MOB = {"groups": ["1-2", "4-6"], "active": 2}
# What a model has besides FLUX.1's fields.
CASES = {
    "experts": {"moe": MOE, "router": ROUTER},
    "experts, rank 3": {"moe": MOE, "router": ROUTER, "adaln_rank": 3},
    "all": {"moe": MOE, "router": ROUTER, "mob": MOB, "adaln_rank": 3},
    "all, shared": {
        **{"moe": MOE | {"skip_first": 0}, "router": ROUTER | {"scores": "sigmoid", "scale": 2.5}},
        **{"mob": MOB | {"select": "run", "pool": "channels"}},
        **{"adaln_rank": 3, "adaln_shared": True},
    },
    "every other block": {
        "moe": MOE | {"interleave": True, "skip_first": 2, "bias": False, "shared_bias": False},
        "router": ROUTER,
    },
    "groups of dense blocks": {"mob": MOB},
    "shared experts alone": {"moe": MOE | {"num_experts": 0}, "router": {"top_k": 0}},
    "nothing": {},
}


def made(case):
    """(model, variables) of random numbers."""
    model = build(interop.model_config_from_torch("flux_moe", FLUX | CASES[case]))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda a: rng.normal(size=a.shape).astype(np.float32), abstract_variables(model)
    )
    return model, variables


FIRST = "experts"


@pytest.mark.parametrize(
    "case", [FIRST, *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != FIRST)]
)
def test_there_and_back(case):
    """Also by the shapes, of which all hold but what no shape shows."""
    model, variables = made(case)
    state = interop.export_state_dict(variables, model, "flux_moe")
    back = interop.import_state_dict(state, model, "flux_moe")
    jax.tree.map(np.testing.assert_array_equal, back["params"], variables["params"])
    assert sum(x.size for x in state.values()) == sum(x.size for x in jax.tree.leaves(variables))
    assert interop.family_of(model) == ("flux_moe" if CASES[case] else "flux")

    told, given = describe.from_shapes(FAMILIES["flux_moe"], state), CASES[case]
    unseen = {"axes_dim": FLUX["axes_dim"]} | {k: given[k] for k in ("router", "mob") if k in given}
    unseen |= {"moe": {"hidden_size": 4}} if case == "shared experts alone" else {}
    configured = [
        interop.model_config_from_torch("flux_moe", h)
        for h in (describe.merge(told, unseen), FLUX | given)
    ]
    assert configured[0] == configured[1]


@pytest.mark.slow
def test_names_and_shapes():
    """Of a double block with experts in a group, of a single one, of a dense one, of the routers.

    Block 0 of two streams stands alone, 1 and 2 are a group. The single blocks are numbers 3 to 6
    of all; the first stands alone and the others are a group.
    """
    model, variables = made("all")
    shapes = {k: v.shape for k, v in interop.export_state_dict(variables, model).items()}
    width, mlp, low = 16, 64, 3
    experts = {"gate.weight": (3, width)}
    for name, hidden in (("shared", 16), *((f"experts.{e}", 4) for e in range(3))):
        experts[f"{name}.0.weight"], experts[f"{name}.0.bias"] = (hidden, width), (hidden,)
        experts[f"{name}.2.weight"], experts[f"{name}.2.bias"] = (width, hidden), (width,)

    def of_stream(stream, with_experts):
        part = {
            **{"mod.down.weight": (low, width), "mod.up.weight": (6 * width, low)},
            **{"mod.up.bias": (6 * width,)},
            **{"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,)},
            **{f"attn.norm.{x}_norm.scale": (8,) for x in ("query", "key")},
            **{"attn.proj.weight": (width, width), "attn.proj.bias": (width,)},
        }
        if with_experts:
            part |= {f"moe.{name}": shape for name, shape in experts.items()}
        else:
            part |= {"mlp.0.weight": (mlp, width), "mlp.0.bias": (mlp,)}
            part |= {"mlp.2.weight": (width, mlp), "mlp.2.bias": (width,)}
        return {f"{stream}_{name}": shape for name, shape in part.items()}

    single = {f"moe.{name}": shape for name, shape in experts.items()}
    del single["moe.shared.2.bias"]  # the attention's bias serves both
    single |= {
        **{"modulation.down.weight": (low, width), "modulation.up.weight": (3 * width, low)},
        **{"modulation.up.bias": (3 * width,), "attn.qkv.weight": (3 * width, width)},
        **{"attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width)},
        **{"attn.proj.bias": (width,), "norm.query_norm.scale": (8,), "norm.key_norm.scale": (8,)},
    }
    expected = {}
    for i in range(3):
        for stream in ("img", "txt"):
            part = of_stream(stream, i > 0)
            expected |= {f"double_blocks.{i}.{name}": shape for name, shape in part.items()}
    for i in range(4):
        expected |= {f"single_blocks.{i}.{name}": shape for name, shape in single.items()}
    for kind, size in (("double", 2), ("single", 3)):
        expected |= {f"{kind}_groups.0.router.{x}.weight": (size, width) for x in "xy"}
    dense, dense_variables = made("nothing")
    native = interop.export_state_dict(dense_variables, dense, "flux")
    outside = {k: v.shape for k, v in native.items() if "_blocks." not in k}
    assert shapes == expected | outside


@pytest.mark.slow
def test_numbers_of_blocks_and_groups_by_hand():
    """Two groups of a kind, one stacked with the other: leaves at [layer, member, ...]."""
    changes = {"mob": MOB | {"groups": ["1-2", "3-4", "5-6"]}, "depth_single_blocks": 5}
    h = FLUX | CASES["experts, rank 3"] | changes
    model = build(interop.model_config_from_torch("flux_moe", h))
    variables = jax.tree.map(
        lambda a: np.random.default_rng(a.size).normal(size=a.shape).astype(np.float32),
        abstract_variables(model),
    )
    state = interop.export_state_dict(variables, model)
    leaves = flatten_dict(variables["params"], sep="/")
    # Layers: a block, a group of two; two groups of two, a block.
    (singles,) = {b.path for b in model.blocks()[3:7]}
    singles = singles.removesuffix("/members")
    for g in range(2):
        for x in "xy":
            ours = leaves[f"{singles}/block_router/{x}"]
            assert ours.shape == (2, 16, 2)
            np.testing.assert_array_equal(state[f"single_groups.{g}.router.{x}.weight"], ours[g].T)
        for member in range(2):
            ours = leaves[f"{singles}/members/moe/experts/up"][g, member, 2]
            key = f"single_blocks.{2 * g + member}.moe.experts.2.0.weight"
            np.testing.assert_array_equal(state[key], ours.T)
    alone = model.blocks()[7]
    np.testing.assert_array_equal(
        state["single_blocks.4.moe.gate.weight"],
        leaves[f"{alone.path}/moe/router/kernel"][alone.index].T,
    )
    assert "double_groups.1.router.x.weight" not in state


@pytest.mark.slow
def test_full_size_by_shapes():
    """FLUX.1-MoE-L: 9B parameters (2510.09094, section 4.1), 4,400 tensors; nothing is allocated.

    A stream has 3 tensors of modulation, 2 + 2 + 2 of attention, 4 of an MLP, or a gate, 4 of the
    shared expert and 12 x 4 of the normal ones: 3 x 26 + 16 x 124 in the double blocks. A single
    block has 3 + 6 + 1 + 3 + 48, and 20 tensors stand outside of the blocks.
    """
    moe = {"num_experts": 12, "hidden_size": 768, "shared_hidden_size": 3072, "skip_first": 3}
    sections = {"moe": moe, "router": {"top_k": 2}, "adaln_rank": 256}
    h = flux.PARAMS | {"guidance_embed": True} | sections
    model, family = build(interop.model_config_from_torch("flux_moe", h)), FAMILIES["flux_moe"]
    leaves = keymap.abstract_variables(model)
    groups = keymap.entries_by_leaf(family, model, leaves).values()
    shapes = {
        key: spec.shape
        for key, spec in keymap.torch_specs((e for g in groups for e in g), leaves).items()
    }
    assert len(shapes) == 3 * 26 + 16 * 124 + 38 * 61 + 20 == 4400
    assert 9.0e9 < sum(int(np.prod(shape)) for shape in shapes.values()) < 9.2e9
    told = family.from_shapes(shapes)
    assert describe.untold(family, told) == []
    again = interop.model_config_from_torch("flux_moe", told | {"router": {"top_k": 2}})
    assert again == interop.model_config_from_torch("flux_moe", h)
    assert describe.likely_families(shapes) == ["flux_moe"]
    # The table of docs/checkpoints.md.
    assert shapes["double_blocks.3.txt_moe.experts.11.2.weight"] == (3072, 768)
    assert shapes["double_blocks.0.img_mod.up.weight"] == (18432, 256)
    assert shapes["single_blocks.37.attn.qkv.weight"] == (9216, 3072)
    assert shapes["single_blocks.37.modulation.up.bias"] == (9216,)


@pytest.mark.parametrize("name", ["flux_moe_l", "flux_moe_xs", "hyper_flux_moe_xs"])
def test_the_papers_models_can_be_written(name):
    """`torch_from_config` compares what their hyperparameters make with the config."""
    config = configs.load(name)
    h = families.torch_from_config("flux_moe", config)
    assert h == json.loads(json.dumps(h)) and h["router"]["top_k"] == 2
    assert h.get("mob", {}).get("groups", ["none"]) == list(config.model.mob.groups)


@pytest.mark.slow
def test_dense_blocks_are_flux():
    """All names of FLUX.1 with their numbers, where there are no experts."""
    model, variables = made("nothing")
    both = [interop.export_state_dict(variables, model, f) for f in ("flux", "flux_moe")]
    assert both[0].keys() == both[1].keys()
    jax.tree.map(np.testing.assert_array_equal, *both)


# --- what the names compute ----------------------------------------------------------------------


def linear(s, name, x):
    return x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", 0)


def silu(x):
    return x / (1 + np.exp(-x))


def mlp(s, name, x):
    """Eq. 1, with the GELU that PyTorch calls approximate="tanh"."""
    x = linear(s, f"{name}.0", x)
    x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return linear(s, f"{name}.2", x)


def moe(s, name, x, k):
    """Eq. 2 and 3 for tokens x [S, D], one by one."""
    y = mlp(s, f"{name}.shared", x)
    logits = linear(s, f"{name}.gate", x)
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    for t, token in enumerate(x):
        chosen = np.argsort(-scores[t])[:k]
        for e in chosen:
            gate = scores[t, e] / scores[t, chosen].sum()
            y[t] += gate * mlp(s, f"{name}.experts.{e}", token)
    return y


def norm(x, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def attention(s, qkv, scales, x, angles):
    """x [S, D] -> [S, D], before the last layer; two heads of 8, turned in pairs."""
    q, k, v = linear(s, qkv, x).reshape(len(x), 3, 2, 8).transpose(1, 2, 0, 3)
    turned = []
    for h, which in ((q, "query"), (k, "key")):
        h = h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-6)
        h = (h * s[f"{scales}.{which}_norm.scale"]).reshape(2, len(x), 4, 2)
        h = (h[..., 0] + 1j * h[..., 1]) * np.exp(1j * angles)
        turned.append(np.stack([h.real, h.imag], -1).reshape(2, len(x), 8))
    weights = turned[0] @ turned[1].swapaxes(1, 2) / np.sqrt(8)
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).swapaxes(0, 1).reshape(len(x), 16)


def single_block(s, i, x, y, angles, k):
    name = f"single_blocks.{i}"
    modulation = linear(s, f"{name}.modulation.up", linear(s, f"{name}.modulation.down", silu(y)))
    shift, scale, gate = np.split(modulation, 3)
    h = norm(x) * (1 + scale) + shift
    out = attention(s, f"{name}.attn.qkv", f"{name}.norm", h, angles)
    return x + gate * (linear(s, f"{name}.attn.proj", out) + moe(s, f"{name}.moe", h, k))


def single_group(s, g, first, x, y, angles, kappa, alpha=0.5, k=2):
    """Eq. 4 and 5 for one sample: tokens x [L + S, D], condition y [D]."""
    name = f"single_groups.{g}.router"
    logits = alpha * linear(s, f"{name}.x", x.mean(0)) + (1 - alpha) * linear(s, f"{name}.y", y)
    for block in sorted(np.argsort(-logits)[:kappa]):
        x = single_block(s, first + block, x, y, angles, k)
    return x


def test_the_names_compute_the_same_numbers():
    """The experts of a single block and a group of three, of which a sample passes two.

    The program above sees only the tensors under their names and what stands before these layers.
    """
    config = interop.model_config_from_torch("flux_moe", FLUX | CASES["all"])
    config.image_size = 4
    config.flux.update(text_tokens=3, text_dtype="float32")
    model = build(config)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda a: rng.normal(scale=0.2, size=a.shape).astype(np.float32), abstract_variables(model)
    )
    s = interop.export_state_dict(variables, model)
    t = np.asarray([0.3, 0.8, 0.6], np.float32)
    cond = {
        "text": rng.normal(size=(3, 3, 6)).astype(np.float32),
        "pooled": rng.normal(size=(3, 5)).astype(np.float32),
        "guidance": np.asarray([3.5, 1.0, 2.0], np.float32),
    }
    x = rng.normal(size=(3, 4, 4, 4)).astype(np.float32)

    @jax.jit
    def apply(variables, x, t, cond):
        # Layers: block 0, the group 1-2, the single block 3, the group 4-6.
        how = {"capture": (1, 2, 3), "mutable": ["intermediates"]}
        return model.apply(variables, x, t, cond, False, **how)

    (_, features), sown = apply(variables, x, t, cond)
    (chosen,) = sown["intermediates"]["layers_3"]["block_0"]["blocks"]
    assert len(np.unique(chosen.reshape(3, 2), axis=0)) > 1  # samples differ in what they pass
    vectors = {"time_in": time_features(1000 * jnp.asarray(1 - t)), "vector_in": cond["pooled"]}
    vectors["guidance_in"] = time_features(1000 * jnp.asarray(cond["guidance"]))
    y = sum(
        linear(s, f"{n}.out_layer", silu(linear(s, f"{n}.in_layer", np.asarray(v))))
        for n, v in vectors.items()
    )
    angles = rope_angles((2, 2), 7, (2, 4, 2))
    image, text = features[1]
    before = np.concatenate([text, image], axis=1)
    for n in range(3):
        ours = single_block(s, 0, before[n], y[n], angles, k=2)
        np.testing.assert_allclose(ours, features[2][n], rtol=1e-5, atol=1e-5)
        ours = single_group(s, 0, 1, np.asarray(features[2][n]), y[n], angles, kappa=2)
        np.testing.assert_allclose(ours, features[3][n], rtol=1e-5, atol=1e-5)


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(hyperparameters, a file with them in its header, the folder that was made of it)."""
    folder = tmp_path_factory.mktemp("flux_moe")
    h = FLUX | CASES["all, shared"]
    interop.save_torch(*made("all, shared"), folder / "w.safetensors", hparams=h)
    transfer.import_folder("flux_moe", folder / "w.safetensors", folder / "run")
    return h, folder / "w.safetensors", folder / "run"


@pytest.mark.slow
def test_an_export_needs_nothing_else(run, tmp_path):
    """File, folder, file, folder: the same tensors and the same model each time."""
    h, file, folder = run
    out = tmp_path / "out.safetensors"
    transfer.export_file("flux_moe", folder, out)
    first, second = load_file(file), load_file(out)
    assert first.keys() == second.keys()
    jax.tree.map(np.testing.assert_array_equal, first, second)
    with safe_open(out, framework="numpy") as opened:
        told = json.loads(opened.metadata()[files.HPARAMS])
    assert interop.config_from_torch("flux_moe", told) == interop.config_from_torch("flux_moe", h)
    done = transfer.import_folder("flux_moe", out, tmp_path / "again")
    assert done["hparams"] == "the header of out.safetensors"
    assert configs.load_json(tmp_path / "again/config.json") == configs.load_json(
        folder / "config.json"
    )
    config = configs.load_json(folder / "config.json")
    assert tuple(config.model.mob.groups) == ("1-2", "4-6") and config.model.adaln_shared
    assert (config.model.router.scores, config.model.router.scale) == ("sigmoid", 2.5)
    assert families.torch_from_config("flux", config) is None  # its files have none


def rewritten(file, out, change, metadata=None):
    """A copy of a weight file, with other tensors or another header."""
    state, old = load_file(file), None
    with safe_open(file, framework="numpy") as opened:
        old = opened.metadata()
    change(state)
    save_file(state, out, metadata=old if metadata is None else metadata)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("single_groups.0.router.y.weight"),
            "1 missing: single_groups.0.router.y.weight",
        ),
        (
            lambda s: s.update({"double_blocks.0.img_moe.experts.3.0.weight": np.zeros((4, 16))}),
            r"1 unexpected: double_blocks.0.img_moe.experts.3.0.weight",
        ),
        (
            lambda s: s.update({"single_blocks.3.moe.gate.weight": np.zeros((2, 16))}),
            r"1 misshaped: single_blocks.3.moe.gate.weight \(file \(2, 16\), model \(3, 16\)\)",
        ),
    ],
)
def test_bad_tensors(run, tmp_path, change, message):
    _, file, _ = run
    bad = rewritten(file, tmp_path / "bad.safetensors", change)
    with pytest.raises(UserError, match=message):
        transfer.import_folder("flux_moe", bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bad_headers(run, tmp_path):
    _, file, _ = run
    bad, kept = tmp_path / "bad.safetensors", lambda state: None
    for metadata, message in (
        (
            {files.HPARAMS: "[1]"},
            "header of .*bad.safetensors are no table in JSON: pass --hparams",
        ),
        (
            {files.HPARAMS: json.dumps(run[0] | {"moe": {"num_expert": 3}})},
            "unknown hyperparameter 'num_expert' in moe",
        ),
        ({"format": "pt"}, "shapes do not tell all .*: write axes_dim into a file"),
    ):
        rewritten(file, bad, kept, metadata)
        with pytest.raises(UserError, match=message):
            transfer.import_folder("flux_moe", bad, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors"]
    hparams = tmp_path / "h.json"
    hparams.write_text(json.dumps(run[0]))
    done = transfer.import_folder("flux_moe", bad, tmp_path / "out", hparams=str(hparams))
    assert done["hparams"] == str(hparams)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": MOE | {"num_experts": "3"}}, "moe.num_experts is '3', not an integer"),
        ({"router": {}}, r"router lacks the hyperparameter\(s\) top_k"),
        ({"router": {"top_k": 4}}, "model.router.top_k = 4 .*model.moe.num_experts = 3"),
        ({"moe": None}, "a router without experts"),
        ({"mob": {"groups": ["4-6"]}}, r"mob lacks the hyperparameter\(s\) active"),
        ({"mob": MOB | {"groups": ["2-3"]}}, "has blocks of several kinds"),
        ({"mob": MOB | {"groups": ["4-7"]}}, "leaves the model, whose blocks are 0-6"),
        ({"mob": MOB | {"groups": "4-6"}}, "mob.groups is '4-6', not a list"),
        ({"adaln_rank": -1}, "adaln_rank is -1, outside"),
        ({"adaln": 3}, "unknown hyperparameter 'adaln' .*'adaln_rank'"),
    ],
)
def test_bad_hyperparameters(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        interop.config_from_torch("flux_moe", FLUX | CASES["all"] | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router.name": "expert_choice"}, "model.router.name = token_choice or dense, and"),
        ({"router.n_group": 1, "moe.mlp": "swiglu"}, r"model.moe.mlp = swiglu \(it has gelu\)"),
        ({"flux.vocabulary": "digits", "flux.text_width": 16}, "model.flux.vocabulary = digits"),
    ],
)
def test_models_that_cannot_be_written(tmp_path, changes, message):
    """Before anything is written, and before the weights are looked at."""
    config = interop.config_from_torch("flux_moe", FLUX | CASES["experts"]).to_dict()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config["model"][section][name] = value
    if changes.get("router.name"):
        config["model"]["router"] = {"name": changes["router.name"]}
    configs.save_json(configs.settle(config), tmp_path / "config.json")
    with pytest.raises(UserError, match=f"family flux_moe has .*{message}"):
        transfer.export_file("flux_moe", tmp_path, tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_other_families_say_what_they_lack(run, tmp_path):
    _, file, folder = run
    with pytest.raises(
        UserError, match="family 'flux' has no name for .* has no experts and no sh"
    ):
        transfer.export_file("flux", folder, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="its names are those of family flux_moe, not of flux"):
        transfer.import_folder("flux", file, tmp_path / "out")
    dit = {"input_size": 4, "hidden_size": 16, "num_heads": 2, "depth": 3, "num_classes": 3}
    config = interop.model_config_from_torch("dit", dit)
    config.router = configs.default().model.router
    config.mob.groups = ("0-1",)
    config.moe.interleave = False
    model = build(configs.settle({"model": config.to_dict()}).model)
    leaves = keymap.abstract_variables(model)
    for family in ("dit", "sit"):
        with pytest.raises(UserError, match="has no experts and no groups of blocks; use the fam"):
            keymap.entries_by_leaf(FAMILIES[family], model, leaves)
    with pytest.raises(UserError, match="model.architecture = flux, and this has dit"):
        configs.save_json(interop.config_from_torch("dit", dit), tmp_path / "config.json")
        transfer.export_file("flux_moe", tmp_path, tmp_path / "out.safetensors")


@pytest.mark.slow
def test_the_command(run, tmp_path, capsys):
    _, _, folder = run
    out = tmp_path / "moe.safetensors"
    convert.main(["--export", "--family", "flux_moe", "--input", str(folder), "--output", str(out)])
    args = ["--family", "flux_moe", "--input", str(out), "--output", str(tmp_path / "in")]
    convert.main(args)
    assert "hyperparameters of the header of moe.safetensors" in capsys.readouterr().out
    assert cli.contents(tmp_path / "in").keys() >= {"config.json"}
