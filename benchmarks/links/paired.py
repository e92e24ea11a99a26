"""Step times of this working tree beside those of another commit, over links of several speeds.

    python -m benchmarks.links.paired COMMIT [--rho 0 1 4] [--pairs N]

old: `clapping_ds` and `launch` of COMMIT; new: those of this tree. All else is this tree's, so COMMIT must
accept the blocks of CASES. Two ranks of each are alive at once, on the same two cores and the same link
(`benchmarks.links.network`; needs root), and take turns, step by step: old, new, new, old, and so on. The
others wait for an order meanwhile. Pairs are spread over a few launches, as no two lie in memory alike.

rho is that of `benchmarks.links.pipeline`; 0: the link without a limit.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.files import RESULTS, describe_commit, write_results
from benchmarks.links.network import Network, open_network, prepare, run_command
from benchmarks.links.pipeline import CHECKOUT, PORT, QUICK, UNSHAPED, Ranks, link_rate, started
from benchmarks.links.rows import Answers, Compute, timing
from benchmarks.training.compare import block
from clapping_ds.report import format_table

CASES: dict[str, dict[str, Any]] = {
    "uncompressed": {**block("direct", "none"), "in_flight": 0},
    "direct eden4": {**block("direct", "eden4"), "in_flight": 0},
    "direct eden4, in_flight 2": {**block("direct", "eden4"), "in_flight": 2},
    "int8 key + int2 delta, in_flight 2": {**block("key_delta", "int2", key="int8"), "in_flight": 2},
}
VERSIONS = ("old", "new")
RHOS = (UNSHAPED, 1.0, 4.0)
PAIRS = 80
LAUNCHES = 4
WARM_UP_STEPS = 3
ERROR_OF_MEDIAN = 0.93
"""The standard error of the median of n normal values is this times their interquartile range / sqrt(n)."""

Versions = Mapping[str, Ranks]
"""By "old" and "new"."""


@dataclass(frozen=True)
class Pair:
    """One step of each version: the same step of the same training."""

    old_s: float
    new_s: float
    losses_equal: bool

    @classmethod
    def of(cls, old: Answers, new: Answers) -> "Pair":
        """A step lasts as long as its slower rank."""
        old_s, new_s = (max(answer["step_s"] for answer in answers) for answers in (old, new))
        return cls(old_s, new_s, losses_equal=old[0]["loss"] == new[0]["loss"])


def order_turns(number: int) -> tuple[str, ...]:
    """Who is first in an even pair is second in an odd one."""
    return VERSIONS[:: -1 if number % 2 else 1]


def split_pairs(num_pairs: int) -> list[int]:
    """How many pairs each launch takes; one at the least."""
    launches = min(LAUNCHES, num_pairs)
    return [num_pairs // launches + (launch < num_pairs % launches) for launch in range(launches)]


def summarize_pairs(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Of one row; two pairs at the least.

    old_s, new_s    median steps
    new/old         median of the ratios of the pairs: a machine that is slow for a while is so to both
    error           its standard error
    quartile_1, quartile_3    of the same ratios
    losses_equal    whether all losses are the same, bit for bit
    """
    ratios = [pair.new_s / pair.old_s for pair in pairs]
    first, middle, third = quantiles(ratios, n=4, method="inclusive")
    return {
        "pairs": len(pairs),
        "old_s": median(pair.old_s for pair in pairs),
        "new_s": median(pair.new_s for pair in pairs),
        "new/old": middle,
        "error": ERROR_OF_MEDIAN * (third - first) / len(pairs) ** 0.5,
        "quartile_1": first,
        "quartile_3": third,
        "losses_equal": all(pair.losses_equal for pair in pairs),
    }


def show_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the printed table has it."""
    return {
        "rho": "unshaped" if row["rho"] == UNSHAPED else row["rho"],
        "case": row["case"],
        "pairs": row["pairs"],
        "old ms": row["old_s"] * 1e3,
        "new ms": row["new_s"] * 1e3,
        "new/old": f"{row['new/old']:.3f} +- {row['error']:.3f}",
        "half of the pairs": f"{row['quartile_1']:.3f} to {row['quartile_3']:.3f}",
        "losses equal": "yes" if row["losses_equal"] else "no",
    }


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A git worktree of a commit, removed at the end. RuntimeError with git's message where there is none."""
    git = ("git", "-C", str(CHECKOUT), "worktree")
    with TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "old"
        run_command(*git, "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            run_command(*git, "remove", "--force", str(tree))


@contextmanager
def launched(network: Network, trees: Mapping[str, Path]) -> Iterator[Versions]:
    """Ranks of both versions, with their engines. RuntimeError where one has the package of another tree."""
    with ExitStack() as stack:
        versions = {}
        for number, (version, tree) in enumerate(trees.items()):
            ranks = versions[version] = stack.enter_context(started(network, tree, PORT + number))
            folders = {answer["folder"] for answer in ranks.ask("checkout")}
            if folders != {str(tree)}:
                raise RuntimeError(f"the package is that of {sorted(folders)}; expected: {str(tree)!r}")
            ranks.ask("build", gpt=asdict(QUICK.gpt), micro_batches=QUICK.micro_batches, runs=CASES)
        yield versions


def warm_up(versions: Versions) -> float:
    """Trains first steps. How long a stage computes on a micro-batch, in seconds."""
    found = [
        timing([ranks.ask("step", run=case) for _ in range(WARM_UP_STEPS)])
        for ranks in versions.values()
        for case in CASES
    ]
    return Compute.least(found).slowest_s


def take_pair(versions: Versions, case: str, number: int) -> Pair:
    answers = {version: versions[version].ask("step", run=case) for version in order_turns(number)}
    return Pair.of(answers["old"], answers["new"])


def measure(
    network: Network, trees: Mapping[str, Path], rhos: Sequence[float], num_pairs: int
) -> list[dict[str, Any]]:
    """A row per rho and case. The first launch decides how fast the links are."""
    rates: dict[float, float | None] = {}
    pairs: defaultdict[tuple[float, str], list[Pair]] = defaultdict(list)
    shares = split_pairs(num_pairs)
    for launch, share in enumerate(shares):
        network.shape(None)
        with launched(network, trees) as versions:
            stage_s = warm_up(versions)
            rates = rates or {rho: link_rate(rho, QUICK.raw_bytes, stage_s) for rho in rhos}
            for rho, rate in rates.items():
                network.shape(rate)
                for case in CASES:
                    take_pair(versions, case, launch)  # TCP gets used to the link
                    pairs[rho, case] += [take_pair(versions, case, launch + i) for i in range(share)]
        print(f"launch {launch + 1} of {len(shares)} is done", flush=True)
    return [
        {"rho": rho, "rate_bits_per_s": rates[rho], "case": case, **summarize_pairs(found)}
        for (rho, case), found in pairs.items()
    ]


def report(rows: Sequence[Mapping[str, Any]], old_commit: str, folder: Path) -> None:
    """Writes paired.csv and paired.json."""
    facts = {
        "old_commit": old_commit,
        "gpt": asdict(QUICK.gpt),
        "micro_batches": QUICK.micro_batches,
        "launches": LAUNCHES,
        "warm_up_steps": WARM_UP_STEPS,
        "cases": CASES,
    }
    write_results(folder / "paired", rows, facts)
    print(f"written to {folder}: paired.csv, paired.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("commit", help="what this tree is compared with")
    parser.add_argument("--rho", type=float, nargs="+", default=RHOS, help="speeds of the link")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of steps, for each rho and case")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error(f"--pairs = {options.pairs}; accepted: 2 and up")
    prepare("benchmarks.links.paired")
    with checked_out(options.commit) as old, open_network() as network:
        rows = measure(network, {"old": old, "new": CHECKOUT}, options.rho, options.pairs)
        old_commit = describe_commit(old)
    print(format_table([show_row(row) for row in rows]))
    report(rows, old_commit, options.results)


if __name__ == "__main__":
    main()
