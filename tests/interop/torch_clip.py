"""A CLIP of transformers with random weights: its folder, and what it computes.

`python -m tests.interop.torch_clip tests/goldens/clip` wrote the golden case, with transformers
5.24.0, torch 2.13.0 and Pillow.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 12, "hidden_act": "quick_gelu",
    "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63,
}  # fmt: skip
IMAGE = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 32, "patch_size": 8, "hidden_act": "gelu",
}  # fmt: skip
ENDS = (5, 11, 3, 8)  # where the prompts end
PREPROCESSOR = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def write(folder: Path) -> dict[str, np.ndarray]:
    """Writes the folder as transformers publishes it; returns inputs and outputs."""
    import torch
    from PIL import Image
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=20)).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng) * 0.25)
            if "norm" in name and name.endswith("weight"):
                weight += 1
    ids = torch.randint(1, 61, (len(ENDS), 12), generator=rng)
    ids[:, 0] = TEXT["bos_token_id"]
    for row, end in zip(ids, ENDS, strict=True):
        row[end:] = TEXT["eos_token_id"]
    rows = np.random.default_rng(0)
    shapes = ((37, 51, 3), (32, 32, 3), (80, 41, 3))
    pictures = [rows.integers(0, 256, shape, np.uint8) for shape in shapes]
    processor = CLIPImageProcessorPil(**PREPROCESSOR)
    pixels = [processor(Image.fromarray(p), return_tensors="np")["pixel_values"] for p in pictures]
    pixels = np.concatenate(pixels)
    with torch.no_grad():
        inputs = torch.from_numpy(pixels)
        tower, found = model.vision_model(inputs), model(input_ids=ids, pixel_values=inputs)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor.to_dict()))
    outputs = {"out/text_embeds": found.text_embeds, "out/image_embeds": found.image_embeds}
    outputs["mid/image_pooled"] = tower.pooler_output
    arrays = {"in/input_ids": ids.numpy().astype(np.int32), "in/pixel_values": pixels}
    arrays |= {f"in/picture_{number}": picture for number, picture in enumerate(pictures)}
    return arrays | {name: value.numpy() for name, value in outputs.items()}


if __name__ == "__main__":
    import transformers

    out = Path(sys.argv[1])
    np.savez_compressed(out / "io.npz", **write(out))
    (out / "model.safetensors").rename(out / "weights.safetensors")
    described = json.loads((out / "config.json").read_text())
    case = {"case": "clip", "model": described}
    case["preprocessor"] = json.loads((out / "preprocessor_config.json").read_text())
    case["source"] = f"transformers {transformers.__version__} CLIPModel"
    (out / "preprocessor_config.json").unlink()
    (out / "config.json").write_text(json.dumps(case, indent=1) + "\n")
