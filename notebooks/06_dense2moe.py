# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/moe_diffusion/blob/main/notebooks/06_dense2moe.ipynb)

# %% [markdown]
# # Dense2MoE in ten minutes
#
# Dense2MoE ([2510.09094](https://arxiv.org/abs/2510.09094)) turns a dense diffusion transformer that is trained already into a sparse
# one. The hidden units of every MLP are ranked; the most important ones become a shared expert, the rest are dealt to
# small experts of which a token uses two. Then whole blocks are put into groups, of which a sample passes one. Each stage
# is trained to do what the dense model does.
#
# The paper does this with FLUX.1 of 12 billion parameters. Here it is done with a tiny FLUX that draws handwritten
# digits from prompts like "a handwritten seven".

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
# ## The teacher
#
# Four double and ten single blocks, 1.4M parameters, with a text encoder of its own that learns to read as it trains. If
# `make flux-demo` has left its run in `runs/digits_flux`, that one is taken as it is; it has 2,000 steps.

# %%
import contextlib
import io
from pathlib import Path

from moe_diffusion import distill, train

TEACHER = "runs/digits_flux"
small = ["data.batch_size=8", "optim.warmup_steps=1", "model.flux.single_depth=5"] if TINY else []
if not Path(TEACHER).exists():
    steps = 3 if TINY else 800
    changes = [f"train.num_steps={steps}", "train.sample_every=0", *small]
    with contextlib.redirect_stdout(io.StringIO()):
        train.run("digits_flux", TEACHER, changes)

# %%
import moe_diffusion
from moe_diffusion.figures.images import image_grid

pipe = moe_diffusion.load(TEACHER, overrides=["sampling.steps=3"] if TINY else [])
prompts = ["a handwritten seven", "draw a small digit 3", "the number five", "show me a sketched 8"]
image_grid(
    pipe(prompts=prompts, num=32, seed=0),
    [p for p in prompts for _ in range(8)],
    columns=8,
    scale=5,
)

# %% [markdown]
# ## The student
#
# `distill` measures the importance of every hidden unit (|dL/dw w|, Eq. 6), builds the student and trains its stages.
# `level=s` is the whole road of FLUX.1-MoE-S: experts, then groups of three double blocks, then groups of five single
# ones. What it prints is left out here; every stage is a folder that `sample`, `evaluate` and `routing` read.

# %%
stages = {name: 2 if TINY else 100 for name in ("shared", "experts", "groups")}
changes = [f"distill.{name}.steps={steps}" for name, steps in stages.items()]
changes += [f"distill.teacher={TEACHER}", f"distill.importance_batches={2 if TINY else 10}"]
level = "m" if TINY else "s"
with contextlib.redirect_stdout(io.StringIO()):
    distill.run(f"digits_flux_moe:level={level}", "runs/moe", changes + small)
folders = ["shared", "experts", "groups1", "groups2"]
folders = [name for name in folders if Path(f"runs/moe/{name}").exists()]
folders

# %% [markdown]
# ### Which units and blocks matter?
#
# Left: the importance of the hidden units of an MLP of each kind, sorted, as a share of the largest. The shared expert takes the
# first quarter, up to the line. Right: how much every block changes its input. Those that change little are the ones
# that samples can skip.

# %%
import matplotlib.pyplot as plt
import numpy as np

scores = np.load("runs/moe/importance.npz")
mlps = [name for name in scores.files if name.startswith("units/")]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
for name in mlps:
    units = np.sort(scores[name][-1])[::-1]
    left.plot(
        np.linspace(0, 1, len(units)),
        units / max(units.max(), 1e-30),
        label=name.removeprefix("units/"),
    )
left.axvline(0.25, color="grey", linewidth=0.8)
left.set_xlabel("share of the units")
left.set_ylabel("importance")
left.legend(fontsize=7)
changed = scores["changes"] / scores["batches"]
right.bar(np.arange(1, len(changed)), changed[1:], color="#24507f")
right.set_yscale("log")
right.set_xlabel("block")
right.set_ylabel("change of the input")
plt.show()

# %% [markdown]
# ## Teacher and students side by side
#
# The same noise and the same prompts through each. `activated` counts the parameters that a token meets, `distance` is the
# root mean square difference to the teacher's images.

# %%
from moe_diffusion.demo import asked
from moe_diffusion.dense2moe.comparison import compare, table
from moe_diffusion.evaluation.digits import DigitsJudge
from moe_diffusion.sampling.load import load_config

judge, num, wanted = DigitsJudge(), 100, {}


def conditions(model):
    """Prompts that were held out, mixed."""
    cond, wanted["digits"], _ = asked(load_config(TEACHER), model, num)
    return cond


def judged(images):
    """The share of images in which a classifier reads the digit that was asked for."""
    return {"prompt_accuracy": judge.score(images, wanted["digits"])["class_accuracy"]}


workdirs = {"teacher": TEACHER} | {name: f"runs/moe/{name}" for name in folders}
few_steps = ["sampling.steps=3"] if TINY else []
rows, images = compare(workdirs, conditions, judged, batch_size=num, overrides=few_steps)
print(table(rows, ["prompt_accuracy"]))

# %%
shown = [int(np.flatnonzero(wanted["digits"] == digit)[0]) for digit in range(10)]
grid = np.concatenate([drawn[shown] for drawn in images.values()])
image_grid(grid, [name for name in images for _ in shown], columns=10, scale=5)

# %% [markdown]
# ## Which blocks does a sample pass?
#
# The share of samples that pass each block of a group, by the digit of the prompt and by time (0 is noise). A router for
# each group reads the mean token and the condition, so noise and image may take different ways.

# %%
from moe_diffusion.evaluation.categories import categories
from moe_diffusion.evaluation.routing_stats import RoutingObserver
from moe_diffusion.figures.blocks import groups_picture

last = moe_diffusion.load(f"runs/moe/{folders[-1]}", overrides=few_steps)
cond, _, texts = asked(last.config, last.model, num)
sorts = categories(last.model, cond, list(texts), {}, last.known)
observer = RoutingObserver(last.model, dense=True)
sampler = observer.watch(moe_diffusion.make_sampler(observer, last.config), num, sorts)
noise = np.random.default_rng(0).standard_normal((num, *last.model.input_shape), np.float32)
sampler(last.variables, noise, cond)
groups_picture(observer.stats()).reduce(2)

# %% [markdown]
# ## With the weights of FLUX.1 [dev]
#
# [dense2moe.md](../docs/dense2moe.md) walks from the published files to FLUX.1-MoE-L, M, S and XS, command by command, and says how many
# accelerators that takes. `make dense2moe-demo` does what this notebook does with more steps, and sets pruned models of
# the same size beside it.
