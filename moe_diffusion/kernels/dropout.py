"""Dropout inside experts. Its masks are drawn again wherever they are needed."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Dropout:
    """Dropout (1207.0580) of the hidden units that an expert has for a token.

    The mask is a function of key, token and expert. So every backend draws the same mask, and the
    backward pass draws it again instead of storing [N, H] of it.

    key:  typed PRNG key
    rate: the share of the hidden units that become zero; the others are divided by 1 - rate
    """

    key: jax.Array
    rate: float = flax.struct.field(pytree_node=False)

    def fold_in(self, number: jax.Array) -> Dropout:
        """The same dropout with other masks for every number i32[], for example of a device."""
        return self.replace(key=jax.random.fold_in(self.key, number))

    def __call__(self, hidden: jax.Array, token: jax.Array, expert: jax.Array) -> jax.Array:
        """hidden [..., H] -> [..., H]; token, expert: i32 that broadcast to [...], of each row."""

        def keep(token, expert):
            key = jax.random.fold_in(jax.random.fold_in(self.key, expert), token)
            return jax.random.bernoulli(key, 1 - self.rate, hidden.shape[-1:])

        for _ in hidden.shape[:-1]:
            keep = jax.vmap(keep)
        places = (jnp.broadcast_to(place, hidden.shape[:-1]) for place in (token, expert))
        return jnp.where(keep(*places), hidden / (1 - self.rate), 0)
