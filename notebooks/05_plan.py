# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/moe_diffusion/blob/main/notebooks/05_plan.ipynb)

# %% [markdown]
# # Read a plan before you rent a pod
#
# `plan` compiles the real training step, or the real sampler, for accelerators that you do not have. It says whether
# a model fits, how its weights should be split, and how much the chips send each other. It needs the compiler alone:
# this notebook runs on a CPU.

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
# The compiler of TPUs is the package `libtpu`. jax says which version belongs to it. Without it this notebook plans
# for the devices of this machine, and the numbers below are those.

# %%
import importlib.util
import os
from importlib.metadata import requires

os.environ["JAX_PLATFORMS"] = "cpu"  # compile for TPUs, run on none
if not TINY and importlib.util.find_spec("libtpu") is None:
    (wanted,) = [line.partition(";")[0] for line in requires("jax") if line.startswith("libtpu")]
    subprocess.run([sys.executable, "-m", "pip", "install", "-qq", wanted], check=False)
HAS_TPUS = not TINY and importlib.util.find_spec("libtpu") is not None
TOPOLOGY = "v5e:4x4" if HAS_TPUS else "local"
TOPOLOGY

# %% [markdown]
# ## The model
#
# DSMoE-S has 97M parameters, of which a token meets 35M. Its config says 512 images a step.

# %%
import moe_diffusion
from moe_diffusion.models.accounting import forward_flops, parameter_counts, table

config = moe_diffusion.load_config("digits" if TINY else "dsmoe_s", ["parallel.preset=fsdp"])
model = moe_diffusion.build(config.model)
print(table(parameter_counts(model), forward_flops(model)))

# %% [markdown]
# ## The plan
#
# `make_plan` compiles with the config's own preset. The command prints the same:
# `python -m moe_diffusion.plan --config dsmoe_s --topology v5e:4x4`.

# %%
from moe_diffusion.planning import report
from moe_diffusion.planning.topologies import describe


def silent(text):
    """In place of the progress that the command tells."""


topology = describe(TOPOLOGY)
plan = report.make_plan(config, "train", topology, silent)
print(report.table(plan))

# %% [markdown]
# How to read it:
#
# * **needed** against **limit**: arguments are weights, moments, averages and a batch; outputs that are aliased take
#   their place. Temporaries are activations and gradients. Leave a few percent for the input pipeline.
# * **FLOPs of a chip** is a floor for the time of a step: what the products take at the chip's peak. A run that
#   reaches 40% of it is a good one.
# * **sent by a chip** is read off the compiled program. Gradients that are summed over chips are `all-reduce` or
#   `reduce-scatter`; weights that are gathered for a layer are `all-gather`.
# * **dispatch** names the kernels of the experts, and whether the program really calls them.

# %% [markdown]
# ## Which preset?
#
# A preset says what is split. `dp` has everything whole on every chip; `zero1` splits the optimizer's state; `fsdp` splits
# weights, too; `fsdp_ep` gives every chip some of the experts and moves tokens instead. `compare_presets` compiles for each
# and recommends the one that sends least among those that fit.

# %%
report.compare_presets(plan, config, silent)
print(report.table(plan).split("\n\n")[-1])

# %%
import matplotlib.pyplot as plt

shown = {name: outcome for name, outcome in plan.outcomes.items() if outcome.needed}
figure, panels = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
for panel, what in zip(panels, ("needed", "sent"), strict=True):
    gigabytes = [(getattr(outcome, what) or 0) / 1e9 for outcome in shown.values()]
    panel.barh(list(shown), gigabytes, color="#24507f")
    panel.set_xlabel(f"GB {what} by a chip")
if plan.limit:
    panels[0].axvline(plan.limit / 1e9, color="#b3472e")
    panels[0].set_title("red: the limit of a chip", fontsize=9)
plt.show()

# %% [markdown]
# ## How many images fit?
#
# A larger batch on a chip keeps its units busy. `search_batch` finds the largest that fits; the command's flag is
# `--search-batch`.

# %%
if HAS_TPUS:
    report.search_batch(plan, config, silent)
    print(f"at most {plan.largest_micro_batch} images on a chip at a time")

# %% [markdown]
# ## What does it cost?
#
# The floor, a share of the peak that you trust, and the price of a chip give an estimate. The plan knows no times: a
# program that fits may still be slow, so measure some steps before you rent for weeks.

# %%
STEPS = 700_000  # of the paper
SHARE = 0.4  # of the peak
PRICE = 1.2  # of a chip hour
if plan.floor_seconds:
    hours = STEPS * plan.floor_seconds / SHARE / 3600
    chips = topology.num_chips
    print(f"{hours:,.0f} hours on {chips} chips: {hours * chips * PRICE:,.0f}")

# %% [markdown]
# ## A model that does not fit
#
# DSMoE-3B on the same chips. Weights, moments and averages of `dp` are whole on every chip; `state_bytes` counts them
# from shapes, before anything is compiled.

# %%
from moe_diffusion.planning.compile import state_bytes

large = moe_diffusion.load_config("digits" if TINY else "dsmoe_3b")
if plan.limit:
    print(f"a chip has   {plan.limit / 1e9:8.3f} GB")
for preset in ("dp", "zero1", "fsdp"):
    other = report.with_keys(large, parallel__preset=preset)
    print(f"{preset:<6} needs {state_bytes(other, 'train', topology.devices) / 1e9:8.3f} GB")

# %% [markdown]
# [plan.md](../docs/plan.md) has more: topologies of TPU and GPU, samplers, FLUX.1 on eight chips, and what a plan does not know.
