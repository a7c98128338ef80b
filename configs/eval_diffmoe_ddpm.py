"""How DiffMoE's DDPM models were measured: 50,000 samples, 250 ancestral steps, without guidance.

    python -m moe_diffusion.evaluate --protocol diffmoe_ddpm --workdir RUN --vae FILE \
        --inception FILE --reference VIRTUAL_imagenet256_labeled.npz

So were the FIDs of Table 11 of arXiv 2503.14487. Guidance acts on three channels, in one pass for
both halves, whose tokens compete for the same experts (`forward_with_cfg`). Arguments:

  table2        Tables 2 and 6 (FID, IS, precision, recall): ft-ema. The row -U is that of Table 14
                (batch 125), the row -G the best batch of Table 13 (50). So there is one command for
                each: `table2` and `table2,cfg=1.5`.
  cfg=1.0       guidance scale: 1.5 in the rows -G. The released script's default is 1.5.
  decoder=mse   mse | ema (ft-mse, ft-ema): appendix E.1. Tables 13 and 14 are of ft-ema.
  batch=125     images whose tokens compete: 50, 75, 100, 125 in Table 13. 0 takes the table's.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.evaluation import diffmoe_suite, forward_with_cfg
from moe_diffusion.config import parse_arg

_TABLE_2 = {1.0: 125, 1.5: 50}  # its FIDs, 9.17 and 2.30, are in Table 14 and Table 13


def get_protocol(arg: str | None = None) -> ConfigDict:
    def parse(decoder: str) -> ConfigDict:
        defaults = {"decoder": decoder, "batch": 0, "cfg": 1.0}
        return parse_arg(arg, choices={"decoder": ("mse", "ema")}, table2=False, **defaults)

    found, batches = parse("mse"), {}
    tables = "Table 11" if arg is None else "appendix E"
    if found.table2:
        found, tables, batches = parse("ema"), "Tables 2, 13 and 14", _TABLE_2
    return diffmoe_suite(
        {"sampler": "ddpm", "steps": 250, **forward_with_cfg()},
        decoder=found.decoder,
        pool=found.batch or batches.get(found.cfg, 125),
        cfg=found.cfg,
        tables=tables,
    )
