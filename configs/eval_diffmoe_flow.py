"""How DiffMoE's flow models were measured: 50,000 samples, 250 Euler steps, without guidance.

    python -m moe_diffusion.evaluate --protocol diffmoe_flow --workdir RUN --vae FILE \
        --inception FILE --reference VIRTUAL_imagenet256_labeled.npz

So were the FIDs of Tables 3, 4, 5, 8 and 10 of arXiv 2503.14487. Arguments:

  table2        Tables 2 and 6 (FID, IS, precision, recall): ft-ema and Heun. Their rows -U and -G
                repeat the best batches of Table 13, 10 without guidance and 75 at 1.5. So there is
                one command for each: `table2` and `table2,cfg=1.5`.
  cfg=1.0       guidance scale: 1.5 in the rows -G, 1.43 too in Table 14. The released script's
                default is 1.5.
  sampler=euler euler (250 steps) | heun (125 steps, so 250 evaluations) | dopri5: Table 15.
  decoder=mse   mse | ema (ft-mse, ft-ema): appendix E.1. Tables 13 to 15 are of ft-ema, Tables 13
                and 14 of Heun.
  batch=125     images whose tokens compete: 10, 15, 32, 50, 75, 100, 125 in Table 13, 125 and 250
                in Table 15. 0 takes the table's.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.evaluation import diffmoe_suite, two_passes
from moe_diffusion.config import parse_arg

_STEPS = {"euler": 250, "heun": 125, "dopri5": 250}  # dopri5 chooses its own
_CHOICES = {"decoder": ("mse", "ema"), "sampler": tuple(_STEPS)}
_TABLE_2 = {1.0: 10, 1.5: 75}  # its FIDs, 9.60 and 2.13, are those of these batches in Table 13


def get_protocol(arg: str | None = None) -> ConfigDict:
    def parse(decoder: str, sampler: str) -> ConfigDict:
        defaults = {"decoder": decoder, "sampler": sampler, "batch": 0, "cfg": 1.0}
        return parse_arg(arg, choices=_CHOICES, table2=False, **defaults)

    found, batches = parse("mse", "euler"), {}
    tables = "Tables 3, 4, 5, 8 and 10" if arg is None else "appendix E"
    if found.table2:
        found, tables, batches = parse("ema", "heun"), "Tables 2 and 13", _TABLE_2
    sampling = {"sampler": found.sampler, "steps": _STEPS[found.sampler], "final_euler": False}
    return diffmoe_suite(
        {**sampling, **two_passes()},
        decoder=found.decoder,
        pool=found.batch or batches.get(found.cfg, 125),
        cfg=found.cfg,
        tables=tables,
    )
