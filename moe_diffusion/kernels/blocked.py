"""Token choice without dropping, in plain XLA: sort the assignments by expert, then walk over them.

After the sort an expert's rows lie together, rows[start[e]:end[e]]. The walk takes an expert's
rows in chunks; a chunk's size comes from a short ladder of static sizes (`lax.switch`), so that an
expert with 260 rows costs 288 and not 512, and a product has enough rows to be worth its weights:
below about 128 rows an XLA:CPU product spends its time packing the weight matrix. A chunk may read
on into the next expert's rows: what it writes there is overwritten when that expert's turn
comes, and in the gradients of the weights those rows are masked.

The gradient is our own. JAX's would turn the loop inside out and keep a copy of all weights for
every chunk; this one saves the two hidden pre-activations, and is again one walk.

Memory traffic, in elements, forward: 3 N D for the rows, 2-3 N H for the hidden values, and the
weights once for each chunk of an expert (once altogether when its rows fit a chunk).
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.rows import RowPlan, _combine, _gather, no_gradient, plan_rows

# Steps of the ladder. Fewer rows than the first cost as much time on CPU, more than the second
# gain nothing.
MIN_STEP, MAX_STEP = 32, 128


@flax.struct.dataclass
class BlockPlan:
    """Assignments in the experts' order.

    rows:        RowPlan of the sorted rows, followed by one ladder's top of unused rows
    assignment:  i32[R]  which assignment a row is; N marks an unused row
    row:         i32[N]  its inverse: where the sort put an assignment
    end:         i32[E]  rows end[e-1]:end[e] are expert e's
    """

    rows: RowPlan
    assignment: jax.Array
    row: jax.Array
    end: jax.Array


def ladder(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """Chunk sizes for experts with num_rows / num_experts rows on average.

    Steps of an eighth of the average (between MIN_STEP and MAX_STEP rows), up to twice the average.
    """
    average = -(-num_rows // num_experts)
    step = min(MAX_STEP, max(MIN_STEP, -(-average // 8)))
    sizes = [step * k for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)]
    wanted = min(num_rows, 2 * average)
    enough = next((i for i, size in enumerate(sizes) if size >= wanted), len(sizes) - 1)
    return tuple(sizes[: enough + 1])


def make_plan(
    token: jax.Array,
    expert: jax.Array,
    *,
    num_tokens: int,
    num_experts: int,
    slots_per_token: int | None,
) -> BlockPlan:
    """Sorts assignments (token, expert i32[N]; expert == num_experts is unused) by expert.

    With slots_per_token = K the list is token-major, K assignments each; all are taken to be used.
    """
    num = expert.shape[0]
    spare = ladder(num, num_experts)[-1]
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    end = jnp.searchsorted(expert[order], jnp.arange(num_experts), side="right").astype(jnp.int32)
    used = jnp.arange(num) < end[-1]
    row = jnp.argsort(order).astype(jnp.int32)
    row_token = jnp.where(used, token[order], num_tokens).astype(jnp.int32)
    row_token = jnp.pad(row_token, (0, spare), constant_values=num_tokens)
    if slots_per_token:
        first = jnp.arange(num_tokens, dtype=jnp.int32) * slots_per_token
        count = jnp.full(num_tokens, slots_per_token, jnp.int32)
        rows = RowPlan(row_token, row, first, count, per_token=slots_per_token)
    else:
        rows = plan_rows(row_token, num_tokens)
    return BlockPlan(rows, jnp.pad(order, (0, spare), constant_values=num), row, end)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked(
    kind: str, x: jax.Array, weight: jax.Array, params: Params, plan: BlockPlan
) -> jax.Array:
    """x[T, D], weight f32[N], experts `params` -> y[T, D] = sum of weight * expert(x)."""
    return _forward(kind, x, weight, params, plan)[0]


def _walk(plan: BlockPlan, sizes: tuple[int, ...], chunk, carry):
    """Chunk by chunk through all rows: carry = chunk(expert, row, rows_left, size_index, carry)."""
    num_experts = plan.end.shape[0]

    def body(state):
        expert, row, carry = state
        left = plan.end[expert] - row
        index = jnp.searchsorted(jnp.array(sizes[:-1]), left)
        carry = chunk(expert, row, left, index, carry)
        row = row + jnp.clip(left, 0, jnp.array(sizes)[index])
        done = row >= plan.end[expert]
        return expert + done.astype(expert.dtype), row, carry

    start = (jnp.int32(0), jnp.int32(0), carry)
    return lax.while_loop(lambda state: state[0] < num_experts, body, start)[2]


def _rows(array, row, size):
    return lax.dynamic_slice_in_dim(array, row, size, axis=0)


def _write(array, values, row):
    return lax.dynamic_update_slice_in_dim(array, values.astype(array.dtype), row, axis=0)


def _pad(values, size):
    return jnp.pad(values, ((0, size - values.shape[0]),) + ((0, 0),) * (values.ndim - 1))


def _weight_of_rows(weight, plan, dtype):
    return jnp.take(weight, plan.assignment, mode="fill", fill_value=0).astype(dtype)[:, None]


def _expert(params, index):
    return {k: lax.dynamic_index_in_dim(v, index, keepdims=False) for k, v in params.items()}


def _forward(kind, x, weight, params, plan):
    sizes = ladder(weight.shape[0], params["up"].shape[0])
    top = sizes[-1]
    rows = _gather(x, plan.rows)
    gate = _weight_of_rows(weight, plan, x.dtype)
    names = mlp.inputs(kind)

    def sized(size, row, params):
        hidden = [mlp.project(_rows(rows, row, size), params, name) for name in names]
        out = mlp.project(mlp.activation(kind)(*hidden), params, "down") * _rows(gate, row, size)
        return [_pad(value, top) for value in (*hidden, out)]

    def chunk(expert, row, left, index, carry):
        del left
        branches = [partial(sized, size) for size in sizes]
        values = lax.switch(index, branches, row, _expert(params, expert))
        return [_write(array, value, row) for array, value in zip(carry, values, strict=True)]

    hidden_shape = (rows.shape[0], params["up"].shape[-1])
    init = [jnp.zeros(hidden_shape, x.dtype) for _ in names] + [jnp.zeros_like(rows)]
    *hidden, out = _walk(plan, sizes, chunk, init)
    return _combine(out, plan.rows), (x, weight, params, plan, hidden)


def _backward(kind, residuals, d_y):
    x, weight, params, plan, hidden = residuals
    sizes = ladder(weight.shape[0], params["up"].shape[0])
    top = sizes[-1]
    names = mlp.inputs(kind)
    gate = _weight_of_rows(weight, plan, x.dtype)
    operands = (_gather(x, plan.rows), _gather(d_y, plan.rows), gate, *hidden)

    def sized(size, row, left, params):
        rows, d_out, gate, *hidden = (_rows(array, row, size) for array in operands)
        gate = jnp.where((jnp.arange(size) < left)[:, None], gate, 0)
        inner, pull = jax.vjp(mlp.activation(kind), *hidden)
        d_inner = _matmul(d_out, params["down"].T)
        # The gate's gradient before the gate is applied: <d_out, down(inner)> without down(inner).
        d_gate = (d_inner * inner).astype(jnp.float32).sum(-1)
        grads = {"down": _matmul((gate * inner).T, d_out, jnp.float32)}
        if "down_bias" in params:
            d_gate += (d_out * params["down_bias"]).astype(jnp.float32).sum(-1)
            grads["down_bias"] = (gate * d_out).astype(jnp.float32).sum(0)
        d_rows = 0.0
        for name, d_hidden in zip(names, pull(gate * d_inner), strict=True):
            grads[name] = _matmul(rows.T, d_hidden, jnp.float32)
            if name + "_bias" in params:
                grads[name + "_bias"] = d_hidden.astype(jnp.float32).sum(0)
            d_rows += _matmul(d_hidden, params[name].T, jnp.float32)
        return _pad(d_rows.astype(rows.dtype), top), _pad(d_gate, top), grads

    def chunk(expert, row, left, index, carry):
        d_rows, d_gate, d_params = carry
        branches = [partial(sized, size) for size in sizes]
        new_rows, new_gate, grads = lax.switch(index, branches, row, left, _expert(params, expert))
        sums = {name: old + grads[name] for name, old in _expert(d_params, expert).items()}
        d_params = {
            name: lax.dynamic_update_index_in_dim(array, sums[name], expert, 0)
            for name, array in d_params.items()
        }
        return _write(d_rows, new_rows, row), _write(d_gate, new_gate, row), d_params

    init = (
        jnp.zeros((plan.assignment.shape[0], x.shape[1]), x.dtype),
        jnp.zeros(plan.assignment.shape[0], jnp.float32),
        {name: jnp.zeros(array.shape, jnp.float32) for name, array in params.items()},
    )
    d_rows, d_gate, d_params = _walk(plan, sizes, chunk, init)
    d_params = {name: array.astype(params[name].dtype) for name, array in d_params.items()}
    return _combine(d_rows, plan.rows), d_gate[plan.row], d_params, no_gradient(plan)


def _matmul(a, b, dtype=None):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype or a.dtype)


blocked.defvjp(_forward, _backward)
