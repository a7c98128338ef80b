"""A trained model as a function from labels or prompts to images, for use from Python.

    pipe = moe_diffusion.load("runs/dsmoe_l", autoencoder="sd-vae-ft-ema/")
    images = pipe([207, 360], cfg=1.5, steps=50, seed=0)
    pipe = moe_diffusion.load("runs/flux", autoencoder="FLUX.1-dev/", text_encoders="FLUX.1-dev/")
    images = pipe(prompts=["a red fox in the snow"], size=1024, steps=28, guidance=3.5, seed=0)

docs/python.md has more examples.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion import models
from moe_diffusion.checks import check_seed
from moe_diffusion.classes import LABEL, NOTHING, Classes, of_run
from moe_diffusion.conditions import Field, check_fields
from moe_diffusion.config.sizes import Size, size_changes
from moe_diffusion.diffusion.samplers import Sampler, make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.figures.images import to_pixels
from moe_diffusion.interop import autoencoder as autoencoders
from moe_diffusion.interop import describe, files, keymap, places, transfer
from moe_diffusion.models.autoencoder import Autoencoder
from moe_diffusion.models.stack import Model
from moe_diffusion.sampling.conditions import conditions_of_run, spread
from moe_diffusion.sampling.generate import generate, pool_of
from moe_diffusion.sampling.labels import check_labels
from moe_diffusion.sampling.lazy import LazyField
from moe_diffusion.sampling.load import load_workdir, rebuilt
from moe_diffusion.sampling.prompts import PromptEncoder, condition, guidance_of, prompt_encoder

OUTPUTS = ("float", "uint8", "pil")


def load(
    path: str | os.PathLike,
    family: str | None = None,
    hparams: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    config: str | None = None,
    weights: str | None = None,
    step: int | None = None,
    ema: str | None = None,
    autoencoder: str | os.PathLike | Autoencoder | None = None,
    text_encoders: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
) -> Pipeline:
    """Loads a run, what `convert` wrote, or a PyTorch file of the authors.

    Args:
      path: a workdir (it has config.json and checkpoints/), one of its checkpoints
        ("runs/x/checkpoints/5000"), or what `convert --input` takes.
      family: of a PyTorch file, see `convert --family`. None goes by the names of its tensors.
      hparams: of a PyTorch file: the authors' hyperparameters, or a file that has them. None looks
        for them as `convert` does.
      config: of a PyTorch file: a config file in place of hyperparameters.
      weights: of a PyTorch file that holds several state dicts: the one to take.
      step: of a run: the checkpoint to take. None takes the newest.
      ema: of a run: decay of an average as text, or "none" for the live weights. None takes the
        first average.
      autoencoder: what decodes latents: weights, or one that is loaded. None takes the run's
        `data.autoencoder`.
      text_encoders: folder of those that read prompts, if the model needs some; they are read at
        the first call with prompts. None takes `data.text_encoders`.
      overrides: changes to the config, like "sampling.steps=20".

    Raises:
      UserError: nothing like that is there, it does not fit, or an argument is for another kind.
    """
    path = Path(path)
    if path.parent.name == "checkpoints" and path.name.isdigit() and path.is_dir():
        if step is not None and step != int(path.name):
            raise UserError(f"{path} is the checkpoint of another step than {step}: leave out step")
        path, step = path.parent.parent, int(path.name)
    of_file = {"family": family, "hparams": hparams, "config": config, "weights": weights}
    if (path / "checkpoints").is_dir():
        _refuse(of_file, f"{path} is a workdir")
        loaded = load_workdir(path, tuple(overrides), step=step, ema=ema)
        known = of_run(path)
    elif path.is_dir() and not _holds_weights(path):
        raise UserError(f"{path} holds no checkpoints and no weights: name a run, or a weight file")
    else:
        _refuse({"step": step, "ema": ema}, f"{path} is a weight file")
        loaded, known = _load_file(path, tuple(overrides), **of_file), NOTHING
    settings, model, variables, note = loaded
    if not isinstance(autoencoder, Autoencoder):
        given = None if autoencoder is None else os.fspath(autoencoder)
        autoencoder = autoencoders.for_config(settings, given)
    return Pipeline(settings, model, variables, note, autoencoder, known, text_encoders)


@dataclass
class Pipeline:
    """Draws images; `load` makes it.

    Attributes:
      config: of the run; its section `sampling` says what a call does that names nothing else.
      model, variables: model.apply(variables, x, t, cond, False) is the prediction.
      note: where the variables come from.
      autoencoder: decodes what the model makes; None if it makes images.
      known: the classes that were trained, and their names, as far as they are known.
      text_encoders: see `load`.
    """

    config: ConfigDict
    model: Model
    variables: dict[str, Any]
    note: dict[str, Any]
    autoencoder: Autoencoder | None = None
    known: Classes = NOTHING
    text_encoders: str | os.PathLike | None = None
    _samplers: dict[str, Sampler] = field(default_factory=dict, repr=False)
    _encoder: PromptEncoder | None = field(default=None, repr=False)

    def __call__(
        self,
        labels: int | str | Sequence[int | str] | np.ndarray | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        num: int | None = None,
        seed: int = 0,
        guidance: float | None = None,
        size: Size | None = None,
        cond: Mapping[str, np.ndarray] | None = None,
        output: str = "float",
        decode: bool = True,
        batch_size: int = 64,
        progress: bool = False,
        **sampling: Any,
    ) -> np.ndarray | list[Image.Image]:
        """Draws images.

        Image i depends on the seed, on i and on its label or prompt alone. If the routers let
        images compete (DiffMoE), it depends on the others of the call, too; see `generate_batches`.

        Args:
          labels: numbers or names of classes. None spreads `num` images over all classes.
          prompts: texts, for a model that reads them. Their encoders are on the device only while
            they run; each prompt is encoded once a call.
          num: how many images, spread evenly over `labels` or `prompts`. None draws one for each.
          guidance: the scale that a model is told which was distilled with one; 3.5 with prompts.
          size: of the images in pixels, like 1024, "768x1024" or (768, 1024), the height first.
            None takes the config's.
          cond: other fields of the model's condition, {name: [N, ...]}.
          output: "float" for f32[N, H, W, C] in [-1, 1] but for overshoot; "uint8" for
            u8[N, H, W, C] in 0..255; "pil" for a list of PIL images.
          decode: whether the autoencoder, if there is one, makes images of latents.
          batch_size: images drawn at a time.
          sampling: keys of `config.sampling`: cfg, steps, sampler, cfg_interval, ...

        Raises:
          UserError: an argument is unknown or impossible.
        """
        if output not in OUTPUTS:
            raise UserError(f"output={output!r} is unknown; choose {' | '.join(OUTPUTS)}")
        if batch_size < 1 or (num is not None and num < 1):
            raise UserError("num and batch_size must be at least 1")
        check_seed("seed", seed)
        if prompts is not None and labels is not None:
            raise UserError("labels and prompts both say what to draw: give one of them")
        config, cond = self._settings(sampling, size), dict(cond or {})
        model = self.model if config.model == self.config.model else rebuilt(self.model, config)
        if prompts is not None:
            prompts = [prompts] if isinstance(prompts, str) else list(prompts)
            cond |= condition(self._encode, model, prompts, num, guidance).cond
        elif guidance is not None:
            count = num or max(map(len, cond.values()), default=np.size(labels))
            cond |= guidance_of(model, guidance, count)
        cond = self._cond(model, labels, num, cond)
        batch_size = min(batch_size, len(next(iter(cond.values()))))
        images = generate(
            self._sampler(model, config, pool_of(config, batch_size)),
            self.variables,
            cond,
            model.input_shape,
            seed=seed,
            batch_size=batch_size,
            pool=pool_of(config, batch_size),
            progress=progress,
        )
        if decode and self.autoencoder is not None:
            images = self.autoencoder.decode(images)
        if output == "float":
            return images
        if images.shape[-1] not in (1, 3):
            raise UserError(
                f"output={output!r} needs images, and these are latents of {images.shape[-1]} "
                "channels: load with autoencoder=..., or take output='float'"
            )
        pixels, _ = to_pixels(images)
        if output == "pil":
            return [Image.fromarray(pixel) for pixel in pixels]
        return pixels.reshape(images.shape)

    def _encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        if self._encoder is None:
            self._encoder = prompt_encoder(self.config, self.model, self.text_encoders, self.known)
        return self._encoder(prompts)

    def _settings(self, sampling: Mapping[str, Any], size: Size | None) -> ConfigDict:
        """The config with other keys of its section `sampling` or another size, validated."""
        if not sampling and size is None:
            return self.config
        values = self.config.to_dict()
        values["sampling"] = values["sampling"] | sampling
        factor = self.autoencoder and self.autoencoder.network.factor
        changes = [] if size is None else size_changes(self.config, size, factor)
        config = configs.settle(values, changes)
        configs.validate(config)
        return config

    def _sampler(self, model: Model, config: ConfigDict, pool: int) -> Sampler:
        """A compiled sampler, kept for calls with the same settings."""
        key = f"{pool} {model.input_shape} {config.sampling.to_json()}"
        if key not in self._samplers:
            self._samplers[key] = make_sampler(model, config, pool=pool)
        return self._samplers[key]

    def _cond(
        self, model: Model, labels: Any, num: int | None, cond: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The condition of every image, {field: [N, ...]}."""
        cond = {n: v if isinstance(v, LazyField) else np.asarray(v) for n, v in cond.items()}
        if labels is not None:
            if isinstance(labels, str):
                labels = [labels]
            elif not isinstance(labels, Sequence):
                labels = np.atleast_1d(np.asarray(labels)).tolist()
            labels = check_labels(labels, model, self.known, "labels")
            num = num or len(labels)
            cond |= {LABEL: labels[spread(num, len(labels))]}
        lengths = {len(values) for values in cond.values()} | ({num} if num else set())
        if len(lengths) != 1:
            told = "say labels or num" if not lengths else f"there are {sorted(lengths)} of them"
            raise UserError(f"the number of images is not clear: {told}")
        spec = model.cond_spec()
        if cond.keys() < spec.keys():
            cond = conditions_of_run(self.config, model, lengths.pop(), self.known) | cond
        found = {name: Field(v.shape[1:], str(v.dtype)) for name, v in cond.items()}
        check_fields(found, spec, "cond")
        return cond


def _load_file(
    path: Path,
    overrides: tuple[str, ...],
    family: str | None,
    hparams: str | os.PathLike | Mapping[str, Any] | None,
    config: str | None,
    weights: str | None,
) -> tuple[ConfigDict, Model, dict[str, Any], dict[str, Any]]:
    """The same as `load_workdir`, of a PyTorch file."""
    if not (hparams is None or isinstance(hparams, Mapping)):
        hparams = os.fspath(hparams)
    family = family or _family(path, weights)
    found = transfer.open_import(family, path, weights=weights, hparams=hparams, config=config)
    settings = configs.settle(found.config, overrides)
    configs.validate(settings)
    model = models.build(settings.model)
    variables = jax.tree.map(jax.numpy.asarray, keymap.assembled(found.leaves))
    note = {"family": family, "weights": found.opened.entry, "hparams": found.origin}
    return settings, model, variables, note


def _family(path: Path, weights: str | None) -> str:
    """The family whose names the tensors of a file have."""
    likely = describe.likely_families(files.open_weights(path, weights).state)
    if len(likely) == 1:
        return likely[0]
    fits = f"the names of its tensors fit {', '.join(likely)}" if likely else "its names fit none"
    raise UserError(f"{path}: {fits}: pass family=, one of those of `convert --family`")


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in places.SUFFIXES for path in [*folder.glob("*"), *folder.glob("*/*")])


def _refuse(arguments: Mapping[str, Any], because: str) -> None:
    """Raises a UserError if one of the arguments is given."""
    for name, value in arguments.items():
        if value is not None:
            raise UserError(f"{because}: leave out {name}={value!r}")
