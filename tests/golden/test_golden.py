"""Runs every golden case that is found; a case that nothing here knows is a failure."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_diffusion.interop import transfer

from . import (
    autoencoder,
    cases,
    clip,
    ddpm,
    dit_moe,
    flow,
    flux,
    inception,
    jit,
    metrics,
    network,
    probe,
    text,
    trajectory,
    trajectory_ddpm,
    trajectory_jit,
    trajectory_promoe,
)

# The first pattern that matches a case's `source` (where its maths comes from) decides how the
# case is checked, and which family reads its weights (or a function that tells it; None: the
# check itself does).
HANDLERS = (
    (r"diffusers \S+ AutoencoderKL.*", None, autoencoder.check),
    (r"FLUX\.1 native autoencoder.*", None, autoencoder.check),
    (r"transformers \S+ (CLIPTextModel|T5EncoderModel)", None, text.check),
    (r"transformers \S+ CLIPModel", None, clip.check),
    (r"FLUX\.1 native layout .*/flux: src/flux/model\.py.*", "flux", flux.check),
    (r"diffusers \S+ FluxTransformer2DModel", "flux_diffusers", flux.check),
    (r"\w+/evaluation/inception\.py: InceptionV3.*", None, inception.check),
    (r"\w+/evaluation/evaluator\.py and fid\.py.*", None, metrics.check),
    (r"DiT-MoE \(feizc\), models\.py: DiT; .*", "dit_moe", dit_moe.check),
    (r"ProMoE/models/models_ProMoE.*: DiT", probe.promoe_family, network.check),
    (r"ProMoE/train\.py .*/models_ProMoE_TC\.py: DiT", "promoe_tc", trajectory_promoe.check),
    (r"JiTMoE/model_jit\.py: JiT.*/denoiser\.py: Denoiser", jit.family, jit.check),
    (r"JiTMoE/main_jit\.py.* \(loop\).*/denoiser.*", jit.family, trajectory_jit.check),
    (r".*rectified_flow\.py: RectifiedFlow, with .*models_DSMoE\.py: DiT", "dsmoe", flow.check),
    (r".*/train\.py \(loop\).*/models_DSMoE\.py: DiT", "dsmoe", trajectory.check),
    (r".*/train\.py \(loop\).*/models_DiffMoE\.py: DiT", "diffmoe", trajectory.check),
    (r".*/train\.py \(loop\).*/models_TCDiT\.py: DiT", "tcdit", trajectory.check),
    (r"DiT \(facebookresearch\), models\.py: DiT", "dit", network.check),
    (r"\w+/diffusion/gaussian_diffusion\.py.*models_DiT\.py: DiT", "dit", ddpm.check),
    (r"DiT \(facebookresearch\), train\.py \(loop.*", "dit", trajectory_ddpm.check),
    (r"SiT \(willisma\), models\.py: SiT.*", "sit", network.check),
    (r"\w+/models/models_DSMoE\.py: DiT", "dsmoe", network.check),
    (r"\w+/models/models_TCDiT\.py: DiT", "tcdit", network.check),
    (r"\w+/models/models_ECDiT\.py: DiT", "ecdit", network.check),
    (r"\w+/models/models_DiffMoE\.py: DiT.*", "diffmoe", network.check),
)

# Long to compile; others check the same code with other routers. `-m golden` runs them, too.
SLOW = (
    ("jitmoe", jit.check),
    ("jitmoe", trajectory_jit.check),
    ("promoe_tc", trajectory_promoe.check),
    ("diffmoe", trajectory.check),
    ("tcdit", trajectory.check),
)

pytestmark = pytest.mark.golden


def test_cases_are_found():
    assert cases.find(), f"no golden cases in {cases.folder()}"


def _handler(case):
    """Family and check of a case, or None."""
    for pattern, family, check in HANDLERS:
        if re.fullmatch(pattern, case.config["source"]):
            return (family(case) if callable(family) else family), check
    return None


def _open(path):
    case = cases.Case(path)
    if handler := _handler(case):
        return case, *handler
    pytest.fail(f"no handler for the golden case '{path.name}' ({case.config['source']})")


HANDLED = {path: _handler(cases.Case(path)) for path in cases.find()}


def _each(paths):
    """For every path a test."""
    marks = {path: pytest.mark.slow if HANDLED[path] in SLOW else () for path in paths}
    values = [pytest.param(path, marks=mark, id=path.name) for path, mark in marks.items()]
    return pytest.mark.parametrize("path", values)


@_each(HANDLED)
def test_parity(path):
    case, family, check = _open(path)
    with jax.default_matmul_precision("highest"):
        check(case, family)


@_each(path for path, handler in HANDLED.items() if handler and handler[0])
def test_import_then_export_keeps_every_bit(path, tmp_path):
    case, family, _ = _open(path)
    for name in ("weights", "final"):
        if (path / f"{name}.safetensors").exists():
            folder, back = tmp_path / name, tmp_path / f"{name}.safetensors"
            hparams = str(path / "config.json")
            transfer.import_folder(family, path / back.name, folder, hparams=hparams)
            transfer.export_file(family, folder, back)
            state, back = case.tensors(name), load_file(back)
            assert set(state) == set(back)
            for key, tensor in state.items():
                assert back[key].dtype == tensor.dtype, key
                np.testing.assert_array_equal(back[key], tensor, err_msg=key)
