"""Seconds of one core that a search takes: over the layouts of Falcon-40B on 96 to 1,536 GPUs.

    python benchmarks/plan_search.py

Prints a table: layouts that were timed, CPU seconds, and layouts a second. One thread: start it with OMP_NUM_THREADS=1.
"""

import time
from pathlib import Path

from trimaran.runtime.plan.chips import chip_named
from trimaran.runtime.plan.forecast import Setting
from trimaran.runtime.plan.search.search import search
from trimaran.runtime.spec import load_spec

_SPEC = Path(__file__).parents[1] / "examples" / "falcon-40b.yaml"
_COUNTS = (96, 384, 1536)


def main() -> None:
    """Search and print."""
    setting = Setting(chip_named("A100-80GB"), None, 25e9, 8, None, None, 1.1, 50_700.0, 300.0, 1e10)
    spec = load_spec(_SPEC, ["train.global_batch_size=1536"])
    print("| GPUs | layouts | CPU seconds | layouts a second | the fastest |")
    print("|---|---|---|---|---|")
    for gpus in _COUNTS:
        before = time.process_time()
        found = search(spec, setting, gpus=gpus, headroom=0.05, fixed={}, most=10)
        spent = time.process_time() - before
        print(f"| {gpus:,} | {found.tried:,} | {spent:.1f} | {found.tried / spent:,.0f} | {found.found[0].layout} |")


if __name__ == "__main__":
    main()
