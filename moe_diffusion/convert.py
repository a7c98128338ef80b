"""Turns a PyTorch checkpoint into a folder that sample, evaluate and train take, and back.

  python -m moe_diffusion.convert --family dsmoe --input checkpoints/0700000.pt \\
      --hparams config_L_E48.yaml --output converted/dsmoe_l
  python -m moe_diffusion.sample --workdir converted/dsmoe_l --num 16 --cfg 1.5
  python -m moe_diffusion.train --config configs/dsmoe_l.py --workdir runs/tuned \\
      --config.init_from=converted/dsmoe_l
  python -m moe_diffusion.convert --family promoe_tc --input ckpt_step_500000.pth \\
      --config configs/promoe_l.py --output converted/promoe_l
  python -m moe_diffusion.convert --family sit --input SiT-XL-2-256x256.pt \\
      --output converted/styled --lora style.safetensors --lora-scale 0.5
  python -m moe_diffusion.convert --export --family dsmoe --input runs/tuned --output w.safetensors

Without --hparams and --config, the hyperparameters come from a .yaml or config.json beside the
input, or else from the input itself. docs/checkpoints.md lists every published file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError

# The names in `interop.families.FAMILIES` and `interop.transfer.DTYPES`.
FAMILIES = (
    "dit",
    "sit",
    "dsmoe",
    "tcdit",
    "ecdit",
    "diffmoe",
    "dit_moe",
    "promoe_tc",
    "promoe_ec",
    "jit",
    "jitmoe",
    "flux",
    "flux_diffusers",
    "flux_moe",
)
DTYPES = ("file", "float32", "bfloat16", "float16")
_IMPORT_ONLY = ("weights", "hparams", "config", "dtype", "lora", "lora_scale")


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("convert", __doc__)
    add = parser.add_argument
    add("--family", required=True, help=f"whose code it is: {', '.join(FAMILIES)}")
    add("--input", required=True, help="weight file (.safetensors, its .index.json if sharded, "
        ".pt, .pth) or the folder it lies in; with --export a workdir")  # fmt: skip
    add("--output", required=True, help="folder to make; with --export a .safetensors file")
    add("--export", action="store_true", help="write PyTorch's names instead of reading them")
    add("--weights", help="which weights of a .pt or .pth file: ema, model, or an entry's name "
        "(the average that its authors evaluate, else the live weights)")  # fmt: skip
    add("--hparams", help="the authors' hyperparameters: .yaml or .json, section model.params, "
        "model or all of it")  # fmt: skip
    add("--config", help="config file of the model instead of hyperparameters")
    add("--dtype", choices=DTYPES, help="of the stored parameters: file (what the file has, and so "
        "the default), or a number format that they are rounded to")  # fmt: skip
    add("--lora", help="LoRA file to merge into the weights: keys of diffusers, PEFT or kohya")
    add("--lora-scale", type=float, help="what the LoRA is multiplied with (1)")
    add("--ema", help="--export: decay of the average to write, or none (the run's first)")
    add("--json", action="store_true", help="print one JSON object as last line")
    args = parser.parse_args(argv)
    misplaced = [
        n for n in (_IMPORT_ONLY if args.export else ("ema",)) if getattr(args, n) is not None
    ]
    if misplaced:
        wrong = "does not go with" if args.export else "needs"
        raise UserError(f"--{misplaced[0].replace('_', '-')} {wrong} --export")
    if args.lora_scale is not None and not args.lora:
        raise UserError("--lora-scale needs --lora: the file that is to be merged")
    from moe_diffusion.interop.transfer import export_file, import_folder

    if args.export:
        done = export_file(args.family, args.input, args.output, ema=args.ema, progress=True)
        what = f"step {done['step']}, ema {done['ema']}"
    else:
        given = {name: getattr(args, name) for name in _IMPORT_ONLY if "lora" not in name}
        if args.lora:
            from moe_diffusion.interop import lora

            scale = 1.0 if args.lora_scale is None else args.lora_scale
            given["change"] = partial(lora.merge, path=args.lora, scale=scale)
        done = import_folder(args.family, args.input, args.output, **given, progress=True)
        entry = f"weights '{done['weights']}', " if done["weights"] else ""
        what = f"{entry}{done['dtype']}, hyperparameters of {done['hparams']}"
    print(f"{done['tensors']} tensors, {done['bytes'] / 1e6:,.1f} MB: {done['output']} ({what})")
    if args.json:
        print(json.dumps(done))


if __name__ == "__main__":
    main()
