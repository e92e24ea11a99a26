"""What the parts of the codec `transform` cost on one thread of a CPU, and what they learn from on another.

    python -m benchmarks.codecs.parts

One message of 4 x 512 x 1,024 values, fp32, 2 bits, encoded and decoded, with and without a memory; medians
of NUM_TURNS, for which all configurations take turns. Parts are the functions that `Transform.encode_` and
`decode_` call, timed by cProfile; what is left of a whole is in `rest`. The last column is what a thread
beside computes once in `refresh` messages, the default of 256, divided by these. Writes codec_parts.csv.
"""

import argparse
import time
from collections import defaultdict
from cProfile import Profile
from pathlib import Path
from pstats import Stats
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.files import RESULTS, write_results
from benchmarks.kernels.variants import Situation
from clapping_ds.codecs import Context, Transform, learning
from clapping_ds.report import format_table

SHAPE = (4 * 512, 1024)
NUM_TURNS = 7
CODECS = {
    "channel": Transform(bits=2),
    "channel, 1,024 anchors": Transform(bits=2, anchors=1024),
    "eigen": Transform(bits=2, basis="eigen"),
    "eigen, 1,024 anchors": Transform(bits=2, basis="eigen", anchors=1024),
}
SITUATIONS = (
    Situation("direct", torch.float32, None),
    Situation("memory", torch.float32, torch.float32),
)
PARTS = {
    "transform._part_rows": "outliers, gains",
    "learning.analyse": "basis, anchors",
    "statistics.find_moments": "means, scales, deviations",
    "transform._write_side_": "bits of blocks",
    "transform_reference.write_codes_": "codes",
    "learning.learn_": "sample of rows",
    "transform_reference.read_codes": "levels",
    "learning.synthesise": "anchors, basis",
    "transform_reference.apply_": "gains, outliers, memory",
}
"""By function, in the order of the path; the last three at both ends where there is a memory."""


class Case(NamedTuple):
    """A configuration with its two ends."""

    codec: Transform
    value: torch.Tensor
    payload: torch.Tensor
    sender: Context
    receiver: Context

    @classmethod
    def of(cls, codec: Transform, situation: Situation) -> "Case":
        value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        payload = torch.empty(codec.nbytes(SHAPE, value.dtype), dtype=torch.uint8)
        return cls(codec, value, payload, *(situation.context(codec, SHAPE) for _ in range(2)))

    def run(self) -> dict[str, float]:
        """Milliseconds of each function, with those that it calls, and of all."""
        profile = Profile(builtins=False)
        start_s = time.perf_counter()
        profile.enable()
        self.codec.encode_(self.value, self.payload, self.sender)
        self.codec.decode_(self.payload, torch.empty_like(self.value), self.receiver)
        profile.disable()
        found = {"all ms": 1e3 * (time.perf_counter() - start_s)}
        times: Any = Stats(profile).stats  # type: ignore[attr-defined]
        for (file, _, function), (_, _, _, cumulative_s, _) in times.items():
            found[f"{Path(file).stem}.{function}"] = 1e3 * cumulative_s
        return found


def measure_learning(codec: Transform) -> float:
    """Milliseconds a message of the thread that computes what is learned."""
    layout = codec.layout(SHAPE[1])
    if layout is None:
        return 0.0
    num_rows = layout.rows_per_message * layout.refresh
    row_RC = torch.randn(num_rows, SHAPE[1], generator=torch.Generator().manual_seed(2)).bfloat16()
    start_s = time.perf_counter()
    learning.compute(row_RC, lambda: None, layout, pins=False)
    return 1e3 * (time.perf_counter() - start_s) / layout.refresh


def list_rows() -> list[dict[str, Any]]:
    """A line per configuration."""
    torch.set_num_threads(1)
    cases = {
        (name, situation.label): Case.of(codec, situation)
        for name, codec in CODECS.items()
        for situation in SITUATIONS
    }
    times: defaultdict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for _ in range(NUM_TURNS):
        for key, case in cases.items():
            times[key].append(case.run())
    found = []
    for (name, label), mine in times.items():
        medians = {part: median(each.get(part, 0.0) for each in mine) for part in ("all ms", *PARTS)}
        rest_ms = medians["all ms"] - sum(medians[part] for part in PARTS)
        found.append({
            "transform, 2 bits": name, "": label, "all ms": round(medians["all ms"], 1),
            **{title: f"{medians[part] / medians['all ms']:.0%}" for part, title in PARTS.items()},
            "rest": f"{rest_ms / medians['all ms']:.0%}",
            "beside, ms a message": round(measure_learning(CODECS[name]), 1),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = list_rows()
    write_results(options.results / "codec_parts", rows, {"shape": SHAPE, "turns": NUM_TURNS})
    print(format_table(rows))


if __name__ == "__main__":
    main()
