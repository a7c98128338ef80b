"""Checks of FLUX.1 in both layouts: every block, schedules, and the Euler sampler."""

from __future__ import annotations

import re

import jax
import numpy as np

from moe_diffusion import interop, models
from moe_diffusion.diffusion import samplers, solvers
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.interop.keymap import export_tree
from moe_diffusion.models import blocks
from moe_diffusion.models.flux_blocks import rope_angles

from . import probe

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
# Stored embedder outputs, in both layouts -> ours.
EMBEDDERS = {
    "img_in": "patch_embed",
    "txt_in": "text_embed",
    "time_in": "time_embed",
    "guidance_in": "guidance_embed",
    "vector_in": "pooled_embed",
    "x_embedder": "patch_embed",
    "context_embedder": "text_embed",
}
BLOCKS = re.compile(r"(?:(single)_|double_)?(?:transformer_)?blocks\.(\d+)(\.\w+)?")
INPUTS = {
    "flux": ("in/img", "in/txt", "in/vec", "in/timesteps"),
    "flux_diffusers": (
        *("in/hidden_states", "in/encoder_hidden_states", "in/pooled_projections"),
        "in/timestep",
    ),
}


def check(case, family: str) -> None:
    """All stored results of the case."""
    tokens, text, pooled, noise_share = (case[key] for key in INPUTS[family])
    config = _config(case, family, text.shape[1])
    model = models.build(config.model)
    variables = interop.import_state_dict(case.tensors("weights"), model, family)
    assert interop.family_of(model) == "flux"
    cond = {"text": text, "pooled": pooled} | (
        {"guidance": case["in/guidance"]} if "in/guidance" in case else {}
    )
    t = (1 - noise_share.astype(np.float64)).astype(np.float32)
    numbers = tuple(range(len(model.blocks())))
    forward = probe.jit(
        lambda v, x, t, cond: model.apply(
            v, x, t, cond, False, numbers, capture_intermediates=_is_embedder
        )
    )
    x = unpack(tokens, model.grid)
    (velocity, features), sown = forward(variables, x, t, cond)
    _compare(case, "out/forward", -pack(velocity))
    _check_intermediates(case, model, velocity, features, sown["intermediates"], t)
    if "in/latent" in case:
        np.testing.assert_array_equal(x, case.image("in/latent"))
        _check_schedules(case, config.sampling)
        _check_sampler(case, config, model, variables, cond)
    _check_other_layout(case, family, model, variables)
    case.assert_all_compared()


def pack(image) -> np.ndarray:
    """[B, H, W, C] -> FLUX's tokens [B, H/2 * W/2, C * 4], a token as (C, row, column)."""
    b, h, w, c = image.shape
    parts = np.asarray(image).reshape(b, h // 2, 2, w // 2, 2, c)
    return parts.transpose(0, 1, 3, 5, 2, 4).reshape(b, h * w // 4, c * 4)


def unpack(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The inverse of `pack`."""
    b, _, features = tokens.shape
    parts = tokens.reshape(b, *grid, features // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(b, 2 * grid[0], 2 * grid[1], features // 4)


def _config(case, family: str, text_tokens: int):
    """The case's config; the positions of its tokens tell the size of the image."""
    config = interop.config_from_torch(family, case.hparams["params"])
    ids = case["in/img_ids"].reshape(-1, 3)
    rows, columns = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
    config.model.update(image_size=2 * rows, image_width=2 * columns)
    config.model.flux.text_tokens = text_tokens
    assert not case["in/txt_ids"].any() and not ids[:, 0].any()
    return config


def _is_embedder(module, _) -> bool:
    return module.name in EMBEDDERS.values()


def _compare(case, key: str, ours) -> None:
    stored = case[key]
    assert np.shape(ours) == stored.shape, f"{key}: {np.shape(ours)}, stored {stored.shape}"
    np.testing.assert_allclose(ours, stored, err_msg=key, **TOLERANCE)
    case.seen(key)


def _check_intermediates(case, model, velocity, features, embedded, t) -> None:
    """Every stored array of the forward pass; an unknown one is an error."""
    text = model.text_tokens
    angles = rope_angles(model.grid, text + model.grid[0] * model.grid[1], model.rope_axes)
    cos, sin = np.cos(angles), np.sin(angles)
    outputs = {name: module["__call__"][0] for name, module in embedded.items()}
    vectors = sum(outputs[name] for name in outputs if name not in ("patch_embed", "text_embed"))
    rotation = np.stack([cos, -sin, sin, cos], axis=-1).reshape(1, 1, *cos.shape, 2, 2)
    ours = {
        "pe_embedder": np.repeat(rotation, len(t), axis=0),
        "rope_cos": np.repeat(cos, 2, axis=1),
        "rope_sin": np.repeat(sin, 2, axis=1),
        "timestep_embedding": blocks.time_features(model.time_scale * (1 - t)),
        "time_text_embed": vectors,
        "final_layer": -pack(velocity),
    }
    for key in (key for key in case.arrays if key.startswith("mid/")):
        name = key.removeprefix("mid/")
        if match := BLOCKS.fullmatch(name):
            single, number, stream = match.groups()
            found = features[int(number) + (model.depth if single else 0)]
            if single and stream:
                found = {".txt": found[:, :text], ".img": found[:, text:]}[stream]
            elif not single:
                found = found[(".img", ".txt").index(stream)]
            _compare(case, key, found)
        elif name in EMBEDDERS:
            _compare(case, key, outputs[EMBEDDERS[name]])
        else:
            _compare(case, key, ours[name])


def _check_schedules(case, sampling) -> None:
    """Every schedule: the shares of noise that the sampler goes through."""
    for key in (key for key in case.arrays if re.fullmatch(r"schedule/\w", key)):
        steps, tokens, shifted = case[f"{key}_args"].tolist()
        asked = sampling.copy_and_resolve_references()
        asked.update(steps=steps, time_shift="resolution" if shifted else "none")
        _compare(case, key, 1 - solvers.time_grid(asked, (1, 2 * tokens, 2, 4)))
        case.seen(f"{key}_args")


def _check_sampler(case, config, model, variables, cond) -> None:
    """Euler steps from the stored latent; dev's are shifted, schnell's are not."""
    noise_share = case["sample/timesteps"]
    config.sampling.steps = len(noise_share) - 1
    assert (config.sampling.sampler, config.sampling.cfg) == ("euler", 1)
    z = case.image("in/latent")
    _compare(case, "sample/timesteps", 1 - solvers.time_grid(config.sampling, z.shape))
    if model.guidance:
        cond = {**cond, "guidance": np.full(len(z), case["sample/guidance"])}
    run = samplers.make_sampler(model, config)
    sample = probe.compiled(run, variables, z, cond)(variables, z, cond)
    _compare(case, "out/sample", pack(sample))
    np.testing.assert_allclose(sample, case.image("sample/unpacked"), **TOLERANCE)
    for key in ("sample/guidance", "sample/unpacked"):
        case.seen(key)


def _check_other_layout(case, family: str, model, variables) -> None:
    """The weights as the other layout's names, and back: the same bits."""
    other = FAMILIES[next(name for name in INPUTS if name != family)]
    state = export_tree(variables, other, model)
    back = interop.import_state_dict(state, model, other.name)
    jax.tree.map(np.testing.assert_array_equal, back["params"], variables["params"])
