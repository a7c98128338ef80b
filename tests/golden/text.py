"""Checks of text encoders: states, block by block, the pooled state, and weights there and back."""

from __future__ import annotations

import numpy as np

from moe_diffusion.interop import text as interop
from moe_diffusion.models.text import T5Encoder, relative_buckets

from . import probe


def check(case, family: str) -> None:
    """All stored results of the case."""
    state = case.tensors("weights")
    network, params = interop.import_state_dict(state, interop.network_from_config(case.hparams))
    back = interop.export_state_dict(params, network)
    if isinstance(network, T5Encoder):  # the file repeats the table
        back["encoder.embed_tokens.weight"] = back["shared.weight"]
    assert set(back) == set(state)
    for key, tensor in state.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)

    ids = case["in/input_ids"]
    states, blocks = _states(network, params, ids)
    compare(case, "out/last_hidden_state", states)
    for number, block in enumerate(blocks):
        compare(case, f"mid/hidden_states.{number}", block)
    if isinstance(network, T5Encoder):
        # The last stored entry is what the final norm returns.
        compare(case, f"mid/hidden_states.{len(blocks)}", states)
        mask = case["in/attention_mask"].astype(bool)
        compare(case, "out/last_hidden_state_masked", _states(network, params, ids, mask)[0])
        buckets = relative_buckets(ids.shape[1], network.buckets, network.max_distance)
        compare(
            case, "mid/position_bias", params["position_bias"][buckets].transpose(2, 0, 1)[None]
        )
    else:
        ends = (ids if network.eos_id is None else ids == network.eos_id).argmax(1)
        compare(case, "mid/eos_position", ends)
        compare(case, "out/pooler_output", network.encode(params, ids))
        legacy = network.clone(eos_id=None)
        compare(case, "out/pooler_output", legacy.encode(params, ids))
    case.assert_all_compared()


def compare(case, key: str, ours) -> None:
    np.testing.assert_allclose(ours, case[key], atol=1e-4, rtol=1e-4, err_msg=key)
    case.seen(key)


def _states(network, params, ids, mask=None):
    """The result, and the stream before every block; CLIP's also after the last one."""

    def function(params, ids, mask):
        return network.apply(
            {"params": params},
            ids,
            mask,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: str(module.name).startswith("block_"),
        )

    states, sown = probe.jit(function)(params, ids, mask)
    after = [
        sown["intermediates"][path.split("/")[0]][path.split("/")[1]]["__call__"][0][index]
        for path, index, *_ in network.blocks()
    ]
    first = params["tokens"][ids]
    if isinstance(network, T5Encoder):
        return states, [first, *after[:-1]]
    return states, [first + params["positions"][: ids.shape[1]], *after]
