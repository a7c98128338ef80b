"""Two digits from prompts by the command lines: train, draw, score."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import evaluate, load, sample, train
from moe_diffusion.digit_pairs import held_out_prompts
from moe_diffusion.empty_prompt import FILE
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.scorers import SCORERS, PromptedPair, Wanted, chosen_scorers

TINY = {
    "model.depth": 2,
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.moe.hidden_size": 16,
    "model.dit_t2i.text_width": 16,
    "data.batch_size": 8,
    "optim.warmup_steps": 0,
    "train.num_steps": 4,
    "train.log_every": 1,
    "train.sample_every": 2,
    "train.samples": 4,
    "checkpoint.every": 2,
    "sampling.steps": 2,
}


def train_args(workdir, router="diffmoe", **changes):
    values = TINY | changes
    keys = [f"--config.{key}={value}" for key, value in values.items()]
    return ["--config", f"configs/digits_t2i.py:router={router}", "--workdir", str(workdir), *keys]


def test_pairs_of_real_digits_are_what_they_are():
    """Images that are made of real digits: nearly all right, and none if they are swapped."""
    from moe_diffusion.data.sources import Digits

    digits, texts, images, swapped = Digits("test"), [], [], []
    for text, (left, right) in held_out_prompts(100):
        pair = [digits.images[digits.labels == digit][3] for digit in (left, right)]
        texts.append(text)
        images.append(np.concatenate(pair, axis=1))
        swapped.append(np.concatenate(pair[::-1], axis=1))
    wanted = Wanted(None, (8, 16, 1), texts)
    (scorer,) = chosen_scorers(wanted).values()
    assert isinstance(scorer, PromptedPair)
    found = scorer.metrics(scorer.rows(np.stack(images), texts), texts)
    assert found["prompt_accuracy"] > 0.9 and found["digits_accuracy"] > 0.95
    other = scorer.metrics(scorer.rows(np.stack(swapped), texts), texts)
    assert other["content_accuracy"] == found["content_accuracy"]
    assert other["prompt_accuracy"] <= 0.1  # the ten pairs of equal digits
    assert SCORERS["pairs"](Wanted(None, (8, 16, 1), [*texts, "a cat"])) is None
    assert SCORERS["pairs"](Wanted(None, (8, 8, 1), texts)) is None


@pytest.mark.slow
def test_train_draw_and_score(tmp_path, capsys):
    run, drawn = tmp_path / "run", tmp_path / "drawn"
    train.main(train_args(run))
    assert len(list((run / "samples").iterdir())) == 2 and not (run / FILE).exists()
    args = ["--workdir", str(run), "--prompt", "a 3 left of a seven", "--prompt", "an 8 after a 1"]
    sample.main([*args, "--num-per-prompt", "2", "--images", str(drawn), "--out", f"{drawn}.png"])
    for number, path in enumerate(sorted(drawn.iterdir())):
        with Image.open(path) as picture:
            assert picture.size == (16, 8)
            assert picture.text["prompt"] == args[3 + 2 * (number // 2)]
    with pytest.raises(UserError, match="does not know the word 'beside'"):
        load(run)(prompts=["a three beside a seven"])
    capsys.readouterr()
    evaluate.main(["--workdir", str(run), "--prompts", "digit_pairs", "--num", "1000", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = {"prompt_accuracy", "content_accuracy", "digits_accuracy", "classifier_accuracy"}
    assert names <= result["metrics"].keys() and result["num_samples"] == 1000
    assert result["metrics"]["prompt_accuracy"] <= result["metrics"]["content_accuracy"]
