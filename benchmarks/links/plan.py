"""Where compression would pay on larger pipelines, by the model of `clapping_ds.plan.timeline`.

Nothing here is measured, and only time is considered, not what a codec does to the loss. What is assumed
is listed in `benchmarks.links.cases`; `benchmarks.links.simulate` checks the model and runs this. Differences
below 2 % mean nothing: no depth is looked for that comes closer to the bound. It writes

    plan.csv            every model, number of stages, link, number of replicas and method
    plan_summary.csv    per pipeline: stock, overlap only, and the fastest compressed method that fits
    plan.png            speed-up of that method over overlap only
    plan.json           versions and machine
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

from benchmarks.files import new_figure, read_csv, save_figure, write_csv, write_results
from benchmarks.links.cases import (
    GPU_MEMORY_BYTES,
    LINKS,
    METHODS,
    MODELS,
    OVERLAP,
    SEQUENCE_LENGTH,
    STOCK,
    Case,
    Model,
)
from clapping_ds.autotune.depth import count_warmup
from clapping_ds.plan.bounds import automatic_depth, bound_s
from clapping_ds.plan.timeline import Step, Timeline, simulate
from clapping_ds.report import format_table

NUM_STAGES = (8, 16, 32, 64, 128, 256)
REPLICAS = (1, 8)
CLOSE = 1.02
"""No other depth is tried for a step that takes at most its bound times this."""
WORTHWHILE = 1.05
"""Compression pays where it is faster than overlap only by more than this factor."""
PIPELINE = ("model", "stages", "link", "replicas")
"""The columns that name a pipeline."""
Row = dict[str, Any]


def depths(step: Step, deepest: int) -> dict[int, Timeline]:
    """By depth, what was tried: first what `"in_flight": "auto"` would choose, then on while it is faster.

    Deeper is not always faster: where links are the limit, each further micro-batch of warm-up delays the
    middle stages' first backward by a transfer. Where stages are uneven, it fills the others' pauses.
    """
    depth = min(automatic_depth(step), deepest)
    tried = {depth: simulate(step, "ours", depth)}
    for direction in (-1, 1):
        while tried[depth].step_s > CLOSE * bound_s(step) and 0 <= depth + direction <= deepest:
            further = depth + direction
            if further not in tried:
                tried[further] = simulate(step, "ours", further)
            if tried[further].step_s >= tried[depth].step_s:
                break
            depth = further
    return tried


def rows_of(model: Model, num_stages: int, link_name: str) -> Iterator[Row]:
    """A row per method and number of replicas."""
    for method, plan in METHODS.items():
        case = Case(model, num_stages, LINKS[link_name], plan)
        step = case.step()
        is_stock = method == STOCK
        tried = {0: simulate(step, "stock")} if is_stock else depths(step, max(0, case.deepest()))
        for replicas in REPLICAS:
            names = model.name, num_stages, link_name, replicas
            shape = dict(zip(PIPELINE, names, strict=True)) | {"method": method}
            yield shape | _figures(case, step, tried, replicas)


def _figures(case: Case, step: Step, tried: dict[int, Timeline], replicas: int) -> Row:
    automatic = next(iter(tried))
    in_flight = min(tried, key=lambda depth: tried[depth].step_s)
    timeline = tried[in_flight]
    memory_bytes, all_reduce_s = case.memory_bytes(in_flight), case.all_reduce_s(replicas)
    step_s = timeline.step_s + all_reduce_s
    stage_s = max(stage.forward_s + stage.backward_s for stage in step.stages)
    return {
        "rho": case.model.message_bytes / case.link.bytes_per_s / stage_s,
        "bits_per_value": case.mean_bits,
        "micro_batches": case.num_micro_batches,
        "in_flight": in_flight,
        "stored": count_warmup(case.num_micro_batches, case.num_stages, 0, in_flight),
        "memory_gb": memory_bytes / 1e9,
        "fits": memory_bytes <= GPU_MEMORY_BYTES,
        "step_s": step_s,
        "bound_s": bound_s(step) + all_reduce_s,
        "all_reduce_s": all_reduce_s,
        "auto_in_flight": automatic,
        "auto_s": tried[automatic].step_s + all_reduce_s,
        "tokens_per_s": replicas * case.num_micro_batches * SEQUENCE_LENGTH / step_s,
        "busiest_link": max(timeline.activation_shares) * timeline.step_s / step_s,
    }


def refusal(model: Model, num_stages: int) -> str | None:
    """Why a model has no pipeline of that many stages."""
    if num_stages > model.num_layers:
        return f"only {model.num_layers} layers"
    link = next(iter(LINKS.values()))
    fits = Case(model, num_stages, link, METHODS[OVERLAP]).deepest() >= 0
    return None if fits else f"does not fit GPUs of {GPU_MEMORY_BYTES / 1e9:.0f} GB"


def summary(rows: Sequence[Row]) -> list[Row]:
    """A row per pipeline, of `rows_of` several: what is fastest, and whether compression pays."""
    ordered = sorted(rows, key=_pipeline)
    return [_summary({row["method"]: row for row in group}) for _, group in groupby(ordered, _pipeline)]


def _pipeline(row: Row) -> tuple[Any, ...]:
    order = [model.name for model in MODELS], list(LINKS)
    return order[0].index(row["model"]), row["stages"], row["replicas"], order[1].index(row["link"])


def _summary(methods: dict[str, Row]) -> Row:
    stock, overlap = methods.pop(STOCK), methods.pop(OVERLAP)
    best = min((row for row in methods.values() if row["fits"]), key=lambda row: row["step_s"])
    over_overlap = overlap["step_s"] / best["step_s"]
    return {
        **{name: overlap[name] for name in PIPELINE},
        "bytes_per_s": LINKS[overlap["link"]].bytes_per_s,
        "rho": overlap["rho"],
        "stock_s": stock["step_s"],
        "overlap_s": overlap["step_s"],
        "best": best["method"],
        "best_s": best["step_s"],
        "tokens_per_s": best["tokens_per_s"],
        "over_stock": stock["step_s"] / best["step_s"],
        "over_overlap": over_overlap,
        "in_flight": f"{overlap['in_flight']}, {best['in_flight']}",
        "stored": f"{overlap['stored']}, {best['stored']}",
        "memory_gb": best["memory_gb"],
        "verdict": "compression pays" if over_overlap > WORTHWHILE else "overlap is enough",
    }


def plot(source: Path, target: Path) -> None:
    """Draws what the CSV says of one replica, for the fewest and the most stages of each model."""
    rows = [row for row in read_csv(source) if row["replicas"] == "1"]
    figure, axes = new_figure(1, 2, inches=(11, 4.2), sharey=True)
    for axis, choose, title in zip(axes, (min, max), ("fewest stages that fit", "most stages"), strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == model]
            num_stages = choose(int(row["stages"]) for row in mine)
            points = [row for row in mine if int(row["stages"]) == num_stages]
            speeds = [float(row["bytes_per_s"]) * 8e-9 for row in points]
            gains = [float(row["over_overlap"]) for row in points]
            axis.plot(speeds, gains, marker=".", label=f"{model}, {num_stages} stages")
        axis.axhline(WORTHWHILE, color="grey", lw=0.8, ls="--")
        axis.set(xscale="log", yscale="log", xlabel="Gbit/s", title=title)
        axis.set_yticks([1, 1.5, 2, 3, 4, 6, 8], ["1", "1.5", "2", "3", "4", "6", "8"], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("modelled speed-up of compression over overlap only")
    save_figure(figure, target)


def printed(rows: Sequence[Row]) -> str:
    """One replica with the fewest stages of each model; and how often compression pays, by link."""
    fewest: dict[str, int] = {}
    for row in rows:
        fewest[row["model"]] = min(row["stages"], fewest.get(row["model"], row["stages"]))
    hidden = ("replicas", "bytes_per_s")
    shown = [row for row in rows if row["replicas"] == 1 and row["stages"] == fewest[row["model"]]]
    counts = []
    for replicas, link in dict.fromkeys((row["replicas"], row["link"]) for row in rows):
        mine = [row for row in rows if (row["replicas"], row["link"]) == (replicas, link)]
        gains = sorted(row["over_overlap"] for row in mine)
        pays = sum(gain > WORTHWHILE for gain in gains)
        counts.append({
            "replicas": replicas,
            "link": link,
            "compression pays": f"{pays} of {len(gains)}",
            "over overlap": f"{gains[0]:.2f} to {gains[-1]:.2f}",
        })  # fmt: skip
    without = [{name: value for name, value in row.items() if name not in hidden} for row in shown]
    return f"{format_table(without)}\n\n{format_table(counts)}"


def report(folder: Path) -> None:
    """Simulates every pipeline, writes the files, and prints the summary."""
    rows: list[Row] = []
    for model, num_stages in product(MODELS, NUM_STAGES):
        reason = refusal(model, num_stages)
        if reason:
            print(f"{model.name}, {num_stages} stages: {reason}")
            continue
        for link in LINKS:
            rows += rows_of(model, num_stages, link)
    found = summary(rows)
    write_results(folder / "plan", rows, {})
    write_csv(folder / "plan_summary.csv", found)
    plot(folder / "plan_summary.csv", folder / "plan.png")
    print(printed(found))
    print(f"written to {folder}: plan.csv, plan_summary.csv, plan.png, plan.json")
