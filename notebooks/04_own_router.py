# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/moe_diffusion/blob/main/notebooks/04_own_router.ipynb)

# %% [markdown]
# # Write your own router
#
# A router is one class with one method: tokens in, a `Routing` out. Dispatch, kernels, sharding, losses, logs and
# configs then work with it. This notebook writes one, looks at what it returns, and trains it on handwritten digits
# next to token choice.

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
# ## The idea
#
# Token choice takes the product of a token with the direction of every expert; a long token has large products, so its
# choice is sharp, and an expert with a long direction is favoured. `Cosine` compares directions alone, as ProMoE's
# prototypes and X-MoE do, and a temperature says how sharp the choice is:
#
# $$s_{te} = \mathrm{softmax}_e\!\left(\frac{x_t \cdot w_e}{\tau\,|x_t|\,|w_e|}\right)$$
#
# * The **fields** of the class (`top_k`, `temperature`) become keys of the config, `model.router.temperature`.
# * `provides` names the losses that it can return; `positive` says which fields must be positive, and `check` refuses
#   combinations.
# * `group_matters = False` says that it treats every token alone, so no device has to wait for another.
# * `share` names the field that says how many experts a token meets.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_diffusion.checks import at_most
from moe_diffusion.moe.router import Aux, Router, balance, exact_matmul
from moe_diffusion.moe.routing import by_token, expert_load, top_experts


class Cosine(Router):
    """Every token takes the experts whose directions are closest to its own."""

    top_k: int = 2
    temperature: float = 0.1

    provides = ("balance",)
    group_matters = False
    share = "top_k"
    positive = ("top_k", "temperature")

    @classmethod
    def check(cls, config, num_experts, group_tokens):
        super().check(config, num_experts, group_tokens)
        at_most("model.router.top_k", config.top_k, "model.moe.num_experts", num_experts)

    @nn.compact
    def __call__(self, x, is_null=None, train=False):
        directions = self.kernel(x.shape[-1], self.num_experts)  # [D, E]
        tokens = x.astype(jnp.float32)  # [G, T, D]
        tokens /= jnp.linalg.norm(tokens, axis=-1, keepdims=True) + 1e-6
        directions = directions / (jnp.linalg.norm(directions, axis=0) + 1e-6)
        cosine = exact_matmul(tokens, directions)
        scores = jax.nn.softmax(cosine / self.temperature)  # [G, T, E]
        expert = top_experts(scores, self.top_k)  # [G, T, K]
        weight = jnp.take_along_axis(scores, expert, axis=-1)
        routing = by_token(expert, weight)
        load = expert_load(routing, self.num_experts)
        return routing, Aux(self.asked(balance=lambda: balance(scores, load)), {}, {})


# %% [markdown]
# ## What it returns
#
# Two images of three tokens, four experts. The record is a list of assignments: token, expert, weight.

# %%
router = Cosine(num_experts=4, top_k=2)
x = jax.random.normal(jax.random.key(0), (2, 3, 8))  # [G, T, D]
variables = router.init(jax.random.key(1), x)
routing, aux = router.apply(variables, x)
for name in ("token", "expert", "weight"):
    print(f"{name:<7}", np.asarray(getattr(routing, name)[0]).round(2))

# %% [markdown]
# It is worth a test that the length of a token makes no difference.

# %%
longer, _ = router.apply(variables, 10 * x)
assert jnp.array_equal(longer.expert, routing.expert)
assert jnp.allclose(longer.weight, routing.weight, atol=1e-5)

# %% [markdown]
# `dispatch` takes tokens, a routing and experts, and nothing else. Here expert e multiplies by e + 1 in effect, so
# that what comes back shows who was asked. (This is what a layer does; you need not call it.)

# %%
import moe_diffusion

x = jnp.ones((1, 4, 1))
expert = jnp.array([[[0], [1], [2], [3]]])
experts = {"up": jnp.full((4, 1, 1), 8.0), "down": jnp.arange(1.0, 5).reshape(4, 1, 1) / 8}
output, dropped = moe_diffusion.dispatch(
    x, by_token(expert, jnp.ones(expert.shape)), experts, kind="gelu"
)
output.ravel()

# %% [markdown]
# ## Train with it
#
# A config names a router by its place, `module:Class`. In a notebook the module is `__main__`; save the class as
# `my_router.py` and it is `my_router:Cosine`, for the command line, too:
#
# ```
# python -m moe_diffusion.train --config digits --workdir runs/cosine --config.model.router.name=my_router:Cosine
# ```

# %%
import contextlib
import io
import json

from moe_diffusion import train

changes = ["train.num_steps=400", "train.log_every=20", "train.sample_every=0"]
changes += ["optim.learning_rate=3e-3", "optim.warmup_steps=50"]
if TINY:
    changes = ["train.num_steps=4", "optim.warmup_steps=2", "model.depth=2", "train.sample_every=0"]
    changes += ["model.hidden_size=32", "data.batch_size=16", "train.log_every=2"]
RUNS = {
    "token_choice": [],
    "cosine, 0.1": ["model.router.name=__main__:Cosine"],
    "cosine, 1": ["model.router.name=__main__:Cosine", "model.router.temperature=1.0"],
}
for name, own in RUNS.items():
    with contextlib.redirect_stdout(io.StringIO()):
        train.run("digits", f"runs/{name}", changes + own)
    last = json.loads(open(f"runs/{name}/metrics.jsonl").read().splitlines()[-1])
    numbers = "   ".join(
        f"{key} {last[key]:.3f}" for key in ("mse", "balance", "load_max", "load_min")
    )
    print(f"{name:<14} {numbers}")

# %%
from moe_diffusion.curves import read_curves
from moe_diffusion.figures.curves import comparison_picture

curves = read_curves([f"runs/{name}" for name in RUNS], list(RUNS), "mse")
comparison_picture(curves, "mse", "", max(curves["token_choice"]) // 2).reduce(2)

# %% [markdown]
# A mistake in a config is one line that names the key:

# %%
for wrong in ("model.router.temperature=0", "model.router.temprature=1", "model.router.top_k=9"):
    try:
        moe_diffusion.load_config("digits", ["model.router.name=__main__:Cosine", wrong])
    except moe_diffusion.UserError as error:
        print(error)

# %% [markdown]
# ## Look at it
#
# Everything that draws and watches works with the new router.

# %%
from moe_diffusion.evaluation.routing_stats import RoutingObserver
from moe_diffusion.figures.images import image_grid
from moe_diffusion.figures.routing import experts_picture

pipe = moe_diffusion.load("runs/cosine, 0.1", overrides=[f"sampling.steps={3 if TINY else 25}"])
labels = [digit for digit in range(10) for _ in range(6)]
image_grid(pipe(labels, cfg=2.0, seed=0), labels, columns=6, scale=4)

# %% [markdown]
# The load of every expert in every layer while these digits are drawn, by number and sorted; 1 is the average.

# %%
observer = RoutingObserver(pipe.model)
sampler = moe_diffusion.make_sampler(observer, pipe.config)
noise = jax.random.normal(jax.random.key(0), (len(labels), *pipe.model.input_shape))
sampler(pipe.variables, noise, {"label": np.array(labels, np.int32)})
experts_picture(observer.stats()).reduce(2)

# %% [markdown]
# ## Next
#
# * The routers of the library, one screen each: [moe/routers](../moe_diffusion/moe/routers). `expert_choice.py` is the shortest in which
#   experts choose; `diffmoe.py` keeps a state between steps (`next_state`).
# * A router of the package is one more line in `moe/routers/__init__.py`.
# * Where tokens compete over a whole batch, `model.router.group` says whose: [routers.md](../docs/routers.md).
