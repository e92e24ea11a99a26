"""The count of what the codec `transform` costs counts what it says."""

import json
import os
import subprocess
import sys

import torch

from benchmarks.kernels import budget

NUM_CODED = 4096 - 4096 // 128
PRODUCT = 2 * NUM_CODED * 4096**2
STATISTICS = 6 * 2 * NUM_CODED * 4096
"""Of rows and coordinates, each a product of the message with a vector."""
SEARCH = 2 * NUM_CODED * 128 * 1024
"""In 128 coordinates, for the nearest of 1,024 anchors."""
PROGRAM = """
import json
from benchmarks.kernels import budget
from benchmarks.kernels.variants import SITUATIONS

products = {
    f"{label} {situation.label} {end}": [cost.operations["fp32"], cost.operations["int8"]]
    for label, codec in budget.CODECS.items()
    for situation in SITUATIONS
    for end, cost in budget.count(codec, situation).items()
}
print(json.dumps([products, budget.rows()]))
"""


def test_products_are_those_that_are_needed_and_no_bytes_are_missing():
    """In a process of its own: here Triton interprets its kernels, and they are not launched but run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    products, rows = json.loads(done.stdout)
    for label, analysis, search in (
        ("channel", 0, 0),
        ("channel 1024 anchors", 0, SEARCH),
        ("eigen", PRODUCT, 0),
        ("eigen 1024 anchors", PRODUCT, SEARCH),
    ):
        of_sender = analysis + search + STATISTICS
        assert products[f"{label} direct encode"] == [of_sender, 0]
        assert products[f"{label} direct decode"] == [analysis, 0]
        assert products[f"{label} memory encode"] == [of_sender, 3 * analysis], "three planes"
        assert products[f"{label} memory decode"] == [0, 3 * analysis]
    assert len(rows) == 24
    assert all(line["moved / least"] >= 1 and line["passes"] >= 2 for line in rows)


def test_bytes_are_those_that_are_read_and_written():
    x, row = torch.empty(4096, 4096, device="meta"), torch.empty(4096, device="meta")
    size = x.nbytes
    for operation, expected in (
        (lambda: x + 1.0, 2 * size),
        (lambda: x + row, 2 * size + row.nbytes),
        (lambda: x + row.expand(4096, 4096), 2 * size + row.nbytes),
        (lambda: x.mul_(2.0), 2 * size),
        (lambda: x.zero_(), size),
        (lambda: x.copy_(row.expand_as(x)), size + row.nbytes),
        (lambda: x.T, 0),
        (lambda: torch.empty_like(x), 0),
        (lambda: torch.where(x > 0, 1.0, x), 2 * (size + size // 4) + size),
    ):
        cost = budget.Cost()
        with budget.Counting(cost):
            operation()
        assert abs(cost.num_bytes - expected) <= 16
