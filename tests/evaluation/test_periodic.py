"""Evaluation while training: cheap features of a few draws, written to the metrics."""

from __future__ import annotations

import json

import numpy as np

from moe_diffusion import config as configs
from moe_diffusion import train
from moe_diffusion.conditions import Field
from moe_diffusion.evaluation import periodic
from moe_diffusion.evaluation.periodic import PooledFeatures
from moe_diffusion.models import build
from moe_diffusion.sampling import hooks
from moe_diffusion.synthetic import Synthetic
from tests import cli


def test_pooled_features_by_hand():
    image = np.zeros((1, 8, 8, 2), np.float32)
    image[0, 2:4, 6:8, 1] = [[1, 2], [3, 6]]
    features = PooledFeatures()(image)["pool"].reshape(4, 4, 2)
    assert features[1, 3, 1] == 3 and np.count_nonzero(features) == 1
    assert PooledFeatures()(np.zeros((3, 7, 7, 4)))["pool"].shape == (3, 64)


def test_a_run_judges_itself_at_intervals(tmp_path):
    keys = {"train__num_steps": 4, "train__sample_every": 2, "train__samples": 8}
    args = cli.digits(**keys, train__eval_samples=8, sampling__steps=1)
    train.main([*args, "--workdir", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in judged] == [2, 4]
    names = {f"eval/{name}_digits" for name in ("fd", "precision", "recall", "kd")}
    assert set(judged[0]) == {"step"} | names
    assert all(np.isfinite(list(line.values())).all() for line in judged)
    assert judged[0]["eval/fd_digits"] != judged[1]["eval/fd_digits"]
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_hooks_see_the_parameters_that_are_not_trained(tmp_path):
    keys = {"train__num_steps": 1, "train__sample_every": 1, "train__samples": 4}
    keys |= {"optim__trainable": "final/*", "train__eval_samples": 8, "sampling__steps": 1}
    train.main([*cli.digits(**keys), "--workdir", str(tmp_path)])
    assert (tmp_path / "samples" / "00000001.png").exists()
    assert "eval/fd_digits" in (tmp_path / "metrics.jsonl").read_text()


def test_other_data_is_judged_in_the_model_s_space(monkeypatch):
    """Records of the source are near it, noise is far."""
    config = configs.default()
    config.model.image_size, config.model.channels, config.train.eval_samples = 8, 4, 64
    config.data.source = "synthetic"
    source = Synthetic((8, 8, 4), {"label": Field((), "int32", 1000)}, size=5000)
    noise = np.random.default_rng(0).standard_normal((64, 8, 8, 4))
    monkeypatch.setattr(hooks, "averaged_variables", lambda *_: {})
    hook = periodic.EvaluationHook(config, build(config.model), source)

    def judge(images):
        monkeypatch.setattr(hooks, "generate", lambda *_, **__: images)
        return hook(1, None)

    real = judge(source.take(np.arange(0, 5000, 79))["image"])
    assert set(real) == {f"eval/{name}_pooled" for name in ("fd", "precision", "recall", "kd")}
    assert real["eval/fd_pooled"] < 0.5 * judge(noise)["eval/fd_pooled"]
    assert real["eval/precision_pooled"] > 0.9
