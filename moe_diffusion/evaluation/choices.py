"""What an evaluation lets its user choose from; nothing here imports jax."""

from __future__ import annotations

LABELS = ("balanced", "random")  # of the samples: classes in order, or drawn
RESIZES = ("tensorflow", "pytorch-fid")  # see inception.resize_images
QUANTIZATIONS = ("round", "none")  # see images.to_pixels
# Whose Inception Score -> arguments of `metrics.inception_score`. Only a shuffled one is right for
# images in class order.
SCORES = {
    "torch-fidelity": {"parts": 10, "shuffle": 2020},
    "adm": {"split": 5000, "shuffle": None},
}
# A protocol's key `matmul` -> jax's precision. "high" is TF32 on GPUs, and three bfloat16 passes on
# TPUs, which are a little more exact than TF32.
MATMULS = {"fast": None, "tf32": "high", "float32": "highest"}
