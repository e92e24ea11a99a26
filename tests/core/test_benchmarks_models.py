"""The benchmarks of CR-Net and of bilevel optimization, a few steps of each."""

from functools import partial

import pytest
import torch

from benchmarks.bilevel import cleaning, mixture, quadratic
from benchmarks.training import crnet, crnet_costs
from clapping_ds.crnet import SIZES, CRNetConfig, counts
from launch.mixture import MixtureRun
from launch.trainer import Training


def test_models_keep_to_the_budget():
    for name, model in crnet.MODELS.items():
        module, config = crnet.make(model, 40)
        in_layers = sum(each.numel() for each in module.parameters() if each.dim() > 1) - 80 * config.width
        if name not in ("full rank", "full rank, std 0.02"):
            assert 0.97 * crnet.BUDGET < in_layers <= crnet.BUDGET, name


def test_a_model_is_measured(monkeypatch):
    monkeypatch.setattr(crnet, "Training", partial(Training, steps=1, warmup_steps=1))
    monkeypatch.setattr(crnet, "NUM_HELD_OUT", 1)
    rows = [crnet.measure(name, 1)[0] for name in ("CR-Net", "CoLA")]
    assert all(4 < row["loss"] < 7 for row in rows)
    summary = {row["model"]: row for row in crnet.summarize(rows)}
    assert summary["CR-Net"]["against CR-Net"] == "+0.0000"
    assert summary["CoLA"]["seeds"] == 1


def test_costs_are_counted(monkeypatch):
    size = {"width": 64, "intermediate": 96, "num_layers": 8, "num_heads": 4, "rank": 16}
    monkeypatch.setitem(SIZES, "60M", size)
    monkeypatch.setattr(crnet_costs, "NUM_SAMPLES", 1)
    rows = {form: crnet_costs.measure("60M", form) for form in (("CR-Net", "none"), ("CR-Net", "forward"))}
    forward, none = rows["CR-Net", "forward"], rows["CR-Net", "none"]
    assert torch.get_default_dtype() == torch.float32
    kept = counts.count_kept(CRNetConfig(**size, checkpoint_every=8), 0, True) / 8 / 64
    # And x, which goes on, and outputs that are nobody's.
    assert forward["kept values per token and layer / width"] == pytest.approx(kept, abs=0.3)
    assert none["kept values per token and layer / width"] > 5 * kept
    assert none["TFLOPs of a step"] <= forward["TFLOPs of a step"]


def test_cleaning_finds_wrong_labels(monkeypatch):
    monkeypatch.setattr(cleaning, "NUM_STEPS", 60)
    case = cleaning.Case("ed")
    cases = case, cleaning.Case("ed", x_step=0.0)
    rows, paths = zip(*(cleaning.measure(each, 1) for each in cases), strict=True)
    assert rows[0]["AUC"] > 0.9 and rows[1]["AUC"] == 0.5
    assert rows[0]["upper loss"] < rows[1]["upper loss"]
    assert len(cleaning.summarize(rows)) == 2
    assert [step for step, *_ in paths[0]] == [25, 50]
    assert rows[0]["test loss"] < paths[0][-1][2] == rows[0]["halfway"] < paths[0][0][2]
    cleaning.plot(dict(zip(cases, paths, strict=True)))


def test_mixtures_are_compared(monkeypatch, tmp_path):
    paths = [tmp_path / name for name in (*mixture.NAMES, "target")]
    for number, path in enumerate(paths):
        path.mkdir()
        (path / "text.txt").write_bytes(bytes((number + n * n) % 251 for n in range(8_000)))
    options = {
        "corpora": tuple(paths[:4]),
        "target": paths[4],
        "steps": 2,
        "batch_size": 4,
        "share_start": 1,
        "share_interval": 1,
    }
    monkeypatch.setattr(mixture, "MixtureRun", partial(MixtureRun, **options))
    names = ("uniform", "learned", "data alone", "data alone, four times the samples")
    rows = [mixture.measure(name, 1)[0] for name in names]
    assert [row["bytes of gossip per site"] for row in rows] == [0, 1 * 2 * (48 + 16), 0, 0]
    assert [row["shares"] for row in mixture.summarize(rows)] == list(names)


def test_runs_of_the_quadratic():
    runs = quadratic.list_runs()
    run, steps = runs["ed, 64 values, eden4"]
    assert steps == 1000
    assert 0 < run.train(2) < float(run.solution.norm()) + 1
    assert run.bytes_sent > 0
