"""The files of every benchmark: tables, where their figures come from, plots."""

import csv
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import cpuinfo

RESULTS = Path(__file__).parent / "results"
"""The folder of the committed files."""
COLOURS = (
    *("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple"),
    *("tab:brown", "tab:pink", "tab:gray", "tab:olive", "tab:cyan"),
    *("black", "magenta", "lime", "navy", "blue", "burlywood"),
)
"""Of a plot's lines, in order: matplotlib's ten, then six that differ more from all others than these do at
the least (CIE Lab). From the seventeenth line on they repeat."""


def write_results(target: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """`target`.csv with the rows, `target`.json with their provenance and what else there is to know."""
    write_csv(target.with_suffix(".csv"), rows)
    write_json(target.with_suffix(".json"), {**provenance(), **facts})


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The columns are the first row's keys; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows, by column; every cell is text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def compare_losses(
    losses: Sequence[float], differences: Sequence[float], against: str, loss: str = "loss"
) -> dict[str, Any]:
    """Cells of a summary: over seeds, the mean loss, and the mean and spread of its differences to another
    run with the same seed. against, loss: what the columns are called."""
    return {
        "seeds": len(losses),
        loss: f"{mean(losses):.4f}",
        f"against {against}": f"{mean(differences):+.4f}" if differences else "-",
        "spread": f"{stdev(differences):.4f}" if len(differences) > 1 else "-",
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """What JSON has no type for, such as a path, is written as text. The folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")


def provenance() -> dict[str, str | int | None]:
    """What a reader needs to know to repeat a measurement: commit, versions, machine. Takes a second."""
    return {
        "commit": describe_commit(Path(__file__).parent),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "deepspeed")},
        "processor": cpuinfo.get_cpu_info().get("brand_raw") or platform.machine(),
        "cores": os.cpu_count(),
    }


def describe_commit(folder: Path) -> str:
    """Of the checkout that a folder is in, with `-dirty` where files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def new_figure(num_rows: int, num_columns: int, inches: tuple[float, float], **options: Any) -> Any:
    """A figure and an array of its empty axes, whose lines get COLOURS in turn.

    inches: width and height of the whole. options: of matplotlib's `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches)
    axes = figure.subplots(num_rows, num_columns, **options)
    for axis in axes.flat:
        axis.set_prop_cycle(color=COLOURS)
    return figure, axes


def save_figure(figure: Any, target: Path) -> None:
    """As PNG, 120 pixels to the inch."""
    figure.tight_layout()
    figure.savefig(target, dpi=120)
