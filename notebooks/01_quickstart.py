# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/moe_diffusion/blob/main/notebooks/01_quickstart.ipynb)

# %% [markdown]
# # Quick start: digits out of noise
#
# This notebook trains a Mixture-of-Experts diffusion transformer on 1,437 handwritten digits, which come
# with scikit-learn, and draws new ones. It needs no download and no accelerator. On a laptop it takes a few
# minutes. A GPU or a single TPU chip (Colab: *Runtime, Change runtime type*) runs the same cells: the library
# asks jax what is there and takes the kernels that belong to it.

# %%
# Setup. Colab lacks this library and some of what it needs. Its jax belongs to its accelerator, so
# jax and numpy are constrained to the versions that are there, and pip adds the rest.
# With MOE_DIFFUSION_TINY=1 in the environment all is so small that one CPU core needs less than
# a minute; what is drawn is then noise.
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import distributions

TINY = os.environ.get("MOE_DIFFUSION_TINY") == "1"
if importlib.util.find_spec("moe_diffusion") is None:
    there = {}
    for found in distributions():  # of two with a name the first is the one that is imported
        there.setdefault(found.name or "", found.version)
    kept = [name for name in there if name.startswith(("jax", "libtpu", "numpy"))]
    with open("constraints.txt", "w") as file:
        file.writelines(f"{name}=={there[name]}\n" for name in kept)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt"]
    subprocess.run([*pip, "git+https://github.com/OWNER/moe_diffusion"], check=True)

# %%
import jax

import moe_diffusion
from moe_diffusion import train
from moe_diffusion.figures.images import image_grid

jax.devices()

# %% [markdown]
# ## Train
#
# A config is a name, `digits`, with changes to its keys. `train.run` is the command
# `python -m moe_diffusion.train --config digits --workdir runs/digits`.
#
# The table that it prints counts parameters. A token meets 2 of the 8 experts of a layer, so *activated* is less
# than *total*. The line `dispatch of experts` names the kernels.

# %%
STEPS = 6 if TINY else 600
changes = [f"train.num_steps={STEPS}", "train.log_every=100", "train.sample_every=0"]
changes += ["optim.learning_rate=3e-3", "optim.warmup_steps=50"]  # in a hurry
if TINY:
    changes += [
        "optim.warmup_steps=2",
        "model.depth=2",
        "model.hidden_size=32",
        "data.batch_size=16",
    ]
result = train.run("digits", "runs/digits", changes)

# %% [markdown]
# ## Draw
#
# `load` opens the folder of a run; what it returns is a function from labels to images. Each row below asks for one
# digit. `cfg` is the scale of classifier-free guidance: 1 is the model as it is, larger values follow the label more.

# %%
pipe = moe_diffusion.load("runs/digits")
labels = [digit for digit in range(10) for _ in range(8)]
images = pipe(labels=labels, cfg=2.0, seed=0)
image_grid(images, labels, columns=8, scale=4)

# %% [markdown]
# ## Are they right, and are they new?
#
# A classifier that saw the training images alone reads the drawn digits. `class_accuracy` is the share that it
# takes for what was asked; `classifier_accuracy` is how well it reads real digits that it did not see. A copy of
# a training image would have the distance 0; `..._heldout` is that distance for real images that were held out.

# %%
from moe_diffusion.evaluation.digits import DigitsJudge

{name: round(value, 3) for name, value in DigitsJudge().score(images, labels).items()}

# %% [markdown]
# ## How an image comes to be
#
# The sampler starts from noise (time 0) and follows the predicted velocity to an image (time 1). Each row is one
# digit on its way.

# %%
import numpy as np

from moe_diffusion.sampling.film import draw_film

digits = {"label": np.array([3, 5, 8], np.int32)}
film, steps = draw_film(pipe.model, pipe.config, pipe.variables, digits, seed=1, states=10)
heads = [f"step {step}" for step in steps]
image_grid(film.reshape(-1, 8, 8, 1), columns=len(steps), heads=heads)

# %% [markdown]
# ## Guidance
#
# The same noise and the same label under four scales. Images differ more from each other at 1, and are cleaner at 4.

# %%
SCALES = (1.0, 1.5, 2.0, 4.0)
rows = [pipe(labels=range(10), cfg=cfg, seed=2) for cfg in SCALES]
image_grid(np.concatenate(rows), [f"cfg {cfg}" for cfg in SCALES for _ in range(10)], columns=10)

# %% [markdown]
# ## Go on where it stopped
#
# The same folder with more steps goes on from the newest checkpoint: same data order, same random numbers. A run
# that was killed goes on in the same way.

# %%
changes[0] = f"train.num_steps={STEPS + STEPS // 6}"
result = train.run("digits", "runs/digits", changes)

# %% [markdown]
# `loss.png` in the folder shows the loss, the learning rate, and the load of the busiest and of the idlest expert;
# 1 is the average.

# %%
from PIL import Image

Image.open("runs/digits/loss.png").reduce(2)

# %% [markdown]
# ## Where to go from here
#
# * `02_routers`: five ways to choose experts, and pictures of what they choose.
# * `03_authors_checkpoint`: weights of the papers' authors.
# * `04_own_router`: write a router.
# * `05_plan`: does a large model fit a slice of TPUs?
# * `06_dense2moe`: make experts of a dense model that is trained already.
