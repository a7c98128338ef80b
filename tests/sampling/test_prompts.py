"""Prompts to the condition of a model, and back to captions."""

from __future__ import annotations

import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion import demo
from moe_diffusion.digit_prompts import prompts
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.sampling.conditions import captions
from moe_diffusion.sampling.prompt_files import categories_of, open_prompts
from moe_diffusion.sampling.prompts import prompt_encoder
from moe_diffusion.vocabulary import TOKENS


def loaded(spec):
    config = configs.load(spec)
    return config, build(config.model)


def test_a_model_with_a_vocabulary(capfd):
    config, model = loaded("configs/digits_flux.py")
    encode = prompt_encoder(config, model)
    cond = encode(["A handwritten seven", "the 3, written by hand"])
    assert encode.max_tokens == 12 and cond.keys() == model.cond_spec().keys()
    assert cond[TOKENS].shape == (2, 12) and cond[TOKENS].dtype == np.int32
    assert captions(model, cond) == ["a handwritten seven", "the 3, written by hand"]
    encode(["a " * 12 + "small seven"])
    assert "more than 12 tokens is cut; lost: small seven" in capfd.readouterr().err
    with pytest.raises(UserError, match="'sevn' of a prompt; words like it are: seven"):
        encode(["a sevn"])


def test_a_model_that_reads_no_words():
    with pytest.raises(UserError, match="takes no prompts: its condition has label"):
        prompt_encoder(*loaded("configs/digits.py"))
    with pytest.raises(UserError, match="prompts need the text encoders of FLUX.1"):
        prompt_encoder(*loaded("configs/flux_tiny.py"))


def test_what_the_demonstration_asks_for():
    """1,000 images of ten digits, in words that were held out, or by their labels."""
    config, model = loaded("configs/digits_flux.py")
    cond, digits, texts = demo.asked(config, model)
    assert cond[TOKENS].shape == (1000, 12) and np.bincount(digits).tolist() == [100] * 10
    assert captions(model, cond) == texts.tolist() and len(set(texts)) == 100
    for digit in range(10):
        assert set(texts[digits == digit]) <= set(prompts(digit, held_out=True))
    cond, digits, names = demo.asked(*loaded("configs/digits.py"))
    assert cond["label"] is digits is names and np.bincount(digits).tolist() == [100] * 10


def test_prompts_with_categories(tmp_path):
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("a fox\n\n a cat \n")
    assert open_prompts(plain).prompts == ["a fox", "a cat"]
    assert categories_of(open_prompts(plain)) == {}
    lines.write_text(
        '{"prompt": "a fox", "category": "animals"}\n\n{"prompt": "a cup"}\n'
        '{"prompt": " a fox ", "id": 3}\n'
    )
    assert open_prompts(lines).prompts == ["a fox", "a cup", "a fox"]
    assert categories_of(open_prompts(lines)) == {"a fox": "animals"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a fox", "line 2 of .* is no JSON object: write {"),
        ('["a fox"]', "line 2 of .* is no JSON object"),
        ('{"text": "a fox"}', "line 2 of .* lacks prompt"),
        ('{"prompt": 3}', "line 2 of .*: prompt is 3, not text"),
        ('{"prompt": "a", "category": ["b"]}', "line 2 of .*: category is"),
        ('{"prompt": " "}', "line 2 of .*: prompt is empty"),
        ('{"prompt": "a cup", "category": "food"}', "in the categories 'things' and 'food'"),
    ],
)
def test_lines_that_are_no_prompts(line, message, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cup", "category": "things"}\n' + line)
    with pytest.raises(UserError, match=message):
        categories_of(open_prompts(path))
