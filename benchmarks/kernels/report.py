"""How close every kernel comes to the least it could cost.

    python -m benchmarks.kernels.report --static     no GPU: from compiler output, for sm_80, sm_90 and gfx942
    python -m benchmarks.kernels.report              on a CUDA GPU: GB/s against a device-to-device copy

`--static` exits non-zero where a kernel spills registers, has a bulk access that is not 16 bytes wide,
or moves more than 5 % more bytes than it must. Its columns:

* An argument is *bulk* unless it is small: at most half a bit per value is needed of it (the scales),
  or a program's share of it is no whole number of 16-byte words (the values and indexes that `topk`
  keeps of a block), so that it cannot be cut into aligned 16-byte accesses.
* An argument is *scattered* where only other data say which places are accessed: `transform` takes each
  4-byte value from, and puts it to, the place that an order says, and the 2-byte words of a block lie
  where the bits of those before it end. No such access is 16 bytes wide, and that is no fault here. What
  it costs is not in this table: a cache moves sectors of 32 bytes, of which tiles of whole rows use all.
* bytes per value: of bulk arguments the size of all tiles loaded and stored, lanes with copies counted
  once; of small and scattered ones the least, as their tiles are partly masked. An access that is
  repeated counts twice, even where a cache would serve it.
* least: each input read once and each output written once.
* instructions per value: those executed times threads, divided by values; rare branches, such as a
  division's slow path, count once.
* us per million values: at the GPU's memory bandwidth, and at one instruction per scheduler and cycle.
  The second is a lower bound: A100 issues fp32 and integer instructions at half that rate each.

A second table says what `transform`, most of which is torch's operations and not a kernel of ours, costs as a
whole: see `benchmarks.kernels.budget`.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import RESULTS, provenance, write_csv, write_json
from benchmarks.kernels import budget, speed
from benchmarks.kernels.static_analysis import UNKNOWN, Code, Width, analysed
from benchmarks.kernels.variants import Variant, variants
from clapping_ds.report import format_table

WIDE_BYTES = 16
SMALL_BYTES_PER_VALUE = 1 / 16
MOST_OVER_LEAST = 1.05


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU, from its data sheet."""

    name: str
    gigabytes_per_s: float
    num_processors: int
    gigahertz: float

    @property
    def lane_instructions_per_us(self) -> float:
        """4 schedulers per multiprocessor, each with one instruction of 32 lanes per cycle."""
        return self.num_processors * 4 * 32 * self.gigahertz * 1e3


GPUS: dict[int | str, Gpu] = {
    80: Gpu("A100 SXM 80 GB", 2039, 108, 1.41),
    90: Gpu("H100 SXM", 3350, 132, 1.83),
}


def is_small(argument: str, variant: Variant) -> bool:
    """Whether 16-byte accesses to this argument are neither needed nor possible (see the module)."""
    if "|" in argument:
        return all(is_small(part, variant) for part in argument.split("|"))
    least = variant.least_bytes.get(argument, 0.0)
    share = least * variant.values_per_program
    return least > 0 and (least <= SMALL_BYTES_PER_VALUE or share % WIDE_BYTES != 0)


def is_bulk(argument: str, variant: Variant) -> bool:
    return argument not in variant.scattered and not is_small(argument, variant)


def bytes_per_value(code: Code) -> float:
    """Bytes that the kernel loads and stores per value, lanes with copies counted once."""
    variant = code.variant
    tiles = {key: size for key, size in code.tile_bytes.items() if is_bulk(key[0], variant)}
    others = [least for name, least in variant.least_bytes.items() if not is_bulk(name, variant)]
    return sum(tiles.values()) / variant.values_per_program + sum(others)


def narrow(code: Code) -> Counter[str]:
    """Bulk accesses that are not 16 bytes wide: how many of each."""
    found: Counter[str] = Counter()
    for (argument, width), count in code.accesses.items():
        if width.num_bytes != WIDE_BYTES and is_bulk(argument, code.variant):
            found[f"{argument} {'store' if width.is_store else 'load'} {width.num_bytes} B"] += count
    return found


def notes(code: Code) -> list[str]:
    """What makes the figures of this row unsure."""
    found = ["an unknown loop: counts are too low"] if code.loop and code.variant.num_trips == 1 else []
    by_argument: Counter[Width] = Counter()
    for access, count in code.accesses.items():
        by_argument[access.width] += count
    if by_argument != code.widths:
        found.append("disassembly has other widths than LLVM's IR")
    if any(access.argument == UNKNOWN for access in code.accesses):
        found.append("access to an unknown argument")
    if any("|" in access.argument for access in code.accesses):
        found.append("pointers change threads")
    return found


def row(code: Code) -> dict[str, Any]:
    """One line of the report."""
    moved, least = bytes_per_value(code), sum(code.variant.least_bytes.values())
    per_value = code.instructions.total() * code.num_threads / code.variant.values_per_program
    gpu = GPUS.get(code.target.arch)
    memory_us = moved * 1e3 / gpu.gigabytes_per_s if gpu else None
    issue_us = per_value * 1e6 / gpu.lane_instructions_per_us if gpu else None
    narrow_accesses = [f"{count}x {name}" for name, count in narrow(code).items()]
    faults = [f"{code.spills} spills"] if code.spills else []
    faults += [f"narrow: {', '.join(narrow_accesses)}"] if narrow_accesses else []
    faults += [f"{moved / least - 1:.0%} more bytes than least"] if moved > MOST_OVER_LEAST * least else []
    return {
        "kernel": code.variant.label,
        "target": f"sm_{code.target.arch}" if gpu else code.target.arch,
        "warps": code.kernel.metadata.num_warps,
        "registers": code.registers,
        "spills": code.spills,
        "shared B": code.shared_bytes,
        "loads": _histogram(code, is_store=False),
        "stores": _histogram(code, is_store=True),
        "B/value": moved,
        "least": least,
        "instr/value": per_value,
        "memory us/M": memory_us,
        "issue us/M": issue_us,
        "bound": None if memory_us is None or issue_us is None else _bound(memory_us, issue_us),
        "faults": "; ".join(faults) or None,
        "notes": "; ".join(notes(code)) or None,
    }


def _bound(memory_us: float, issue_us: float) -> str:
    return "memory" if memory_us >= issue_us else "issue"


def _histogram(code: Code, is_store: bool) -> str:
    """`8x16 1x2`: eight accesses of 16 bytes and one of 2, by one thread."""
    found = {w.num_bytes: count for w, count in code.widths.items() if w.is_store == is_store}
    return " ".join(f"{found[size]}x{size}" for size in sorted(found, reverse=True)) or "-"


def write(rows: list[dict[str, Any]], folder: Path, name: str) -> None:
    """`name`.csv with the rows, `name`.json with rows, assumptions and provenance."""
    write_csv(folder / f"{name}.csv", rows)
    gpus = {f"sm_{arch}": vars(gpu) for arch, gpu in GPUS.items()}
    write_json(folder / f"{name}.json", {"provenance": provenance(), "peak rates": gpus, "rows": rows})


def static_report(only: str, folder: Path) -> int:
    """Prints and writes the report; 1 where a kernel has a fault."""
    rows = []
    for code in analysed(variants(only)):
        rows.append(row(code))
        print(f"{code.variant.label} {code.target.arch}: {rows[-1]['faults'] or 'ok'}", file=sys.stderr)
    shown = [{name: cell for name, cell in line.items() if name not in ("faults", "notes")} for line in rows]
    print(format_table(shown))
    for line in rows:
        for text in filter(None, (line["faults"], line["notes"])):
            print(f"{line['kernel']} {line['target']}: {text}")
    if not only:
        costs = budget.rows()
        print(format_table(costs))
        write(rows, folder, "kernels_static")
        write(costs, folder, "transform_budget")
    return int(any(line["faults"] for line in rows))


def speed_report(only: str, folder: Path) -> int:
    """Prints and writes the table; 1 where a codec is wrong, 2 without a CUDA device."""
    if not torch.cuda.is_available():
        print("no CUDA device here: only --static works")
        return 2
    rows = speed.rows(only)
    print(format_table(rows))
    if not only:
        write(rows, folder, "kernels_speed")
    return int(any(line["wrong"] for line in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--static", action="store_true", help="from compiler output, without a GPU")
    parser.add_argument("--only", default="", help="kernels whose label contains this; writes no files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    report = static_report if options.static else speed_report
    return report(options.only, options.results)


if __name__ == "__main__":
    sys.exit(main())
