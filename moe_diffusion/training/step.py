"""One optimizer step as one compiled program: gradients, clipping, update, averages, metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_diffusion.training.optim import clip_factor, update_emas
from moe_diffusion.training.state import TrainState, merge

Tree = Any
Metrics = dict[str, jax.Array]


class Frozen(NamedTuple):
    """What a step reads and does not train. It is an argument of the program, never a constant.

    untrained: the model's own parameters that `optim.trainable` leaves out.
    given: any tree, for the loss: a teacher's weights.
    """

    untrained: Tree = {}
    given: Tree = None


NOTHING = Frozen()

# (state, batch, key, frozen=NOTHING) -> (state, metrics)
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: Any,
    update_router_state: Callable[[Tree, Tree], Tree],
    shardings: TrainState | None = None,
    update_shardings: Tree | None = None,
) -> TrainStep:
    """Compiles step(state, batch, key, frozen=Frozen()) -> (state, metrics).

    The step consumes the state. What is frozen has no gradient, moments or average.

    batch: leaves [B, ...] or, with optim.accumulate = A > 1, [A, B / A, ...], micro-batches first.
    key: of the run. Micro-batch i of step n draws from fold_in(fold_in(key, n), i).
    metrics: what the loss returns (mean over micro-batches), "loss", "grad_norm" (before
      clipping), "learning_rate", and "finite", which tells whether loss and gradient are finite.
      If not, only `step` changes in the state, so that one bad batch cannot ruin a run.

    Args:
      loss_fn: (params, router_state, batch, key, frozen.given) -> (loss, aux), where aux has
        `metrics` and `router_stats`. params are all of the model's, trained or not.
      optimizer: makes updates, which the step multiplies by -schedule(step) and adds to params.
      config: the step reads `optim.accumulate`, `optim.accumulate_reduce`, `optim.clip_norm` and
        `ema`.
      update_router_state: (router_state, mean router_stats of the micro-batches) -> router_state.
      shardings: of the state before and after the step.
      update_shardings: of the gradients. They say where each part of the update is computed: with
        `zero1` on the device that keeps the moments, after which the params are gathered.
    """
    optim = config.optim

    def gradients(state: TrainState, frozen: Frozen, batch: Tree, key: jax.Array):
        def loss_of(trained: Tree):
            params = merge(trained, frozen.untrained)
            return loss_fn(params, state.router_state, batch, key, frozen.given)

        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        return _constrain(grads, update_shardings), {"loss": loss, **aux.metrics}, aux.router_stats

    def update(state: TrainState, grads: Tree, router_stats: Tree, factor: jax.Array) -> TrainState:
        rate = schedule(state.step)
        grads = jax.tree.map(lambda g: factor * g, grads)
        params = _constrain(state.params, update_shardings)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, updates)
        router_state = update_router_state(state.router_state, router_stats)
        emas = update_emas(state.emas, params, router_state, state.step, config.ema)
        return TrainState(state.step, params, router_state, emas, opt_state)

    def train_step(
        state: TrainState, batch: Tree, key: jax.Array, frozen: Frozen = NOTHING
    ) -> tuple[TrainState, Metrics]:
        key, of_micro_batch = jax.random.fold_in(key, state.step), partial(gradients, state, frozen)
        if optim.accumulate == 1:
            grads, metrics, stats = of_micro_batch(batch, jax.random.fold_in(key, 0))
        else:
            total = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), state.params)
            grads, metrics, stats = _accumulate(of_micro_batch, total, batch, key, optim.accumulate)
        mean = 1 / optim.accumulate if optim.accumulate_reduce == "mean" else 1.0
        grad_norm = mean * optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        factor = mean * clip_factor(grad_norm, optim.clip_norm)
        learning_rate = jnp.float32(schedule(state.step))
        # Not a select, which would read every old array twice and cost XLA:CPU a copy of each.
        state = jax.lax.cond(finite, update, lambda state, *_: state, state, grads, stats, factor)
        metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate, "finite": finite}
        return state.replace(step=state.step + 1), metrics

    out_shardings = None if shardings is None else (shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def _accumulate(
    gradients: Callable, total: Tree, batch: Tree, key: jax.Array, expected: int
) -> tuple[Tree, Metrics, Tree]:
    """Sum of the micro-batches' gradients and `total`; mean of their metrics and statistics."""
    num = jax.tree.leaves(batch)[0].shape[0]
    if num != expected:
        raise ValueError(f"the batch holds {num} micro-batches, optim.accumulate is {expected}")

    def body(total: Tree, inputs: tuple[jax.Array, Tree]):
        index, micro_batch = inputs
        grads, *report = gradients(micro_batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, grads), report

    grads, reports = jax.lax.scan(body, total, (jnp.arange(num), batch))
    return grads, *jax.tree.map(lambda values: jnp.mean(values, axis=0), reports)


def large_constants(traced: Any, least: int) -> list[tuple[int, tuple[int, ...]]]:
    """(bytes, shape) of every constant that has at least `least` bytes in a traced program.

    traced: `jax.jit(function).trace(...)`.
    """
    found, programs = {}, [traced.jaxpr]
    while programs:
        program = programs.pop()
        constants = getattr(program, "consts", ())
        found |= {id(c): (c.nbytes, c.shape) for c in constants if c.nbytes >= least}
        # Programs inside, like the branches of a cond or what is computed again.
        values = jax.tree.leaves([eqn.params for eqn in program.eqns])
        programs += [value for value in values if hasattr(value, "eqns")]
    return list(found.values())


def _constrain(tree: Tree, shardings: Tree | None) -> Tree:
    return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)
