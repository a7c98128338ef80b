"""Figures that the papers print of their models, to be set beside our counts.

Models that are not here have no figure of their own in a paper, or none that was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

UNITS = ("10^6", "10^6 without predictor", "2^20")


@dataclass(frozen=True)
class Published:
    """activated: millions of parameters; unit: what the paper's "M" turns out to be.

    gmacs: what the paper calls Gflops; these are multiply-adds.
    """

    activated: float | None = None
    unit: str = UNITS[0]
    gmacs: float | None = None


_NO_PREDICTOR, _2_20 = UNITS[1], UNITS[2]

PUBLISHED = {
    # 2212.09748, Tables 1 and 4; SiT's networks are the same.
    **{
        f"configs/{family}_{size}.py": Published(activated, gmacs=gmacs)
        for family in ("dit", "sit")
        for size, activated, gmacs in (
            ("s", 33, 6.06),
            ("b", 130, 23.01),
            ("l", 458, 80.71),
            ("xl", 675, 118.64),
        )
    },
    # 2503.14487, Table 5.
    "configs/dit_xxl.py": Published(951),
    "configs/dit_xxxl.py": Published(1353),
    # 2512.01252, Table 1.
    "configs/dsmoe_s.py": Published(33, _2_20),
    "configs/dsmoe_s.py:experts=48": Published(30, _2_20),
    "configs/dsmoe_b.py": Published(132, _2_20),
    "configs/dsmoe_b.py:experts=48": Published(118, _2_20),
    "configs/dsmoe_l.py:experts=16": Published(465, _2_20),
    "configs/dsmoe_l.py": Published(436, _2_20),
    "configs/dsmoe_3b.py": Published(965, _2_20),
    "configs/jitmoe_b16.py": Published(133, _2_20),
    "configs/jitmoe_l16.py": Published(465, _2_20),
    # 2511.13720.
    "configs/jit_b16.py": Published(131, gmacs=25),
    "configs/jit_l16.py": Published(459, gmacs=88),
    "configs/jit_h16.py": Published(953, gmacs=182),
    "configs/jit_b32.py": Published(133, gmacs=26),
    "configs/jit_l32.py": Published(462, gmacs=89),
    "configs/jit_h32.py": Published(956, gmacs=183),
    # 2503.14487, Tables 1 and 5 (XL), at C = 1; 32 is 32.9 cut off.
    "configs/diffmoe_s.py": Published(32, _NO_PREDICTOR),
    "configs/diffmoe_b.py": Published(130, _NO_PREDICTOR),
    "configs/diffmoe_l.py": Published(458, _NO_PREDICTOR),
    "configs/diffmoe_l.py:experts=8": Published(458, _NO_PREDICTOR),
    "configs/diffmoe_xl.py": Published(675, _NO_PREDICTOR),
    "configs/tcdit_l.py": Published(458),
    "configs/ecdit_l.py": Published(458),
    # 2510.24711.
    "configs/promoe_s.py": Published(33),
    "configs/promoe_b.py": Published(130),
    "configs/promoe_l.py": Published(458),
    "configs/promoe_xl.py": Published(675),
    # 2407.11633.
    "configs/dit_moe_s.py": Published(71),
    "configs/dit_moe_b.py": Published(286),
}
# Published models that are a config file with arguments.
VARIANTS = (
    "configs/digits.py:router=dense",
    "configs/digits.py:router=deepseek",
    "configs/digits.py:router=diffmoe",
    "configs/digits.py:router=expert_choice",
    "configs/diffmoe_l.py:experts=8",
    "configs/tcdit_l.py:experts=8",
    "configs/ecdit_l.py:experts=8",
    "configs/dsmoe_s.py:experts=48",
    "configs/dsmoe_b.py:experts=48",
    "configs/dsmoe_l.py:experts=16",
    "configs/promoe_l.py:routing=expert_choice",
)
