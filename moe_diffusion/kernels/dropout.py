"""Dropout inside experts, whose masks are drawn again wherever they are needed."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Dropout:
    """Dropout (1207.0580) of the hidden units that an expert has for a token.

    The mask is a function of key, token and expert: every backend draws the same one, and the
    backward pass draws it a second time, so that nobody stores [N, H] of it.

    key:  typed PRNG key
    rate: share of the hidden units that become zero; the others grow by 1 / (1 - rate)
    """

    key: jax.Array
    rate: float = flax.struct.field(pytree_node=False)

    def fold_in(self, number: jax.Array) -> Dropout:
        """Other masks for every number i32[], for example of a device."""
        return self.replace(key=jax.random.fold_in(self.key, number))

    def __call__(self, hidden: jax.Array, token: jax.Array, expert: jax.Array) -> jax.Array:
        """hidden [..., H] of rows that hold token and expert, i32 that broadcast to [...]."""

        def keep(token, expert):
            key = jax.random.fold_in(jax.random.fold_in(self.key, expert), token)
            return jax.random.bernoulli(key, 1 - self.rate, hidden.shape[-1:])

        for _ in hidden.shape[:-1]:
            keep = jax.vmap(keep)
        places = (jnp.broadcast_to(place, hidden.shape[:-1]) for place in (token, expert))
        return jnp.where(keep(*places), hidden / (1 - self.rate), 0)
