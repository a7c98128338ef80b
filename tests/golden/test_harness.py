"""The harness itself: nothing is skipped in silence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from . import cases, test_golden


def write(folder, source, **arrays):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"source": source, "model": {}}))
    np.savez(folder / "io.npz", **arrays)
    return folder


def test_an_unknown_case_fails(tmp_path, monkeypatch):
    path = write(tmp_path / "vit_tiny", "ViT/models.py: ViT")
    monkeypatch.setenv("MOE_DIFFUSION_GOLDENS", str(tmp_path))
    assert cases.find() == [path]
    with pytest.raises(pytest.fail.Exception, match="no handler for the golden case 'vit_tiny'"):
        test_golden.test_parity(path)


def test_an_overlooked_result_fails(tmp_path):
    arrays = {"in/x": np.zeros(1), "out/a": np.ones(2), "out/b": np.ones(2)}
    case = cases.Case(write(tmp_path / "case", "", **arrays))
    case.compare("out/a", np.ones(2))
    with pytest.raises(AssertionError, match=r"not compared: \['out/b'\]"):
        case.assert_all_compared()
    with pytest.raises(AssertionError, match="out/b"):
        case.compare("out/b", np.full(2, 1.001))
