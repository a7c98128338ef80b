"""Feeds damaged inputs to every reader and prints what became of them (docs/reliability.md).

JAX_PLATFORMS=cpu python -m tests.campaign --count 10000 --seed 1 --out readers.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests.campaign import readers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="inputs (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="%(default)s")
    parser.add_argument("--kind", action="append", help="only these kinds; may be given again")
    parser.add_argument("--out", help="JSON file for the counts")
    args = parser.parse_args()
    rows, faults, start = {}, [], time.perf_counter()
    chosen = {k: n for k, n in readers.KINDS.items() if k.__name__ in (args.kind or [k.__name__])}
    for kind, share in tqdm(chosen.items(), unit="kind"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                counts = readers.campaign(
                    kind, -(-args.count * share // 100), args.seed, Path(folder)
                )
            except readers.Found as fault:
                faults.append(str(fault))
                counts = {fault.what: 1}
        rows[kind.__name__] = dict(counts)
    print(f"{'kind':<18}{'inputs':>8}{'refused':>9}{'harmless':>10}")
    for name, counts in rows.items():
        total = sum(counts.values())
        cells = (counts.get("refused", 0), counts.get("harmless", 0))
        print(f"{name:<18}{total:>8,}{cells[0]:>9,}{cells[1]:>10,}")
    total = sum(sum(counts.values()) for counts in rows.values())
    result = {"inputs": total, "faults": faults, "kinds": rows, "seed": args.seed}
    result["seconds"] = round(time.perf_counter() - start)
    print(json.dumps(result))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
