"""Text encoders in transformers' folders: shards, whole models, config.json, what is refused."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from moe_diffusion.errors import UserError
from moe_diffusion.interop import text
from moe_diffusion.interop.prompts import PromptEncoders
from moe_diffusion.interop.text_config import config_of, network_from_config
from moe_diffusion.models.text import TextEncoder
from tests import cli

from . import pipeline_folder as lib

GOLDENS = {name: cli.ROOT / "tests" / "goldens" / name for name in ("clip_text", "t5_encoder")}


@pytest.fixture(params=list(GOLDENS))
def folder(request, tmp_path):
    """A golden as transformers would publish it: config.json and model.safetensors."""
    case = json.loads((GOLDENS[request.param] / "config.json").read_text())
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case["model"]))
    save_file(load_file(GOLDENS[request.param] / "weights.safetensors"), folder / text.WEIGHTS)
    return folder


def published(folder):
    """The state dict of a folder, T5's table under one name."""
    state = load_file(folder / text.WEIGHTS)
    state.pop("encoder.embed_tokens.weight", None)
    return state


def same(a, b):
    a, b = (flatten_dict(x, sep="/") for x in (a, b))
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_there_and_back(folder, tmp_path, dtype):
    """Written in shards of at most 20 kB, every tensor keeps its bits and its dtype."""
    state = {k: v.astype(jnp.dtype(dtype)) for k, v in published(folder).items()}
    save_file(state, folder / text.WEIGHTS)
    read = text.load(folder)
    assert read.name == f"{tmp_path.name}/text_encoder"
    assert read.network.param_dtype == jnp.dtype(dtype) and read.network.dtype == jnp.float32
    out = tmp_path / "out"
    *shards, index, config = text.save(read, out, shard_bytes=20_000)
    assert len(shards) > 2 and [p.name for p in (index, config)] == [
        "model.safetensors.index.json", "config.json"
    ]  # fmt: skip
    table = json.loads(index.read_text())
    assert table["metadata"]["total_size"] == sum(x.nbytes for x in state.values())
    back = {}
    for shard in shards:
        found = load_file(shard)
        assert sum(x.nbytes for x in found.values()) <= 20_000
        assert all(table["weight_map"][key] == shard.name for key in found)
        back |= found
    assert back.keys() == state.keys() == table["weight_map"].keys()
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)
    again = text.load(out)
    assert again.network == read.network and same(again.params, read.params)
    assert again.fingerprint == read.fingerprint
    shards[1].unlink()
    with pytest.raises(UserError, match="names shards that are not beside it: model-00002-of"):
        text.load(out)


def test_whole_models(folder):
    """A whole CLIP or T5, and names as newer files have them, give the same encoder."""
    wanted, state = text.load(folder).params, load_file(folder / text.WEIGHTS)
    extra = {"text_model.embeddings.position_ids": np.arange(20)[None], "logit_scale": np.ones(1)}
    extra |= {"vision_model.x.weight": np.ones(2), "text_projection.weight": np.ones((2, 2))}
    config = json.loads((folder / "config.json").read_text())
    if "shared.weight" in state:
        extra = {"decoder.block.0.x.weight": np.ones(2), "lm_head.weight": np.ones((2, 2))}
        tied = {k: v for k, v in state.items() if k != "shared.weight"}
        assert same(text.import_state_dict(tied, network_from_config(config))[1], wanted)
        torn = state | {"shared.weight": state["shared.weight"] + 1}
        with pytest.raises(UserError, match="shared.weight and encoder.embed_tokens.weight differ"):
            text.import_state_dict(torn, network_from_config(config))
    else:
        bare = {key.removeprefix("text_model."): value for key, value in state.items()}
        assert same(text.import_state_dict(bare, network_from_config(config))[1], wanted)
        config = {"model_type": "clip", "text_config": config, "vision_config": {}}
    whole = {key: np.float32(value) for key, value in extra.items()}
    found = text.import_state_dict(state | whole, network_from_config(config))
    assert same(found[1], wanted)


def test_configs():
    """Those of CLIP-L and T5 v1.1 XXL, and what they say of the end of a prompt."""
    clip = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072}
    clip |= {"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77}
    clip |= {"hidden_act": "quick_gelu", "eos_token_id": 2}
    network = network_from_config(clip)
    assert network.eos_id is None and network.head_dim == 64
    assert network_from_config(clip | {"eos_token_id": 49407}).eos_id == 49407
    assert network_from_config(config_of(network)) == network
    t5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24}
    t5 |= {"num_heads": 64, "feed_forward_proj": "gated-gelu"}
    network = network_from_config(t5)
    assert network_from_config(config_of(network)) == network
    leaves = flatten_dict(network.abstract_params())
    count = sum(int(np.prod(leaf.value.shape)) for leaf in leaves.values())
    # 32128 * 4096 + 32 * 64 + 4096 + 24 * (4 * 4096^2 + 3 * 4096 * 10240 + 2 * 4096)
    assert count == 4_762_310_656
    for config, message in (
        (clip | {"hidden_act": "relu"}, "hidden_act 'relu' of config.json is not known"),
        (t5 | {"feed_forward_proj": "relu"}, "'relu' of config.json is not T5 v1.1's gated-gelu"),
        ({"vocab_size": 3}, "is of no CLIP text encoder and no T5"),
    ):
        with pytest.raises(UserError, match=message):
            network_from_config(config)


def test_what_is_missing_or_of_another_kind(folder, tmp_path):
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(UserError, match="no config.json at "):
        text.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"holds \[\], not a table"):
        text.load(folder)
    (tmp_path / "config.json").rename(folder / "config.json")
    state = published(folder)
    gone = next(iter(state))
    save_file({k: v for k, v in state.items() if k != gone}, folder / text.WEIGHTS)
    with pytest.raises(UserError, match=f"1 missing: {gone}"):
        text.load(folder)
    with pytest.raises(UserError, match="no weight file at"):
        text.load(tmp_path / "absent")


def test_a_pipeline_of_other_parts(tmp_path):
    folder = lib.write(tmp_path / "flux")
    t5 = text.load(folder / "text_encoder_2")
    few = {**t5.params, "tokens": t5.params["tokens"][:9]}
    text.save(TextEncoder(t5.network.clone(vocab_size=9), few), folder / "text_encoder_2")
    with pytest.raises(UserError, match="tokenizer_2 has 14 tokens, text_encoder_2 knows only 9"):
        PromptEncoders(folder)
    text.save(text.load(folder / "text_encoder"), folder / "text_encoder_2")
    with pytest.raises(UserError, match="text_encoder_2 holds a CLIPText where FLUX.1 has a T5Enc"):
        PromptEncoders(folder)
