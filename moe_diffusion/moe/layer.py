"""The MoE layer: tokens -> tokens, in the place of a dense MLP."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.dropout import Dropout
from moe_diffusion.moe.dispatch import dispatch
from moe_diffusion.moe.router import Router
from moe_diffusion.moe.routing import expert_load
from moe_diffusion.moe.transport import EXPERT_AXES
from moe_diffusion.parallel.mesh import num_batch_shards, num_pools

GROUPS = ("sample", "shard", "batch")


class Experts(nn.Module):
    """E stacked MLPs: their parameters, in the layout of kernels/mlp.py."""

    num_experts: int
    hidden_size: int
    kind: str = "swiglu"
    use_bias: bool = False

    @nn.compact
    def __call__(self, width: int) -> dict[str, jax.Array]:
        # Xavier for every expert on its own: the expert axis is no part of fan-in or fan-out.
        xavier = nn.initializers.variance_scaling(
            1.0, "fan_avg", "uniform", in_axis=-2, out_axis=-1, batch_axis=0
        )
        shapes = {name: (width, self.hidden_size) for name in mlp.inputs(self.kind)}
        shapes["down"] = (self.hidden_size, width)
        params = {}
        for name, shape in shapes.items():
            params[name] = self._param(name, xavier, shape)
            if self.use_bias:
                bias = f"{name}_bias"
                params[bias] = self._param(bias, nn.initializers.zeros, shape[1:])
        return params

    def _param(self, name, init, shape):
        init = nn.with_logical_partitioning(init, EXPERT_AXES[name])
        return self.param(name, init, (self.num_experts, *shape), jnp.float32)


class MoE(nn.Module):
    """Routed experts plus, optionally, a shared expert or the layer's own input.

    y = sum over chosen experts of weight * expert(x)  [+ shared(x)]  [+ x]

    With a shared expert this is Eq. 2 of Dense2MoE (2510.09094).

    Without experts (num_experts = 0) or choices (top_k = 0) the shared expert is all there is.

    group (`router.group` in a config) says what a routing group is: the tokens of a `sample`, of a
    device's `shard` of the batch (what DiffMoE's code does), or of the whole `batch`. A sampler may
    divide a batch into pools instead of these two (`parallel.mesh.use_pools`). Token choice treats
    every token alone, so that the grouping does not matter to it.

    Sown: what the router returns, and the load of the experts as metrics: `load_max` and `load_min`
    relative to the mean, so 1 is balanced, and how many are dead, without a token (`dead_experts`).

    down_bias: whether the shared expert's last layer has a bias, if its others have.
    dropout: in training, of the hidden units of routed and shared experts; draws from the random
    stream "dropout".
    """

    make_router: Callable[..., Router]
    make_experts: Callable[..., Experts]
    make_shared: Callable[..., nn.Module] | None = None
    residual_input: bool = False
    group: str = "sample"
    backend: str | None = None
    transport: str | None = None
    capacity_factor: float = 1.25
    down_bias: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, is_null: jax.Array, train: bool) -> jax.Array:
        """x [B, S, D], is_null bool[B] (samples without a label) -> [B, S, D]."""
        rate = self.dropout if train else 0.0
        y = self._routed(x, is_null, train, rate)
        if self.make_shared:
            y += self.make_shared(name="shared", down_bias=self.down_bias, dropout=rate)(x)
        return y + x if self.residual_input else y

    @nn.nowrap
    def routers(self, path: str) -> dict[str, Router]:
        """{path of its router: an unbound copy} of a layer at `path`; {} if it has no experts."""
        return {f"{path}/router": self.make_router()} if self.make_experts().num_experts else {}

    def _routed(self, x: jax.Array, is_null: jax.Array, train: bool, rate: float) -> jax.Array:
        """The sum over the chosen experts. rate: of dropout."""
        batch, tokens, width = x.shape
        shards, whole = num_pools(num_batch_shards()), num_pools(1)
        groups = {"sample": batch, "shard": shards, "batch": whole}[self.group]
        grouped = x.reshape(groups, -1, width)
        is_null = jnp.repeat(is_null, tokens).reshape(groups, -1)
        router, experts = self.make_router(name="router"), self.make_experts(name="experts")
        if not (experts.num_experts and router.experts_per_token):
            if experts.num_experts and self.is_initializing():  # the weights are there all the same
                _ = router(grouped, is_null, train), experts(width)
            return jnp.zeros_like(x)
        dropout = Dropout(self.make_rng("dropout"), rate) if rate else None
        routing, aux = router(grouped, is_null, train)
        how = {"backend": self.backend, "transport": self.transport}
        how |= {"capacity_factor": self.capacity_factor, "kind": experts.kind, "dropout": dropout}
        y, dropped = dispatch(grouped, routing, experts(width), **how)
        load = expert_load(routing, experts.num_experts)
        metrics = {"load_max": load.max() / load.mean(), "load_min": load.min() / load.mean()}
        metrics["dead_experts"] = jnp.sum(load == 0).astype(jnp.float32)
        if dropped is not None:
            metrics["dropped"] = dropped
        _sow(self, "losses", aux.losses)
        _sow(self, "metrics", metrics | aux.metrics)
        _sow(router, "router_stats", aux.stats)
        return y.reshape(x.shape)


def _sow(module: nn.Module, collection: str, values: dict[str, jax.Array]) -> None:
    """Sows plain arrays, not tuples of all calls."""
    for name, value in values.items():
        module.sow(collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: 0.0)
