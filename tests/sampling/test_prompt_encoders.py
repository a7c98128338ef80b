"""Which encoder reads a model's prompts, and the condition that it makes; sizes in pixels."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion.classes import Classes, of_run
from moe_diffusion.conditions import Field
from moe_diffusion.config.sizes import parse_size, size_changes
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.sampling import flags
from moe_diffusion.sampling.prompts import condition, prompt_encoder, takes_prompts
from tests.interop import pipeline_folder

SPEC = {"text": Field((6, 16), "float32"), "pooled": Field((16,), "float32")}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return pipeline_folder.write(tmp_path_factory.mktemp("pipeline") / "flux")


def model_of(spec):
    return SimpleNamespace(cond_spec=lambda: spec)


def raises(message):
    return pytest.raises(UserError, match=message)


def test_text_encoders_of_a_pipeline(pipeline, capfd):
    """The fields in the dtypes of the model; T5's 6 tokens hold five words and the end."""
    config = configs.default()
    config.data.text_encoders = str(pipeline)
    for place in (None, pipeline):
        encode = prompt_encoder(config, model_of(SPEC), place)
    made = encode(["a digit", "a handwritten digit of the seven"])
    assert encode.max_tokens == 6 and {n: v.shape[1:] for n, v in made.items()} == {
        name: field.shape for name, field in SPEC.items()
    }
    assert {v.dtype for v in made.values()} == {np.dtype("float32")}
    assert capfd.readouterr().err.endswith("more than 6 tokens is cut; lost: seven\n")
    wide = SPEC | {"pooled": Field((8,), "float32")}
    with raises(r"make pooled \[16\], the model takes \[8\]: name those that belong to it"):
        prompt_encoder(config, model_of(wide))
    with raises("prompts need the text encoders of FLUX.1: name the folder of its pipeline"):
        prompt_encoder(configs.default(), model_of(SPEC))


def test_a_mask_and_no_pooled_text(pipeline, tmp_path):
    """Which fields are made is that of the model; without `pooled`, CLIP need not be there."""
    folder = shutil.copytree(pipeline, tmp_path / "flux")
    masked = {"text": SPEC["text"], "text_mask": Field((6,), "bool")}
    both = prompt_encoder(configs.default(), model_of(SPEC | masked), folder)(["a digit"])
    assert both.keys() == {"text", "text_mask", "pooled"}
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    made = prompt_encoder(configs.default(), model_of(masked), folder)(["a digit", ""])
    assert made.keys() == masked.keys() and made["text_mask"].dtype == bool
    assert made["text_mask"].tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5]
    np.testing.assert_array_equal(made["text"][0], both["text"][0])
    with raises("no tokenizer at"):
        prompt_encoder(configs.default(), model_of(SPEC), folder)


def test_other_encoders_than_those_of_the_training(pipeline, tmp_path):
    """As the run knows it; where nothing is known, every encoder that fits is taken."""
    folder = shutil.copytree(pipeline, tmp_path / "flux")
    config, model = configs.default(), model_of(SPEC)
    made_by = prompt_encoder(config, model, folder)._encoders.describe()
    known = Classes(text=made_by)
    prompt_encoder(config, model, folder, known)
    known.save(tmp_path)
    assert of_run(tmp_path).text == made_by and of_run(tmp_path) == known
    pipeline_folder.replace_t5(folder, seed=1)
    prompt_encoder(config, model, folder)
    with raises("the field text of the data that this model was trained with was made by another"):
        prompt_encoder(config, model, folder, of_run(tmp_path))


def test_a_model_of_labels_reads_none():
    config = configs.load("digits")
    model = build(config.model)
    assert not takes_prompts(model) and takes_prompts(model_of(SPEC))
    with raises("takes no prompts: its condition has label; choose a model that reads"):
        prompt_encoder(config, model)
    with raises("guidance: this model was not distilled with a guidance scale"):
        condition(lambda prompts: {}, model, ["a"], guidance=2.0)


def test_each_prompt_is_encoded_once():
    """Five images of three prompts, of which two are the same: 2, 2 and 1, in order."""
    asked = []

    def encode(prompts):
        asked.extend(prompts)
        return {"text": np.arange(len(prompts), dtype=np.float32)}

    spec = {"text": Field((), "float32"), "guidance": Field((), "float32")}
    found = condition(encode, model_of(spec), ["b", "a", "b"], 5)
    assert asked == found.prompts == ["b", "a"] and found.texts == ["b", "b", "a", "a", "b"]
    assert found.cond["text"].tolist() == [0, 0, 1, 1, 0]
    assert found.cond["guidance"].tolist() == [3.5] * 5
    found = condition(encode, model_of(spec), ["c"], guidance=0.0)
    assert found.texts == ["c"] and found.cond["guidance"].tolist() == [0]
    with raises("prompts do not say strength, which the model takes, too"):
        condition(encode, model_of(spec | {"strength": Field((), "float32")}), ["a"])


@pytest.mark.parametrize(
    "size, sides",
    [("1024", (1024, 1024)), ("768x1024", (768, 1024)), ("64X32", (64, 32)), (512, (512, 512)),
     ((64, 32), (64, 32))],
)  # fmt: skip
def test_sizes(size, sides):
    assert parse_size(size) == sides


@pytest.mark.parametrize(
    "size", ["", "1024x", "1x2x3", "-64", "0", "1e3", 0, (1, 2, 3), None, 1.5, (2.5, 2)]
)
def test_what_is_no_size(size):
    with raises("--size .* is no size of up to 16384 pixels a side: write 1024, or 768x1024"):
        parse_size(size, "--size")


def test_a_size_in_latents():
    """FLUX.1 has 8 pixels a latent and 2 x 2 latents a token, so a multiple of 16; JiT-B/16 has a
    patch of 16 pixels; the digits, one of patch 2, multiples of 2."""
    flux, jit, digits = (configs.load(name) for name in ("flux_dev", "jit_b16", "digits"))
    assert size_changes(flux, 1024) == ["model.image_size=128", "model.image_width=0"]
    assert size_changes(flux, "768x1344", 8) == ["model.image_size=96", "model.image_width=168"]
    assert size_changes(flux, 512, 16) == ["model.image_size=32", "model.image_width=0"]
    assert size_changes(jit, 256) == ["model.image_size=256", "model.image_width=0"]
    unit = digits.model.patch_size
    assert size_changes(digits, 4 * unit)[0] == f"model.image_size={4 * unit}"
    with raises("^size 1000: this model draws multiples of 16 pixels; the nearest is 992$"):
        size_changes(flux, 1000)
    with raises("size 1020x7: this model draws multiples of 16 pixels; the nearest is 1024x16"):
        size_changes(flux, "1020x7")
    with raises("--size 100: this model draws multiples of 16 pixels; the nearest is 96"):
        size_changes(jit, 100, None, "--size")


@pytest.mark.parametrize(
    "latents, prompted, asked, batch",
    [((128, 128), True, None, 4), ((64, 64), True, None, 16), ((96, 168), True, None, 4),
     ((8, 8), True, None, 64), ((512, 512), True, None, 1), ((128, 128), True, 7, 7),
     ((128, 128), False, None, 64), ((128, 128), False, 7, 7)],
)  # fmt: skip
def test_images_at_a_time(latents, prompted, asked, batch):
    """With prompts at most as many latents as four images of 1024 x 1024 pixels have."""
    model = SimpleNamespace(input_shape=(*latents, 16))
    run = flags.OpenRun(None, model, {}, {}, None, None, prompted or None, None)
    assert run.batch(asked) == batch
