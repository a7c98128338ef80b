"""Runs every golden case that is found; a case that nothing here knows is a failure."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from moe_diffusion import interop, models

from . import cases, flow, network, trajectory

# The first pattern that matches a case's `source` (where its maths comes from) decides how the
# case is checked, and which family reads its weights.
HANDLERS = (
    (r".*rectified_flow\.py: RectifiedFlow, with .*models_DSMoE\.py: DiT", "dsmoe", flow.check),
    (r".*/train\.py \(loop\).*/models_DSMoE\.py: DiT", "dsmoe", trajectory.check),
    (r".*/train\.py \(loop\).*/models_DiffMoE\.py: DiT", "diffmoe", trajectory.check),
    (r".*/train\.py \(loop\).*/models_TCDiT\.py: DiT", "tcdit", trajectory.check),
    (r"DiT \(facebookresearch\), models\.py: DiT", "dit", network.check),
    (r"SiT \(willisma\), models\.py: SiT.*", "sit", network.check),
    (r"\w+/models/models_DSMoE\.py: DiT", "dsmoe", network.check),
    (r"\w+/models/models_TCDiT\.py: DiT", "tcdit", network.check),
    (r"\w+/models/models_ECDiT\.py: DiT", "ecdit", network.check),
    (r"\w+/models/models_DiffMoE\.py: DiT.*", "diffmoe", network.check),
)

pytestmark = pytest.mark.golden
every_case = pytest.mark.parametrize("path", cases.find(), ids=lambda path: path.name)


def test_cases_are_found():
    assert cases.find(), f"no golden cases in {cases.folder()}"


def _open(path):
    case = cases.Case(path)
    for pattern, family, check in HANDLERS:
        if re.fullmatch(pattern, case.config["source"]):
            return case, family, check
    pytest.fail(f"no handler for the golden case '{path.name}' ({case.config['source']})")


@every_case
def test_parity(path):
    case, family, check = _open(path)
    with jax.default_matmul_precision("highest"):
        check(case, family)


@every_case
def test_import_then_export_keeps_every_bit(path):
    case, family, _ = _open(path)
    model = models.build(interop.model_config_from_torch(family, case.hparams))
    for name in ("weights", "final"):
        if (path / f"{name}.safetensors").exists():
            _, variables = interop.load_torch(path / f"{name}.safetensors", family, case.hparams)
            state, back = case.tensors(name), interop.export_state_dict(variables, model, family)
            assert set(state) == set(back)
            for key, tensor in state.items():
                assert back[key].dtype == tensor.dtype, key
                np.testing.assert_array_equal(back[key], tensor, err_msg=key)
