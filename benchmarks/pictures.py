"""Pictures for docs/how-it-works.md: what a link does to a pipeline's step, and where the bits of `transform`
go.

    python -m benchmarks.pictures

The schedules are `clapping_ds.plan.timeline`'s; the spectra are of SmolLM2-135M reading torch's C++ headers.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import new_figure, save_figure
from clapping_ds.autotune.depth import count_warmup
from clapping_ds.codecs.base import ceil_div
from clapping_ds.codecs.statistics import find_gains, find_moments
from clapping_ds.codecs.transform import BLOCK, give_out_bits
from clapping_ds.config import DIRECTIONS
from clapping_ds.plan.bounds import automatic_depth
from clapping_ds.plan.timeline import Link, Order, Span, Stage, Step, simulate, trace
from launch import llm
from launch.data import Windows, tokens
from launch.finetuning import C10

FOLDER = Path(__file__).parents[1] / "docs" / "images"
NUM_STAGES, NUM_SLOTS, RHO = 3, 6, 1.5
"""rho: time of a micro-batch's activations on a link, over a stage's time for it."""
EDEN4_BITS, RAW_BITS = 4.125, 16
COLOURS = {
    "forward": "tab:blue", "backward": "tab:orange", "activations": "tab:green", "gradients": "tab:red",
}  # fmt: skip
LAYER, LENGTH, NUM_SAMPLES, TOKENS_PER_OUTLIER = 15, 256, 16, 128


def make_step(bits: float) -> Step:
    stages = (Stage(1 / 3, 2 / 3),) * NUM_STAGES
    messages = (bits / RAW_BITS,) * NUM_SLOTS
    return Step(stages, (Link(1 / RHO),) * (NUM_STAGES - 1), messages, messages)


def draw_schedules(target: Path) -> None:
    raw, coded = make_step(RAW_BITS), make_step(EDEN4_BITS)
    depth = automatic_depth(raw)
    held = count_warmup(NUM_SLOTS, NUM_STAGES, 0, depth)
    hidden = (
        f"overlapped: messages travel while stages compute ({held} micro-batches held on the first stage)"
    )
    schedules: dict[str, tuple[Step, Order, int]] = {
        "stock DeepSpeed: a stage waits while its message travels": (raw, "stock", 0),
        hidden: (raw, "ours", depth),
        "overlapped, eden4: messages take less than stages do": (coded, "ours", automatic_depth(coded)),
    }
    steps_s = [simulate(*schedule).step_s for schedule in schedules.values()]
    figure, axes = new_figure(len(schedules), 1, inches=(13, 9), sharex=True)
    for (title, schedule), step_s, axis in zip(schedules.items(), steps_s, axes.flat, strict=True):
        _draw_spans(axis, trace(*schedule))
        axis.set(title=f"{title}: {step_s:.1f}", xlim=(0, max(steps_s)))
    axes.flat[-1].set_xlabel("time, of a stage for a micro-batch, forward and backward")
    axes.flat[1].legend(handles=[_patch(name) for name in COLOURS], loc="center right")
    save_figure(figure, target)


def _draw_spans(axis: Any, found: Mapping[tuple[int, str], Sequence[Span]]) -> None:
    """A row per stage, and between two of them one per direction of their link."""
    labels: list[str] = []
    for number in range(NUM_STAGES):
        _draw_row(axis, len(labels), 0.9, {name: found[number, name] for name in ("forward", "backward")})
        labels.append(f"stage {number}")
        for name in DIRECTIONS if number < NUM_STAGES - 1 else ():
            _draw_row(axis, len(labels), 0.45, {name: found[number, name]})
            labels.append(f"link {number}-{number + 1}")
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()


def _draw_row(axis: Any, place: int, height: float, found: Mapping[str, Sequence[Span]]) -> None:
    for name, spans in found.items():
        for slot, start_s, end_s in spans:
            axis.barh(place, end_s - start_s, height, start_s, color=COLOURS[name], edgecolor="white")
            if name not in DIRECTIONS:
                axis.text((start_s + end_s) / 2, place, str(slot), ha="center", va="center", fontsize=7)


def _patch(name: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=COLOURS[name], label=name)


@torch.no_grad()
def read_hidden() -> torch.Tensor:
    """fp32 [tokens, width]: what LAYER puts out, less the outliers, over gains."""
    model: Any
    model, tokenizer = llm.load(llm.SMOLLM2)
    corpus, _ = tokens(C10, tokenizer.backend_tokenizer)
    found: list[torch.Tensor] = []
    model.base_model.layers[LAYER - 1].register_forward_hook(
        lambda _, __, out: found.append(out.flatten(0, -2))
    )
    for ids, _ in islice(Windows(corpus, LENGTH, 1, validation=True).batches(1), NUM_SAMPLES):
        model(ids, use_cache=False)
    x = torch.cat(found)
    kept = x.norm(dim=1).argsort()[: len(x) - ceil_div(len(x), TOKENS_PER_OUTLIER)].sort().values
    x = x[kept] / x[kept].abs().max()
    return x / find_gains(x, torch.ones(len(x), dtype=torch.bool))[:, None]


def draw_transform(target: Path) -> None:
    """The basis is that of the first half of the tokens; all else of the second."""
    seen, new = read_hidden().chunk(2)
    basis = torch.linalg.eigh(torch.cov(seen.T)).eigenvectors
    sorted_C = {
        name: find_moments(y, torch.ones(len(y), dtype=torch.bool)).deviations.sort(descending=True).values
        for name, y in (("channels", new), ("eigenbasis of earlier messages", new @ basis))
    }
    figure, axes = new_figure(1, 2, inches=(13, 4.5))
    left, right = axes.flat
    for name, deviation_C in sorted_C.items():
        left.plot(deviation_C / deviation_C.square().mean().sqrt(), label=name)
        bits_B = give_out_bits(deviation_C, 2 * len(deviation_C) // BLOCK)
        right.step(range(len(bits_B)), bits_B, where="mid", label=name)
    left.set(yscale="log", xlabel="coordinate, sorted", ylabel="deviation, of the root mean square")
    right.set(xlabel="block of 16 coordinates", ylabel="bits of its values, 2 in the mean")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, target)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    draw_schedules(FOLDER / "schedules.png")
    draw_transform(FOLDER / "transform.png")


if __name__ == "__main__":
    main()
