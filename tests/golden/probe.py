"""Running a case's model while recording what its routers decide."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from moe_diffusion import interop, models

RECORDED = r"block_\d+|attn|moe|router|dense_1"  # dense_1 ends the capacity predictor
UNPOLISHED = {"xla_backend_optimization_level": 0}
SOWN = ("losses", "metrics", "router_stats")
# The losses in the authors' gradients, and their weights.
LOSS_WEIGHTS = {"tcdit": {"balance": 0.01}, "diffmoe": {"capacity_predictor": 1.0}}


def jit(function, **options):
    """`jax.jit` whose programs LLVM does not polish: they run rarely, and compiling is the cost."""
    return jax.jit(function, compiler_options=UNPOLISHED, **options)


def compiled(jitted, *args):
    """The same for a function that is jitted already."""
    return jitted.lower(*args).compile(compiler_options=UNPOLISHED)


def loss_weights(case, family: str) -> dict[str, float]:
    """Weights of the auxiliary losses, as the authors train this family."""
    if family == "diffmoe":
        return {"capacity_predictor": float(case.hparams["CapacityPred_loss_weight"])}
    if family in ("promoe_tc", "promoe_ec", "dit_moe"):
        return dict(interop.config_from_torch(family, case.hparams).loss_weights)
    return LOSS_WEIGHTS.get(family, {})


def promoe_family(case) -> str:
    """The hyperparameters and weights are those of both; what was recorded of the routing tells."""
    by_expert = any(key.endswith("/cond_token_idx_sorted") for key in case.arrays)
    return "promoe_ec" if by_expert else "promoe_tc"


def build(case, family: str):
    """The case's model and its weights."""
    config = interop.model_config_from_torch(family, case.hparams)
    model = models.build(config, losses=tuple(loss_weights(case, family)))
    return model, interop.import_state_dict(case.tensors("weights"), model, family)


def apply(model, variables, x, t, y, train: bool):
    """Output, and the sown collections together with "intermediates": modules' outputs."""
    return model.apply(
        variables,
        x,
        t,
        {"label": y},
        train,
        mutable=[*SOWN, "intermediates"],
        capture_intermediates=lambda module, _: re.fullmatch(RECORDED, str(module.name)),
    )


def our_time(model, t: np.ndarray) -> np.ndarray:
    """The time that the authors' network is called with, f32[B], as ours."""
    if not _reverse(model):
        return t.astype(np.float32)
    return (1 - t.astype(np.float64) / model.time_scale).astype(np.float32)


def authors_output(model, output):
    """Our output [B, H, W, C or 2C] as the authors' network gives it."""
    if not _reverse(model):
        return output
    channels = model.input_shape[-1]
    return jnp.concatenate([-output[..., :channels], output[..., channels:]], axis=-1)


def _reverse(model) -> bool:
    return getattr(model, "reverse_time", False)


class Record:
    """What one forward pass left behind, by block number."""

    def __init__(self, model, sown: Any, batch: int):
        self._places = model.blocks()
        self._sown = jax.device_get(sown)
        self._num_experts = model.make_moe().make_router().num_experts if model.make_moe else 0
        self._batch = batch

    def output(self, block: int, module: str = "") -> Any:
        """What a module inside the block returned: "attn", "moe", ...; "" is the block."""
        place, (repeat,), *_ = self._places[block]
        node = self._sown["intermediates"]
        for name in filter(None, f"{place}/{module}/__call__".split("/")):
            node = node[name]
        return jax.tree.map(lambda leaf: leaf[repeat], node[0])

    def sown(self, collection: str, block: int, name: str) -> np.ndarray:
        """A sown value of one block, for example its balance loss."""
        place, (repeat,), *_ = self._places[block]
        leaves = flatten_dict(self._sown[collection], sep="/")
        (path,) = [p for p in leaves if p.startswith(place + "/") and p.endswith("/" + name)]
        return np.asarray(jax.tree.leaves(leaves[path])[0])[repeat]

    def capacity_logits(self, block: int) -> np.ndarray:
        """The capacity predictor's output [B, S, E]."""
        logits = self.output(block, "moe/router/predictor/dense_1")
        return np.reshape(logits, (self._batch, -1, self._num_experts))

    def gates(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Which expert took which token, and with which weight: [G, T, E]; no unused slots."""
        routing = self.output(block, "moe/router")[0]
        groups, slots = routing.token.shape
        tokens = self._batch * self.output(block).shape[1]  # class tokens included
        chosen = np.zeros((groups, tokens // groups, self._num_experts + 1), bool)
        gates = np.zeros(chosen.shape, np.float32)
        where = (np.repeat(np.arange(groups), slots), routing.token.ravel(), routing.expert.ravel())
        chosen[where] = True
        np.add.at(gates, where, routing.weight.ravel())
        return chosen[..., :-1], gates[..., :-1]


def compare_routing(case, record: Record, prefix: str) -> None:
    """Every stored decision of a forward pass: choices exactly, gates within the tolerance."""
    for key in (key for key in case.arrays if key.startswith(f"{prefix}router/blocks.")):
        block, kind = key.removeprefix(f"{prefix}router/blocks.").split("/")
        chosen, gates = record.gates(int(block))
        experts = chosen.shape[-1]
        by_token, by_expert = chosen.reshape(-1, experts), np.swapaxes(chosen, 1, 2)
        if kind == "gates_dense":
            case.compare(key, gates.reshape(case[key].shape))
        elif kind == "idx_sorted":
            case.compare(key, positions(by_token))
        elif kind == "weights_sorted":
            case.compare(
                key, np.take_along_axis(gates.reshape(-1, experts), positions(by_token), 1)
            )
        elif kind == "token_idx_sorted":
            case.compare(key, positions(by_expert))
        elif kind == "gates_sorted":
            gates = np.swapaxes(gates, 1, 2)
            case.compare(key, np.take_along_axis(gates, positions(by_expert), -1))
        elif kind in ("expert_indices", "router_weights"):  # in the order of the authors' top-k
            routing = record.output(int(block), "moe/router")[0]
            ours = routing.expert if kind == "expert_indices" else routing.weight
            case.compare(key, ours.reshape(case[key].shape))
        elif kind == "cond_token_idx_sorted":  # without the samples and the expert of no label
            case.compare(key, positions(by_expert[~chosen[:, 0, -1], :-1]))
        elif kind == "k_per_expert":
            case.compare(key, by_token.sum(0))
        elif kind == "capacity_pred_logits":
            case.compare(key, record.capacity_logits(int(block)).reshape(case[key].shape))


def compare_intermediates(case, record: Record, prefix: str) -> None:
    """Outputs of blocks, attentions and MoE layers."""
    for key in (key for key in case.arrays if key.startswith(f"{prefix}mid/blocks.")):
        block, _, module = key.removeprefix(f"{prefix}mid/blocks.").partition(".")
        if module != "moe_in":
            module = {"moe_out": "moe"}.get(module, module)
            case.compare(key, record.output(int(block), module))


def positions(chosen: np.ndarray) -> np.ndarray:
    """Ascending positions of the True entries of each row; all rows have equally many."""
    return np.nonzero(chosen)[-1].reshape(*chosen.shape[:-1], -1)
