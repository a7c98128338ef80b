"""Whether a model can train on images of several sizes, and what a step costs then."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion.buckets import Shape, buckets_of, order_of, sized
from moe_diffusion.checks import require
from moe_diffusion.config.schema import prefixed
from moe_diffusion.config.sizes import pixels_per_input, size_changes
from moe_diffusion.errors import explained
from moe_diffusion.models.accounting import parameter_shapes, training_flops
from moe_diffusion.models.stack import Model


def mean_flops(config: ConfigDict, model: Model, source: Any) -> float:
    """FLOPs of an image in training, on average over the images of a source.

    Raises:
      UserError: a size of images is not possible with the config, or with this model, whose
        parameters depend on the size; or every bucket is smaller than a batch.
    """
    buckets, order = buckets_of(source), order_of(source, config.data.batch_size, config.seed)
    if len(buckets) == 1:
        return training_flops(model)
    parameters, total = parameter_shapes(model), 0.0
    for (shape, _), used in zip(buckets, order.used, strict=True):
        if used:
            other = _sized(config, model, shape)
            require(
                parameter_shapes(other) == parameters,
                f"the parameters of this model depend on the size of images, and data.source has "
                f"some of {_text(shape)}: prepare one size (--size), or choose fixed positions",
            )
            total += used * training_flops(other)
    return total / sum(order.used)


def table(config: ConfigDict, source: Any) -> str:
    """Lines of text: the buckets of a source with their images, and which are left out."""
    buckets = buckets_of(source)
    if len(buckets) == 1:
        return ""
    size = config.data.batch_size
    order = order_of(source, size, config.seed)
    lines = []
    for (shape, count), used in zip(buckets, order.used, strict=True):
        left_out = f"  left out: fewer than data.batch_size = {size}" if count and not used else ""
        lines.append(f"{'bucket':8} {_text(shape):>12} {count:>12,} images{left_out}")
    return "\n".join(lines)


def _sized(config: ConfigDict, model: Model, shape: Shape) -> Model:
    """The model for images of a shape, after the config has been checked with it."""
    unit = pixels_per_input(config)
    with prefixed(f"data.source has images of shape {_text(shape)}"):
        changes = size_changes(config, (unit * shape[0], unit * shape[1]))
        configs.validate(configs.settle(config.to_dict(), changes))
    with explained("this model is of one size of images", "prepare one size (--size)"):
        return sized(model, shape)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
