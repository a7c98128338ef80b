"""Hyper-FLUX: its config, and a LoRA that is merged into a FLUX.1 or refused."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from moe_diffusion import config as configs
from moe_diffusion import convert
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.training.checkpoint import StoredWeights
from tests import cli
from tests.sampling import flux_folder


def test_eight_evaluations_of_the_network():
    """The model of FLUX.1 [dev] and its schedule, in 8 steps, each of one evaluation."""
    config, dev = configs.load("hyper_flux"), configs.load("flux_dev")
    dev.name, dev.sampling.steps = "hyper_flux", 8
    assert config == dev and config.sampling.cfg == 1.0
    times = []

    def apply(variables, x, t, cond, train):
        jax.debug.callback(lambda t: times.append(float(t)), t[0])
        return jnp.zeros_like(x)

    model = SimpleNamespace(apply=apply, null=lambda cond: cond)
    noise = jnp.zeros((1, 128, 128, 16))
    jax.block_until_ready(make_sampler(model, config)({}, noise, {}))
    jax.effects_barrier()
    # 4,096 tokens: noise shares u = 1, 7/8 .. 1/8 become e^1.15 / (e^1.15 + 1 / u - 1).
    shares = np.arange(8, 0, -1) / 8
    wanted = 1 - np.exp(1.15) / (np.exp(1.15) + 1 / shares - 1)
    np.testing.assert_allclose(sorted(times), wanted, atol=1e-6)


def test_a_lora_at_an_eighth(tmp_path, capfd):
    """W + 0.125 * alpha / rank * B A in one projection; keys that fit nothing write nothing."""
    folder = flux_folder.write(tmp_path / "FLUX.1-tiny")
    rng = np.random.default_rng(0)
    down, up = (rng.normal(size=s).astype(np.float32) for s in ((2, 16), (16, 2)))
    path = tmp_path / "lora.safetensors"

    def write(name):
        save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)

    def kernel(workdir):
        leaf = "params/layers_0/block_0/text_attn/proj/kernel"
        with StoredWeights(workdir, ema=None) as weights:
            return weights.read({leaf: None})[leaf].reshape(16, 16)

    args = ["--family", "flux_diffusers", "--input", str(folder), "--output"]
    convert.main([*args, str(tmp_path / "plain")])
    write("transformer.transformer_blocks.0.attn.to_add_out")
    lora = ["--lora", str(path), "--lora-scale", "0.125"]
    convert.main([*args, str(tmp_path / "merged"), *lora])
    change = kernel(tmp_path / "merged") - kernel(tmp_path / "plain")
    np.testing.assert_allclose(change, 0.125 * (up @ down).T, atol=1e-6)

    write("unet.down_blocks.0.attentions.0.to_q")
    other = [*args, str(tmp_path / "other"), *lora]
    refused = cli.refused(capfd, convert.main, other)
    assert "changes no tensor of these weights: down_blocks.0.attentions.0.to_q" in refused
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a pointer of Git LFS" in cli.refused(capfd, convert.main, other)
    assert not (tmp_path / "other").exists()
