"""The example: its data, its model, its configuration."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from clapping_ds import ClappingConfig
from launch import pretrain_gpt
from launch.data import Windows, tokens
from launch.trainer import RunConfig, learning_rate_schedule, train

LAUNCH = Path(__file__).parents[2] / "launch"


def test_the_corpus_is_there_without_a_path():
    corpus, vocabulary = tokens(None)
    assert vocabulary == 256
    assert len(corpus) > 1_000_000
    assert isinstance(corpus, np.memmap)


def test_folder_file_and_token_file(tmp_path):
    (tmp_path / "a.txt").write_text("hello ")
    (tmp_path / "b.md").write_text("world")
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert bytes(tokens(tmp_path)[0]) == b"hello world"
    assert bytes(tokens(tmp_path / "b.md")[0]) == b"world"
    np.arange(300, dtype=np.uint16).tofile(tmp_path / "flat.u16")
    assert tokens(tmp_path / "flat.u16")[1] == 300
    with pytest.raises(ValueError, match="no such file"):
        tokens(tmp_path / "missing")


def test_a_tokenizer_file(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b c a")
    corpus, vocabulary = tokens(tmp_path / "text.txt", tmp_path / "tokenizer.json")
    assert (list(corpus), vocabulary) == ([0, 1, 2, 0], 3)


def test_encoded_text_is_kept_where_only_this_user_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("hello")
    assert bytes(tokens(tmp_path / "a.txt")[0]) == b"hello"
    folder = tmp_path / "cache" / "clapping_ds"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [file.read_bytes() for file in folder.iterdir()] == [b"hello"]
    for mode in (0o720, 0o702):
        folder.chmod(mode)
        with pytest.raises(ValueError, match=f"{str(folder)!r}.* mode {mode:04o}"):
            tokens(tmp_path / "a.txt")
    folder.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(ValueError, match=f"{str(folder)!r}.* owner"):
        tokens(tmp_path / "a.txt")


def test_windows_are_seeded_and_shifted():
    corpus = np.arange(2000, dtype=np.uint16)
    first, again = (next(Windows(corpus, 16, 3, validation=False).batches(7)) for _ in range(2))
    assert (first[0] == again[0]).all()
    assert (first[0] + 1 == first[1]).all()
    assert next(Windows(corpus, 16, 3, validation=True).batches(7))[0].min() >= 1900


def rates(run):
    adam = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], run.learning_rate)
    schedule = learning_rate_schedule(adam, run)
    for _ in range(run.steps):
        yield adam.param_groups[0]["lr"] / run.learning_rate
        adam.step()
        schedule.step()


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 10, 100, 120])
def test_learning_rate_warms_up_and_decays(warmup_steps):
    found = list(rates(RunConfig(steps=100, warmup_steps=warmup_steps)))
    rising = [(step + 1) / warmup_steps for step in range(min(warmup_steps, 100))]
    falling = [0.55 + 0.45 * math.cos(math.pi * x / (100 - warmup_steps)) for x in range(100 - warmup_steps)]
    assert found == pytest.approx(rising + falling, rel=1e-12)  # a few roundings of 2 ** -53 per step


def test_the_example_block_is_valid():
    config = json.loads((LAUNCH / "ds_config.json").read_text())
    assert ClappingConfig.from_ds_config(config).plan("gradients").key.name == "eden4"


def parse(arguments):
    return pretrain_gpt.parse(pretrain_gpt.Options, None, arguments)


def test_options_of_the_script():
    started = ["--local_rank=1", "--deepspeed_config", "ds.json"]
    assert parse(started) == pretrain_gpt.Options(Path("ds.json"), RunConfig(), 1)
    dashes = ["--local-rank", "1", "--deepspeed-config=ds.json"]
    assert parse(dashes) == parse(started)
    more = "--num-stages 4 --steps 9 --data text --save out --learning-rate 1e-3 --warmup_steps 2 --width 64"
    run = parse([*started, *more.split()]).run
    assert (run.num_stages, run.steps, run.data, run.save) == (4, 9, Path("text"), Path("out"))
    assert (run.learning_rate, run.warmup_steps, run.gpt.width) == (1e-3, 2, 64)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--steps 9", "--deepspeed-config"),
        ("--deepspeed_config ds.json --stepz 9", "--stepz"),
        ("--deepspeed_config ds.json --steps nine", "nine"),
        ("--deepspeed_config ds.json --vocabulary 9", "--vocabulary"),  # the corpus decides
    ],
)
def test_wrong_options_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit):
        parse(arguments.split())
    assert named in "".join(capsys.readouterr())


def test_options_of_the_megatron_script():
    pytest.importorskip("megatron.core")
    from launch.pretrain_gpt_megatron import MegatronRun, Options, parse

    assert parse([]) == Options(MegatronRun(), None)
    options = parse(["--clapping-config", "ds.json", "--sequence-parallel", "--tensor-size=2", "--chunks=2"])
    assert options == Options(MegatronRun(chunks=2, tensor_size=2, sequence_parallel=True), Path("ds.json"))
    assert parse(["--clapping_config", "ds.json", "--pipeline_size=4"]).run.pipeline_size == 4


def short_run(folder, block):
    import clapping_ds

    config = json.loads((LAUNCH / "ds_config.json").read_text())
    config["clapping"] = config["clapping"] if block is None else block
    run = RunConfig(steps=6, eval_interval=3, eval_batches=1, save=folder)
    return train(run, config, clapping_ds.initialize)


BOTH = {"key": "int8", "delta": "int2"}
LAZY = {"strategy": "key_delta", "lazy": {"refresh": "cycle"}, "activations": BOTH, "gradients": BOTH}


@pytest.mark.parametrize("block", [None, LAZY], ids=["its own block", "lazy"])
def test_the_example_trains_validates_and_saves(two_ranks, tmp_path, block):
    first, second = two_ranks.run(short_run, tmp_path, block)
    assert first.validations == second.validations
    assert [step for step, _, _ in first.validations] == [3, 6]
    assert first.train_losses[-1] < first.train_losses[0]
    assert {row["direction"] for row in first.report} == {"activations", "gradients"}
    assert (tmp_path / "latest").read_text() == "global_step6"
