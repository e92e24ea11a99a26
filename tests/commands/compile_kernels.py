"""Compiles every kernel for three GPUs, without one: `python -m tests.commands.compile_kernels`.

Prints a line per kernel, variant and target, and exits non-zero where registers spill. Not run under
pytest itself, where Triton interprets its kernels.
"""

import sys

from benchmarks.kernels.static_analysis import analysed
from benchmarks.kernels.variants import heavy_variants, variants


def main(only: str = "") -> int:
    total = 0
    for code in analysed([*variants(only), *heavy_variants(only)]):
        total += code.spills
        print(f"{code.variant.label} {code.target.arch}: {code.spills} spills", flush=True)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
