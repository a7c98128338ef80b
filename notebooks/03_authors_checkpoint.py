# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/moe_diffusion/blob/main/notebooks/03_authors_checkpoint.ipynb)

# %% [markdown]
# # A checkpoint of the papers' authors
#
# The library reads the PyTorch files that the authors publish, under their names and hyperparameters, without
# PyTorch for `.safetensors`, `.pt` and `.pth`. It draws with them, and writes such files.
#
# The published files are on Hugging Face. Name one below and this notebook works with it: [checkpoints.md](../docs/checkpoints.md) lists which
# are published, where, and what lies in them. **Without one it makes a tiny file itself**: a DSMoE of a few
# thousand parameters, trained here for a minute on handwritten digits and written in the authors' own layout.

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
CHECKPOINT = None  # a file of yours, like "DSMoE-S-E16/checkpoints/0700000.pt"
FAMILY = (
    "dsmoe"  # dit, sit, tcdit, ecdit, diffmoe, jit, jitmoe, promoe_tc, promoe_ec, dit_moe, flux
)
HPARAMS = None  # the authors' yaml, if it does not lie beside the file
AUTOENCODER = None  # for a model of latents, like "sd-vae-ft-ema/"

# %% [markdown]
# ## The stand-in
#
# The authors describe a DSMoE by hyperparameters like these. `config_from_torch` makes a config of them; below stands
# what becomes of the router's. The model is their architecture in small: layers of experts in every second block, eight experts of which a token takes two, one
# shared expert, a selection bias and rotary positions.

# %%
import contextlib
import io
import json
from pathlib import Path

from moe_diffusion import interop, train

WIDTH = 32 if TINY else 96
AUTHORS = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": WIDTH,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "num_classes": 10,
    "learn_sigma": True,
    "rope_type": "2d",
    "MoE_config": {
        "num_experts": 8,
        "hidden_size": WIDTH,
        "moe_intermediate_size": WIDTH,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.0,
        "interleave": True,
        "use_shared_expert": True,
    },
}
found = interop.config_from_torch("dsmoe", AUTHORS)
print(found.model.router)

# %% [markdown]
# `my_dsmoe.py` is a config file of our own: that model, with the training of the config `digits`. Then
# `convert --export` writes what was trained under the authors' names.

# %%
from moe_diffusion import convert

CONFIG = f"""
from moe_diffusion import config, interop
from moe_diffusion.config import parse_arg

def get_config(arg=None):
    parse_arg(arg)
    made, digits = interop.config_from_torch("dsmoe", {AUTHORS!r}), config.load("digits:router=dense")
    made.name = "dsmoe_digits"
    for section in ("data", "optim", "ema", "train", "checkpoint"):
        made[section] = digits[section]
    return made
"""
if CHECKPOINT is None:
    Path("my_dsmoe.py").write_text(CONFIG)
    changes = ["train.sample_every=0", f"train.num_steps={6 if TINY else 600}"]
    changes += ["optim.learning_rate=3e-3", f"optim.warmup_steps={2 if TINY else 50}"]
    changes += ["data.batch_size=16"] if TINY else []
    with contextlib.redirect_stdout(io.StringIO()):
        train.run("my_dsmoe.py", "runs/dsmoe_digits", changes)
    export = "--export --family dsmoe --input runs/dsmoe_digits --output DSMoE-digits.safetensors"
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        convert.main(export.split())
    Path("DSMoE-digits.json").write_text(json.dumps({"model": AUTHORS}))
    CHECKPOINT, HPARAMS = "DSMoE-digits.safetensors", "DSMoE-digits.json"

# %% [markdown]
# ## What is in the file
#
# Names and shapes as the authors' code has them: PyTorch keeps a matrix as [out, in], every expert has tensors of its
# own, and `e_score_correction_bias` is the bias of the choice.

# %%
from moe_diffusion.interop.files import open_weights

state = open_weights(CHECKPOINT, None).state
parts = ("x_embedder", "blocks.1.attn", "blocks.1.mlp.gate", "blocks.1.mlp.experts.blocks.0.")
parts += ("blocks.1.mlp.shared",)
for name in [name for name in state if name.startswith(parts)] or list(state)[:12]:
    print(f"{name:<48} {tuple(state[name].shape)}")
print(f"... {len(state)} tensors")

# %% [markdown]
# ## Draw with it
#
# `load` takes the file. It reads every tensor under its name and refuses a file that lacks one, or has one too many.

# %%
import moe_diffusion
from moe_diffusion.figures.images import image_grid

pipe = moe_diffusion.load(CHECKPOINT, FAMILY, hparams=HPARAMS, autoencoder=AUTOENCODER)
SAMPLING = {"sampler": "heun", "steps": 4 if TINY else 20}
labels = list(range(10)) if pipe.model.input_shape[0] == 8 else [207, 360, 387, 974, 88]
images = pipe(labels, cfg=2.0, seed=0, **SAMPLING)
image_grid(images, labels, columns=len(labels))

# %% [markdown]
# ## Sweep the guidance
#
# Classifier-free guidance goes past the prediction for the label, away from the prediction for no label. Each row has
# the same noise. At 1 there is no guidance; too much of it makes all images of a class alike.

# %%
import numpy as np

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
rows = {cfg: pipe(labels, cfg=cfg, seed=1, **SAMPLING) for cfg in SCALES}
captions = [f"cfg {cfg}" for cfg in SCALES for _ in labels]
image_grid(np.concatenate([*rows.values()]), captions, columns=len(labels))

# %% [markdown]
# For digits a small classifier measures both sides: the share of images that it takes for their label, and how far
# the whole set is from the training set (`fd_digits`, a Fréchet distance; less is better).

# %%
from moe_diffusion.dense2moe.demonstration import fd_digits
from moe_diffusion.evaluation.digits import DigitsJudge

if CHECKPOINT == "DSMoE-digits.safetensors":
    judge, many = DigitsJudge(), np.arange(40 if TINY else 300) % 10
    for cfg in SCALES:
        drawn = pipe(many, cfg=cfg, seed=2, batch_size=300, **SAMPLING)
        right = judge.score(drawn, many)["class_accuracy"]
        print(f"cfg {cfg}: {right:.3f} right, fd_digits {fd_digits(drawn):.3f}")

# %% [markdown]
# ## And back
#
# Writing the weights again gives the same bits under the same names.

# %%
again = interop.export_state_dict(pipe.variables, pipe.model, FAMILY)
same = all(np.array_equal(again[name], state[name]) for name in state)
print(f"{len(again)} tensors; all bits the same: {same and again.keys() == set(state)}")

# %% [markdown]
# A large file is converted once instead, and streams through little memory (docs/checkpoints.md):
#
# ```
# python -m moe_diffusion.convert --family dsmoe --input DSMoE-L-E48.pt --output runs/dsmoe_l
# python -m moe_diffusion.sample --workdir runs/dsmoe_l --num 16 --vae sd-vae-ft-ema/ --out grid.png
# ```
