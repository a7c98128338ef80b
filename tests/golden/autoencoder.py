"""Checks of autoencoders: moments, decoding, intermediates, and weights there and back."""

from __future__ import annotations

import re

import numpy as np

from moe_diffusion.interop import autoencoder as interop
from moe_diffusion.models.autoencoder import Autoencoder

from . import probe

# Modules whose outputs are stored, in native and diffusers names -> ours.
MODULES = (
    (r"(en|de)coder\.(conv_in|conv_out)", r"\1coder/\2"),
    (r"encoder\.down_blocks\.(\d+)", r"encoder/level_\1"),
    (r"(en|de)coder\.(mid_attention|mid\.attn_1)", r"\1coder/mid/attn"),
    (r"(en|de)coder\.(mid_block|mid\.block_2)", r"\1coder/mid/block_1"),
)


def check(case, family: str) -> None:
    """All stored results of the case."""
    state = case.tensors("weights")
    net = interop.network_from_config(case.hparams["ae"])
    params = interop.import_state_dict(state, net)
    back = interop.export_state_dict(params, net, interop.layout_of(state))
    assert set(back) == set(state)
    for key, tensor in state.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)

    image, latent, noise = (case.image(f"in/{name}") for name in ("image", "latent", "eps"))
    (mean, logvar), encoder = _apply(net, params, "moments", image)
    decoded, decoder = _apply(net, params, "decode", latent)
    z = mean + np.exp(0.5 * logvar) * noise
    ours = {
        "mid/std": np.exp(0.5 * logvar),
        "mid/sample": z,
        "mid/mean": mean,
        "mid/logvar": logvar,
        "out/mean": mean,
        "out/logvar": logvar,
        "out/decode": decoded,
        "out/reconstruction": _apply(net, params, "__call__", image)[0],
        "out/encode": (mean - net.shift) * net.scale,
        "out/encode_sampled": (z - net.shift) * net.scale,
    }
    if "out/encode" in case:  # the native class scales inside
        ours["out/decode"], decoder = _apply(net, params, "decode", latent / net.scale + net.shift)
    if "mid/decode_of_scaled_latent" in case:
        ours["mid/decode_of_scaled_latent"] = Autoencoder(net, params).decode(latent)
    for key in case.arrays:
        if key in ours:
            compare(case, key, ours[key])
        elif module := _module(key, len(net.block_channels)):
            compare(case, key, (encoder if "encoder" in key else decoder)[module])
        else:
            assert key.startswith("in/") or key == "mid/moments", f"unknown result {key}"
    if "mid/moments" in case:  # the log variance before it is clamped
        compare(case, "mid/moments", np.concatenate([mean, logvar], -1))
    case.assert_all_compared()


def compare(case, key: str, ours: np.ndarray) -> None:
    stored = case.image(key)
    assert np.shape(ours) == stored.shape, key
    np.testing.assert_allclose(ours, stored, atol=1e-4, rtol=1e-4, err_msg=key)
    case.seen(key)


def _module(key: str, levels: int) -> str | None:
    """Our path of the module whose output is stored as mid/<name>."""
    name = key.removeprefix("mid/")
    if number := re.fullmatch(r"decoder\.up_blocks\.(\d+)", name):
        return f"decoder/level_{levels - 1 - int(number[1])}"
    for pattern, ours in MODULES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return None


def _apply(net, params, method: str, x: np.ndarray):
    """A method's output, and the outputs of all modules by path."""

    def function(params, x):
        return net.apply({"params": params}, x, method=method, capture_intermediates=True)

    output, sown = probe.jit(function)(params, x)
    modules = {}

    def walk(node, path):
        for name, child in node.items():
            if name == "__call__":
                modules["/".join(path)] = child[0]
            elif isinstance(child, dict):
                walk(child, (*path, name))

    walk(sown["intermediates"], ())
    return output, modules
