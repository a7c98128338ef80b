"""Golden case folders: where they lie, what is in them, how arrays are compared."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

TOLERANCE = 1e-4
# Stored arrays that are inputs, or intermediates that our modules do not name: not compared.
NOT_COMPARED = re.compile(
    r"in/|mid/|(eval|train)/mid/|rope/|buf/|cfg/|(\w+/)?router/.*/(logits|group_scores|cos_sim)$"
    r"|loss/(z|labels|e_unit)$|sample/(z0_unit|labels|eval_t)$"
    r"|(train|loss|flow)/(x|x0|x1|x_start|z0|noise|t|t_normal|y|drop_uniform|cotangent)$"
    r"|(train|loss|flow)/(y_effective|layer_idx|zt|xt|ut)$|train/CapacityPred_loss_weight$"
    r"|sample/(z|y|y_null|cfg|cfg_scale|step_noise)$|sample/.*/eval_t$|step/(x_t|t_index|y|noise)$"
)


def folder() -> Path:
    """The goldens to test on."""
    default = Path(__file__).parent.parent / "goldens"
    return Path(os.environ.get("MOE_DIFFUSION_GOLDENS", default))


def find() -> list[Path]:
    """All case folders, by name."""
    return sorted(path.parent for path in folder().glob("*/config.json"))


def nhwc(array: np.ndarray) -> np.ndarray:
    """[..., C, H, W] -> [..., H, W, C]."""
    return np.moveaxis(array, -3, -1)


class Case:
    """One folder; remembers which of its arrays were compared."""

    def __init__(self, path: Path):
        self.path = path
        self.config = json.loads((path / "config.json").read_text())
        model = self.config.get("model", {})
        self.hparams = model.get("model", model)
        self._compared: set[str] = set()

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path / "io.npz") as stored:
            return dict(stored)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def image(self, key: str) -> np.ndarray:
        """An array of images in our layout."""
        return nhwc(self.arrays[key])

    def labels(self, prefix: str) -> np.ndarray:
        """Training labels, the null class where the recorded uniform says so."""
        drop = self[f"{prefix}/drop_uniform"] < self.hparams["class_dropout_prob"]
        y = np.where(drop, self.hparams["num_classes"], self[f"{prefix}/y"])
        for key in (f"{prefix}/y_effective", f"{prefix}/mid/y_effective"):
            if key in self:
                self.compare(key, y)
        return y

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """A state dict, `weights` or `grads` or ..., under PyTorch's names."""
        return load_file(self.path / f"{name}.safetensors")

    def compare(self, key: str, ours, **tolerance) -> None:
        """Asserts that a stored array is close to ours, within 1e-4 unless told otherwise."""
        stored = nhwc(self[key]) if key.startswith("out/") and self[key].ndim > 2 else self[key]
        tolerance = {"atol": TOLERANCE, "rtol": TOLERANCE, **tolerance}
        ours = np.asarray(ours)
        assert ours.shape == stored.shape, f"{key}: shape {ours.shape}, stored {stored.shape}"
        if np.issubdtype(stored.dtype, np.integer):
            np.testing.assert_array_equal(ours, stored, err_msg=key)
        else:
            np.testing.assert_allclose(ours, stored, err_msg=key, **tolerance)
        self.seen(key)

    def seen(self, key: str) -> None:
        """Notes that a stored array was compared in a way of its own."""
        self._compared.add(key)

    def compare_tensors(self, name: str, ours: dict[str, np.ndarray]) -> None:
        """Asserts that every tensor of a file is close to ours under the same name."""
        stored = self.tensors(name)
        assert set(stored) == set(ours)
        for key, tensor in stored.items():
            np.testing.assert_allclose(
                ours[key], tensor, atol=TOLERANCE, rtol=TOLERANCE, err_msg=f"{name}: {key}"
            )

    def assert_all_compared(self) -> None:
        """Fails if a stored result was overlooked, so that no check is skipped in silence."""
        rest = set(self.arrays) - self._compared
        rest = sorted(key for key in rest if not NOT_COMPARED.match(key))
        assert not rest, f"{self.path.name}: these stored results were not compared: {rest}"
