"""Mixture of Blocks (Dense2MoE, 2510.09094, section 3.1): a router picks blocks for each sample.

Consecutive blocks of one kind form a group. Of its m blocks a sample passes kappa, in their order,
and skips the others (Eq. 4). The router sees the tokens and the condition (Eq. 5).

How blocks are skipped with static shapes: the weights of a group's blocks are stacked. A loop goes
over the samples of a device, cuts the weights of a sample's blocks out of the stack (cuts.py), and
applies them to that sample alone. So the work is that of kappa blocks, whatever the router picks.
Each device reads whole weights of the group, as it does for any layer.

How the router learns: the choice itself has no gradient. In training a chosen block's result is

    y + (p - stop_gradient(p)) (y - x)        p: the router's probability of this block

The second term is zero and its gradient is not: p grows where more of y - x, what the block adds,
lowers the loss (a straight-through estimate of scaling it by p).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from ml_collections import ConfigDict

from moe_diffusion.checks import check_values, require
from moe_diffusion.models.adaln import vector
from moe_diffusion.models.cuts import one_by_one
from moe_diffusion.models.stack import COLLECTIONS, MEMBERS, Group
from moe_diffusion.moe.router import balance, exact_matmul
from moe_diffusion.parallel.mesh import alone, by_group, current_mesh
from moe_diffusion.parallel.weights import Specs, on_own_samples, weight_specs

Tree = Any
BALANCE = "block_balance"  # the loss of a group's router, and its key in `loss_weights`
_REPORTED = ("losses", "metrics")


@dataclass(frozen=True)
class Mixture:
    """Which blocks are grouped, and how a group's router chooses; the section `model.mob`.

    Attributes:
      groups: (first block, the one after the last) of each group; blocks count from 0.
      active: kappa, the number of blocks that a sample passes.
      select: `topk`, any kappa blocks (Eq. 5); `run`, kappa blocks in a row (the text of section
        3.1). With kappa = 1 they are the same.
      pool: how the tokens of [x, c] become a vector: `tokens`, their mean; `channels`, the means of
        image and text side by side.
      normalize: both vectors get mean 0 and variance 1 before their gates.
      alpha: the weight of tokens against the condition in Eq. 5.
      losses: whether routers return the loss `block_balance`.
    """

    groups: tuple[tuple[int, int], ...] = ()
    active: int = 1
    select: str = "topk"
    pool: str = "tokens"
    normalize: bool = False
    alpha: float = 0.5
    losses: bool = False

    def grouped(self, kinds: Sequence[Hashable]) -> tuple[Hashable, ...]:
        """The kinds of all layers: those of the blocks, with a `Group` in place of each group."""
        layers, start = [], 0
        for first, stop in self.groups:
            layers += kinds[start:first]
            layers.append(Group(kinds[first], stop - first, self.active))
            start = stop
        return (*layers, *kinds[start:])


def mixture(config: ConfigDict, losses: Sequence[str]) -> Mixture:
    """The `Mixture` of a section `model.mob`; losses: names in `loss_weights`."""
    fields = config.to_dict() | {"groups": parse_groups(config.groups)}
    return Mixture(**fields, losses=BALANCE in losses)


def parse_groups(groups: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """("4-6", "7-9") -> ((4, 7), (7, 10)), ("none",) -> (). Raises a UserError for other texts."""
    found = []
    for text in groups if tuple(groups) != ("none",) else ():
        first, dash, last = str(text).partition("-")
        require(
            bool(dash) and first.isdecimal() and last.isdecimal() and int(first) < int(last),
            f"model.mob.groups = {text!r} is no range of at least two blocks: write first-last, "
            "like 4-6",
        )
        found.append((int(first), int(last) + 1))
    return tuple(found)


def check(config: ConfigDict, kinds: Sequence[Hashable]) -> None:
    """Raises a UserError for a section `model.mob` that a model cannot have.

    kinds: the kind of every block of the model.
    """
    check_values(
        config,
        "model.mob.",
        choices={"select": ("topk", "run"), "pool": ("tokens", "channels")},
        positive=("active",),
    )
    require(0 <= config.alpha <= 1, f"model.mob.alpha = {config.alpha} must lie between 0 and 1")
    before = 0
    for first, stop in parse_groups(config.groups):
        name = f"{first}-{stop - 1}"
        require(
            first >= before,
            f"model.mob.groups = {name} overlaps the group before it, which ends at block "
            f"{before - 1}, or stands before it: name groups from the first to the last",
        )
        require(
            stop <= len(kinds),
            f"model.mob.groups = {name} leaves the model, whose blocks are 0-{len(kinds) - 1}",
        )
        require(
            len({*kinds[first:stop]}) == 1,
            f"model.mob.groups = {name} has blocks of several kinds, "
            f"{' and '.join(dict.fromkeys(map(str, kinds[first:stop])))}: group blocks of one kind",
        )
        require(
            config.active <= stop - first,
            f"model.mob.active = {config.active} exceeds the {stop - first} blocks of the group "
            f"{name}: lower it or widen the group",
        )
        before = stop


def make_layer(
    make_block: Callable, mixture: Mixture, text_tokens: int, train: bool, kind: Hashable
) -> Callable[..., nn.Module]:
    """Factory of a layer of any kind, for `stack.Stack`: a block, or a `BlockGroup`.

    Args:
      make_block: (kind, train=...) -> factory of a block.
      text_tokens: see `BlockGroup`.
    """
    if not isinstance(kind, Group):
        return make_block(kind, train=train)
    make = make_block(kind.kind, train=train)
    return partial(BlockGroup, make, kind.size, kind.active, mixture, text_tokens, train)


class BlockRouter(nn.Module):
    """Eq. 5: alpha W_x [x, c] + (1 - alpha) W_y y -> probabilities f32[B, choices].

    [x, c] are tokens of image and text, of which `pool` makes one vector per sample.
    """

    choices: int
    options: Mixture

    @nn.compact
    def __call__(self, streams: tuple[jax.Array, ...], y: jax.Array) -> jax.Array:
        """streams: image [B, S, D] and, if there is one, text [B, L, D]; y [B, D]."""
        sums = [x.astype(jnp.float32).sum(1) for x in streams]
        numbers = [x.shape[1] for x in streams]
        if self.options.pool == "tokens":
            pooled = sum(sums) / sum(numbers)
        else:
            pooled = jnp.concatenate([s / n for s, n in zip(sums, numbers, strict=True)], axis=-1)
        gates = []
        for name, features in (("x", pooled), ("y", y.astype(jnp.float32))):
            if self.options.normalize:
                features = jax.nn.standardize(features, epsilon=1e-6)
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", None))
            kernel = self.param(name, init, (features.shape[-1], self.choices), jnp.float32)
            gates.append(exact_matmul(features, kernel))
        alpha = self.options.alpha
        # Eq. 5; the largest probabilities are the largest gates.
        return jax.nn.softmax(alpha * gates[0] + (1 - alpha) * gates[1])


class BlockGroup(nn.Module):
    """`size` blocks of which each sample passes `active`: carry -> carry, see the module's text.

    Attributes:
      make: makes one block.
      text_tokens: so many tokens of a carry [B, S, D] are those of a text; they come first. A carry
        of two streams is (image, text).

    Sown: the loss `block_balance`, what the routers inside a passed block sow, and the chosen
    blocks, i32[B, active], as the intermediate `blocks`.
    """

    make: Callable[..., nn.Module]
    size: int
    active: int
    options: Mixture
    text_tokens: int
    train: bool

    @nn.compact
    def __call__(self, carry: Tree, c: Tree, *broadcast: jax.Array) -> Tree:
        """carry, c and broadcast: trees of [B, ...]; c is the condition, see adaln.py."""
        run = self.options.select == "run"
        choices = self.size - self.active + 1 if run else self.size
        router = BlockRouter(choices, self.options, name="block_router")
        p = router(self._streams(carry), vector(c))
        if self.is_initializing():
            return self._all(carry, c, *broadcast)
        picks = 1 if run else self.active
        chosen = by_group(lambda p: lax.top_k(p, picks)[1], lax.stop_gradient(p))
        chosen = jnp.sort(chosen, axis=-1)  # they keep their order
        load = jax.nn.one_hot(chosen, choices).sum((0, 1))
        blocks = chosen + jnp.arange(self.active) if run else chosen
        own = jnp.take_along_axis(p, chosen, axis=-1) if self.train else None
        self.sow("intermediates", "blocks", blocks)
        carry, reports = self._pass(carry, (c, *broadcast), blocks, own)
        if self.options.losses:
            reports["losses"][BALANCE] = balance(p[None], load)
        reports["metrics"]["block_load_max"] = load.max() / load.mean()
        for collection, values in reports.items():
            for name, value in values.items():
                self.sow(collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: 0.0)
        return carry

    def _streams(self, carry: Tree) -> tuple[jax.Array, ...]:
        """(image, text), or (image,)."""
        if isinstance(carry, tuple):
            return carry
        image, text = carry[:, self.text_tokens :], carry[:, : self.text_tokens]
        return (image, text) if self.text_tokens else (image,)

    def _all(self, carry: Tree, *broadcast: Tree) -> Tree:
        """All blocks, one after the other; makes their parameters."""

        def body(block: nn.Module, carry: Tree, _: None) -> tuple[Tree, None]:
            return block(carry, *broadcast), None

        scanned = nn.scan(
            body,
            variable_axes={name: 0 for name in COLLECTIONS},
            split_rngs={"params": True, "dropout": True},
            length=self.size,
            metadata_params={nn.PARTITION_NAME: "members"},
        )
        carry, _ = scanned(self.make(name=MEMBERS), carry, None)
        require(
            MEMBERS not in self.variables.get("router_state", {}),
            "model.mob.groups has blocks with a router that keeps a state, which learns from all "
            "samples: choose a model.router without one, such as token_choice with "
            "selection_bias=false",
        )
        return carry

    def _pass(
        self, carry: Tree, broadcast: Tree, blocks: jax.Array, p: jax.Array | None
    ) -> tuple[Tree, dict[str, dict[str, jax.Array]]]:
        """Eq. 4: each sample through its own blocks.

        Args:
          blocks: i32[B, active], in order.
          p: their probabilities f32[B, active], or [B, 1] of the whole run; None without gradients.

        Returns:
          The carry, and what routers inside the blocks report, as means over the samples.
        """
        weights = flatten_dict(self.variables["params"][MEMBERS], sep="/")
        block, together = self.make(parent=None), self.options.select == "run"
        wanted = [name for name in _REPORTED if self.is_mutable_collection(name)]

        def one_sample(cut: Callable, sample: Tree) -> Tree:
            (first, broadcast), blocks, p = sample
            carry, found = first, []
            for k in range(self.active):
                variables = {"params": unflatten_dict(cut(blocks[k]), sep="/")}
                with jax.named_scope(MEMBERS):  # `plan` finds the products of a path by its names
                    new, sown = block.apply(variables, carry, *broadcast, mutable=wanted)
                if p is not None and not together:
                    new = _straight_through(new, carry, p[k])
                carry = new
                found.append(sown)
            if p is not None and together:
                carry = _straight_through(carry, first, p[0])
            return carry, _by_name(found)

        batches_of_one = jax.tree.map(lambda x: x[:, None], (carry, broadcast))
        specs = {} if current_mesh().size <= 1 else self._specs(block, weights, carry, broadcast)
        loop, samples = partial(one_by_one, one_sample), (batches_of_one, blocks, p)
        carry, reports = on_own_samples(loop, samples, weights, specs)
        reports = {name: {} for name in _REPORTED} | jax.tree.map(jnp.mean, reports)
        return jax.tree.map(lambda x: x[:, 0], carry), reports

    def _specs(self, block: nn.Module, weights: dict, carry: Tree, broadcast: Tree) -> Specs:
        """How the stacked weights lie on the mesh."""

        def init() -> Tree:
            return block.init(jax.random.key(0), carry, *broadcast)["params"]

        with alone():
            axes = flatten_dict(nn.get_partition_spec(jax.eval_shape(init)), sep="/")
        return weight_specs(weights, {path: (None, *axes[path]) for path in weights})


def _straight_through(new: Tree, old: Tree, p: jax.Array) -> Tree:
    """`new`, with the gradient of old + p (new - old) to p."""
    zero = p - lax.stop_gradient(p)
    return jax.tree.map(lambda y, x: y + zero.astype(y.dtype) * (y - x), new, old)


def _by_name(sown: Sequence[Tree]) -> dict[str, dict[str, jax.Array]]:
    """Collection -> name -> scalar of what several blocks sowed: sums of losses, else means."""
    found: dict[str, dict[str, list[jax.Array]]] = {}
    for tree in sown:
        for (collection, *_, name), value in flatten_dict(dict(tree)).items():
            found.setdefault(collection, {}).setdefault(name, []).append(value)
    return {
        collection: {
            name: sum(values) / (1 if collection == "losses" else len(values))
            for name, values in named.items()
        }
        for collection, named in found.items()
    }
