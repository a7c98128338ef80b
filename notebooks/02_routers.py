# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/moe_diffusion/blob/main/notebooks/02_routers.ipynb)

# %% [markdown]
# # Five routers side by side
#
# A layer of experts has many small MLPs, and a router says which token goes to which. This notebook trains the same
# small model on handwritten digits with five routers, and shows what each of them does while it draws.
#
# | router | who chooses | paper |
# |---|---|---|
# | `token_choice` | every token takes its 2 best experts | TC-DiT |
# | `expert_choice` | every expert takes its best tokens of an image | EC-DiT |
# | `diffmoe` | every expert takes its best tokens of the whole batch | DiffMoE, [2503.14487](https://arxiv.org/abs/2503.14487) |
# | `expert_race` | the best pairs of a token and an expert in the whole batch | Expert Race, [2503.16057](https://arxiv.org/abs/2503.16057) |
# | `deepseek` | every token takes 2 experts; a bias moves towards equal load; one more expert is for all | DSMoE, [2512.01252](https://arxiv.org/abs/2512.01252) |

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

# %% [markdown]
# ## Train five models
#
# Patches of one pixel make 64 tokens of an image, so that maps of experts can be seen.

# %%
import contextlib
import io
import json

from moe_diffusion import train

ROUTERS = ("token_choice", "expert_choice", "diffmoe", "expert_race", "deepseek")
changes = ["train.num_steps=300", "model.patch_size=1", "model.depth=4", "data.batch_size=64"]
changes += ["optim.warmup_steps=50"]
if TINY:
    changes = ["train.num_steps=4", "optim.warmup_steps=2", "model.patch_size=1", "model.depth=2"]
    changes += ["model.hidden_size=32", "data.batch_size=8"]
changes += ["train.log_every=2" if TINY else "train.log_every=20", "train.sample_every=0"]
changes += ["optim.learning_rate=3e-3"]
for router in ROUTERS:
    with contextlib.redirect_stdout(io.StringIO()):  # the log of each, see 01_quickstart
        train.run(f"digits:router={router}", f"runs/{router}", changes)

# %% [markdown]
# What the runs logged last. `mse` is the squared error of the predicted velocity, without the routers' own losses.
# `load_max` and `load_min` are the load of the busiest and of the idlest expert; 1 is the average.

# %%
for router in ROUTERS:
    lines = open(f"runs/{router}/metrics.jsonl").read().splitlines()
    last = json.loads(lines[-1])
    numbers = "   ".join(f"{name} {last[name]:.3f}" for name in ("mse", "load_max", "load_min"))
    print(f"{router:<14} {numbers}")

# %%
from moe_diffusion.curves import read_curves
from moe_diffusion.figures.curves import comparison_picture

curves = read_curves([f"runs/{router}" for router in ROUTERS], ROUTERS, "mse")
comparison_picture(curves, "mse", "", max(curves["diffmoe"]) // 2).reduce(2)

# %% [markdown]
# ## Draw, and watch the routers
#
# `draw_film` keeps the states of the sampler on the way from noise to image. `observe` applies the model to such a
# state and tells, for every layer and token, which expert had the largest weight.

# %%
from functools import partial

import jax
import numpy as np

import moe_diffusion
from moe_diffusion.evaluation.observed import expert_layers, observe
from moe_diffusion.sampling.film import draw_film

DIGITS, STEPS = np.array([0, 3, 7, 8], np.int32), 5 if TINY else 25


def watch(router):
    """The states [digits, steps, 8, 8, 1], and the experts [steps, layers, digits, rows, columns]."""
    pipe = moe_diffusion.load(f"runs/{router}", overrides=[f"sampling.steps={STEPS}"])
    cond, variables = {"label": DIGITS}, pipe.variables
    film, steps = draw_film(pipe.model, pipe.config, variables, cond, seed=3, states=STEPS)
    look = jax.jit(partial(observe, pipe.model, train=False, maps=True))
    maps = []
    for state, step in zip(film.swapaxes(0, 1), steps, strict=True):
        time = np.full(len(DIGITS), step / STEPS, np.float32)
        _, seen = look(variables, state, time, cond)
        maps.append(seen["strongest_expert"])
    layers = [layer.name for layer in expert_layers(pipe.model)]
    return film, np.stack(maps), layers


seen = {router: watch(router) for router in ROUTERS}

# %% [markdown]
# ### Over time
#
# The last layer while the same digit is drawn. A colour is an expert; white is a token that no expert takes, which
# happens where experts choose. Early the image is noise and so is the map. Later strokes, edges and background go to
# different experts.

# %%
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

colours = ListedColormap(plt.get_cmap("tab10").colors[:8]).with_extremes(under="white")
as_experts = {"cmap": colours, "vmin": -0.5, "vmax": 7.5, "interpolation": "nearest"}
TIMES = np.linspace(0, STEPS - 1, 5).round().astype(int)


def maps_of(rows, heads, size=1.1):
    """A picture of (name, images) rows, under `heads`; a map of experts has whole numbers."""
    grid = {"xticks": [], "yticks": []}
    shape = (size * len(heads) + 1, size * len(rows) + 0.3)
    figure, axes = plt.subplots(
        len(rows), len(heads), figsize=shape, squeeze=False, subplot_kw=grid, layout="constrained"
    )
    for line, (name, images) in zip(axes, rows, strict=True):
        for panel, image in zip(line, images, strict=True):
            is_map = np.issubdtype(image.dtype, np.integer)
            panel.imshow(
                image, **(as_experts if is_map else {"cmap": "gray", "vmin": -1, "vmax": 1})
            )
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for panel, head in zip(axes[0], heads, strict=True):
        panel.set_title(head, fontsize=9)
    plt.show()


DIGIT = 2  # of DIGITS: the 7
film = seen["token_choice"][0]
rows = [("image", [film[DIGIT, time, ..., 0] for time in TIMES])]
rows += [(router, [seen[router][1][time, -1, DIGIT] for time in TIMES]) for router in ROUTERS]
maps_of(rows, [f"time {(time + 1) / STEPS:.1f}" for time in TIMES])

# %% [markdown]
# ### Over layers
#
# The same digit when it is half drawn, in every layer. Each layer has experts of its own, so the same colour in two
# columns is not the same expert.

# %%
layers = seen["token_choice"][2]
half = STEPS // 2
rows = [
    (router, [seen[router][1][half, i, DIGIT] for i in range(len(layers))]) for router in ROUTERS
]
maps_of(rows, [f"block {layer}" for layer in layers])

# %% [markdown]
# ### Over images
#
# The last layer for four finished digits: which experts draw strokes, and do all digits use the same ones?

# %%
rows = []
for router in ROUTERS:
    film, maps, _ = seen[router]
    for name, images in ((router, film[:, -1, ..., 0]), ("", maps[-1, -1])):
        rows.append((name, list(images)))
maps_of(rows, [f"digit {digit}" for digit in DIGITS], size=0.9)

# %% [markdown]
# ## A film
#
# All five at once: the digit as it comes to be, and beside it the expert of every pixel in the last layer.

# %%
from IPython.display import Image as Show
from PIL import Image

from moe_diffusion.figures.images import save_gif


def frame(time, scale=6):
    """One state of two digits for every router: image and map, image and map."""
    strips = []
    for router in ROUTERS:
        film, maps, _ = seen[router]
        tiles = []
        for digit in (1, 3):
            grey = np.uint8(127.5 * (1 + np.clip(film[digit, time], -1, 1))).repeat(3, -1)
            tiles += [grey, np.uint8(255 * colours(maps[time, -1, digit])[..., :3])]
        tiles = [np.pad(tile, ((1, 1), (1, 1), (0, 0)), constant_values=255) for tile in tiles]
        strips.append(np.concatenate(tiles, 1))
    pixels = np.concatenate(strips)
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


save_gif([frame(time) for time in range(0, STEPS, 2)], "experts.gif", seconds=4)
Show("experts.gif")

# %% [markdown]
# Rows from above: `token_choice`, `expert_choice`, `diffmoe`, `expert_race`, `deepseek`.
#
# ## Numbers for a real run
#
# `python -m moe_diffusion.routing --workdir runs/digits --num 200 --out routing/` draws many images and writes these maps and
# the load of every expert by layer, time and class. What each router costs and reaches on digits is in
# [routers.md](../docs/routers.md), and what they do in the papers' models in [evaluation.md](../docs/evaluation.md). All routers are written in one
# screen each, in [moe/routers](../moe_diffusion/moe/routers); the next notebook but one writes another.
