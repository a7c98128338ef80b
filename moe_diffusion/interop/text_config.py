"""config.json of text encoders, in the names of transformers: read into a network, and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_diffusion.errors import UserError, shown
from moe_diffusion.models.text import CLIPText, T5Encoder
from moe_diffusion.reading import Key, check_keys

REMEDY = "restore the config.json that was published with the encoder"
_SIZE, _EPS = Key((int,), least=1, most=1 << 24), Key((float,), 0.0, least=0, most=1)
_CLIP_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_CLIP_SIZES += ("num_attention_heads", "max_position_embeddings")
_CLIP_KEYS = dict.fromkeys(_CLIP_SIZES, _SIZE) | {
    "hidden_act": Key((str,)),
    "layer_norm_eps": _EPS,
    "eos_token_id": Key((int,), 0, least=0),
}
_T5_KEYS = dict.fromkeys(
    ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "d_kv"), _SIZE
)
_T5_KEYS |= {
    "layer_norm_epsilon": _EPS,
    "relative_attention_num_buckets": Key((int,), 32, least=4, most=1 << 16),
    "relative_attention_max_distance": Key((int,), 128, least=4, most=1 << 24),
}


def network_from_config(
    config: Mapping[str, Any], where: str = "config.json"
) -> CLIPText | T5Encoder:
    """The network that a config.json of transformers describes.

    Args:
      where: the file, for messages.

    Raises:
      UserError: it is of another architecture, lacks a key, or a value cannot be.
    """
    config = config.get("text_config", config)
    if not isinstance(config, Mapping):
        raise UserError(f"{where}: text_config is {shown(config)}, not a table: {REMEDY}")
    if "d_model" not in config and "hidden_size" not in config:
        raise UserError(f"{where} is of no CLIP text encoder and no T5: {REMEDY}")
    return _t5(config, where) if "d_model" in config else _clip(config, where)


def _clip(config: Mapping[str, Any], where: str) -> CLIPText:
    check_keys(config, _CLIP_KEYS, where, REMEDY)
    act, width, heads = config["hidden_act"], config["hidden_size"], config["num_attention_heads"]
    if act not in ("quick_gelu", "gelu"):
        raise UserError(f"hidden_act {shown(act)} of {where} is not known: quick_gelu or gelu is")
    if width % heads:
        raise UserError(f"{where}: num_attention_heads {heads} does not divide {width}: {REMEDY}")
    eos = config.get("eos_token_id", 49407)
    return CLIPText(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        mlp_hidden_size=config["intermediate_size"],
        depth=config["num_hidden_layers"],
        num_heads=heads,
        head_dim=width // heads,
        eps=config.get("layer_norm_eps", 1e-5),
        act=act,
        max_length=config["max_position_embeddings"],
        eos_id=None if eos == 2 else eos,  # 2 was published by mistake, and stands for the last id
    )


def _t5(config: Mapping[str, Any], where: str) -> T5Encoder:
    check_keys(config, _T5_KEYS, where, REMEDY)
    if (act := config.get("feed_forward_proj", "relu")) != "gated-gelu":
        raise UserError(f"feed_forward_proj {shown(act)} of {where} is not T5 v1.1's gated-gelu")
    return T5Encoder(
        vocab_size=config["vocab_size"],
        hidden_size=config["d_model"],
        mlp_hidden_size=config["d_ff"],
        depth=config["num_layers"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        eps=config.get("layer_norm_epsilon", 1e-6),
        buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
    )


def config_of(network: CLIPText | T5Encoder) -> dict[str, Any]:
    """The config.json of a network, in transformers' names."""
    if isinstance(network, CLIPText):
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": network.vocab_size,
            "hidden_size": network.hidden_size,
            "intermediate_size": network.mlp_hidden_size,
            "num_hidden_layers": network.depth,
            "num_attention_heads": network.num_heads,
            "max_position_embeddings": network.max_length,
            "hidden_act": network.act,
            "layer_norm_eps": network.eps,
            "eos_token_id": 2 if network.eos_id is None else network.eos_id,
        }
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": network.vocab_size,
        "d_model": network.hidden_size,
        "d_kv": network.head_dim,
        "d_ff": network.mlp_hidden_size,
        "num_layers": network.depth,
        "num_heads": network.num_heads,
        "relative_attention_num_buckets": network.buckets,
        "relative_attention_max_distance": network.max_distance,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": network.eps,
        "is_encoder_decoder": False,
        "tie_word_embeddings": True,
    }
