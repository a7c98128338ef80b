"""The empty prompt of a run: kept in its workdir, checked when it is resumed, used to guide."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion import classes, empty_prompt
from moe_diffusion import config as configs
from moe_diffusion.empty_prompt import FILE, EmptyPrompt
from moe_diffusion.errors import UserError
from moe_diffusion.models import build

FIELDS = {
    "text": np.arange(12).reshape(3, 4).astype(jnp.bfloat16),
    "text_mask": np.array([True, False, False]),
    "pooled": np.array([0.1, -2], np.float32),
}


class Captioned:
    cond_spec, null = {}, FIELDS

    def __len__(self):
        return 7


def test_a_workdir_keeps_it(tmp_path):
    assert empty_prompt.of_run(tmp_path) is None
    known = classes.of_source(Captioned(), "latents:there")
    known.save(tmp_path)
    again = classes.of_run(tmp_path)
    assert again == known and again.empty == EmptyPrompt(FIELDS)
    for name, value in again.empty.fields.items():
        assert value.dtype == FIELDS[name].dtype
        np.testing.assert_array_equal(value, FIELDS[name])


def test_other_data_of_another_encoder_is_refused(tmp_path):
    known = classes.of_source(Captioned(), "latents:there")
    classes.check_same(known, known, tmp_path)
    for null in (FIELDS | {"pooled": FIELDS["pooled"] + 1}, {}):
        now = classes.of_source(type("Other", (Captioned,), {"null": null})())
        with pytest.raises(UserError, match="another empty prompt"):
            classes.check_same(known, now, tmp_path)
    classes.check_same(classes.NOTHING, known, tmp_path)


@pytest.mark.parametrize("damage", [
    lambda text: text[:-9],
    lambda text: text.replace("base64", "base65"),
    lambda text: text.replace("AAA", "AAB", 1),
    lambda text: "[]",
])  # fmt: skip
def test_a_damaged_file_is_one_line(tmp_path, damage):
    EmptyPrompt(FIELDS).save(tmp_path)
    path = tmp_path / FILE
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=FILE):
        empty_prompt.of_run(tmp_path)


@pytest.mark.parametrize("change", [
    {"dtype": "object"}, {"shape": [3, 5]}, {"shape": [-1]}, {"base64": "?"}, {"dtype": 3},
])  # fmt: skip
def test_values_that_cannot_be_are_one_line(tmp_path, change):
    EmptyPrompt(FIELDS).save(tmp_path)
    values = json.loads((tmp_path / FILE).read_text())
    values["text"] |= change
    (tmp_path / FILE).write_text(json.dumps(empty_prompt.digests.seal(
        {name: value for name, value in values.items() if name != "digest"})))  # fmt: skip
    with pytest.raises(UserError, match=FILE):
        empty_prompt.of_run(tmp_path)


def test_models_without_texts_and_guidance_scales_stay_as_they_are():
    dit = build(configs.load("configs/digits.py:router=dense").model)
    assert empty_prompt.told(dit, EmptyPrompt(FIELDS)) is dit
    cond = {"text": jnp.ones((2, 3, 4)), "guidance": jnp.array([1.0, 3.5])}
    null = empty_prompt.null(cond, EmptyPrompt(FIELDS))
    np.testing.assert_array_equal(null["guidance"], cond["guidance"])
    np.testing.assert_array_equal(null["text"], np.stack([FIELDS["text"]] * 2).astype(np.float32))
    zeros = empty_prompt.null(cond, None)
    assert not np.any(zeros["text"]) and np.all(zeros["guidance"] == cond["guidance"])


def test_flux_takes_it_too():
    model = build(configs.load("configs/flux_tiny.py").model)
    spec = {n: f for n, f in model.cond_spec().items() if n != "guidance"}
    fields = {n: np.full(f.shape, 2, jnp.dtype(f.dtype)) for n, f in spec.items()}
    model = empty_prompt.told(model, EmptyPrompt(fields))
    cond = {n: jnp.zeros((3, *f.shape), f.dtype) for n, f in model.cond_spec().items()}
    null = model.null(cond)
    assert np.all(null["text"] == 2) and np.all(null["pooled"] == 2) and not null["guidance"].any()
