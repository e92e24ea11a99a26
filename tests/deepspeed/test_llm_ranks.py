"""A Hugging Face model over two real ranks, of DeepSpeed and of torch, trains as in one process with the same
channels between its blocks: `benchmarks.model.links`."""

import contextlib
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

import clapping_ds
from benchmarks.model.links import Links
from benchmarks.training.finetune import train
from clapping_ds.link.groups import Control
from launch import llm
from launch.finetune import Checkpoints, finetune, pipeline
from launch.finetune_torch import Trainer
from launch.finetuning import Finetuning, prepare_everywhere
from launch.trainer import learning_rate_schedule, optimizer, save_at_times
from tests.cluster import assert_same_error, free_groups
from tests.core.test_llm import SIZES as SMALL
from tests.core.test_llm import make, make_ids
from tests.models import DIRECT, INT2, NONE

STEPS, NUM_SLOTS, LENGTH = 4, 4, 64
SIZES = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": NUM_SLOTS}
QUIET = {"steps_per_print": 10**6, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
"""Also without DeepSpeed's default clipping, which in a pipeline of fp32 knows one stage's gradients only."""
RUN = Finetuning(steps=STEPS, warmup_steps=1, learning_rate=1e-3)
BLOCKS = {"none": NONE, "direct int4": DIRECT, "fc int2": INT2}
CASES = [("llama", 0), ("gpt2", 4), ("gemma3_text", 4)]
"""Models, and the rank of their adapters; 0: all weights are trained."""


def feed():
    generator = torch.Generator().manual_seed(1)
    while True:
        window = torch.randint(3, 97, (1, LENGTH + 1), generator=generator)
        yield window[:, :-1].contiguous(), window[:, 1:].contiguous()


def prepare(name, rank):
    """A model, and what its adapters are, or None."""
    model = make(name)
    torch.manual_seed(1)
    return model, llm.add_lora(model, rank) if rank else None


def train_with_deepspeed(cuts, block):
    module = pipeline(cuts)
    engine, *_ = clapping_ds.initialize(
        model=module,
        optimizer=optimizer(module, RUN),
        lr_scheduler=lambda adam: learning_rate_schedule(adam, RUN),
        config={**SIZES, **QUIET, "clapping": block},
    )
    data = feed()
    losses = [float(engine.train_batch(data_iter=data)) for _ in range(STEPS)]
    (stage,) = (part for part in module.modules() if isinstance(part, llm.Stage))
    return losses, stage


def train_with_torch(cuts, block):
    trainer = Trainer(cuts, RUN, {**SIZES, "clapping": block})
    data = feed()
    return [trainer.step(data) for _ in range(STEPS)], trainer.stage


def train_in_one_process(name, rank, block):
    model = prepare(name, rank)[0].train()
    cuts = llm.Cuts(model, 2)
    last = getattr(model.base_model, cuts.parts.blocks)[cuts.blocks[0].stop - 1]
    adam = optimizer(model, RUN)
    schedule = learning_rate_schedule(adam, RUN)
    losses = train(model, [last], Links(block), adam, schedule, partial(next, feed()), STEPS)
    return list(losses), model


def gather(item):
    items = [None, None]
    torch.distributed.all_gather_object(items, item)
    return items


def run(host, cases, folder):
    """Of each case, losses and this rank's weights; the result is saved in a folder of the case's number."""
    train_there, found = {"deepspeed": train_with_deepspeed, "torch": train_with_torch}[host], []
    for number, (name, rank, block) in enumerate(cases):
        model, lora = prepare(name, rank)
        cuts = llm.Cuts(model, 2)
        losses, stage = train_there(cuts, block)
        found.append((losses, {key: weight.clone() for key, weight in stage.state_of_whole().items()}))
        llm.save(stage, torch.distributed.get_rank(), cuts, folder / str(number), gather, lora)
        free_groups()
    return found


def load(folder, name, rank):
    if rank:
        return PeftModel.from_pretrained(make(name), folder).eval()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("host", ["deepspeed", "torch"])
def test_ranks_train_as_one_process_does(two_ranks, host, tmp_path):
    """Every weight is the same, bit for bit, after some steps, and what is saved gives the same logits. The
    loss is a mean of four, in fp32 there and in fp64 here: four roundings of 2^-24."""
    cases = [(name, rank, block) for name, rank in CASES for block in BLOCKS.values()]
    outcomes = two_ranks.run(run, host, cases, tmp_path)
    for number, (name, rank, block) in enumerate(cases):
        losses, model = train_in_one_process(name, rank, block)
        weights = model.state_dict()
        for of_rank in outcomes:
            told, state = of_rank[number]
            assert told == pytest.approx(losses, rel=4 * 2**-24)
            assert all(torch.equal(weight, weights[key]) for key, weight in state.items())
        with torch.no_grad():
            found = load(tmp_path / str(number), name, rank)(make_ids()).logits
            assert torch.equal(found, model.eval()(make_ids()).logits)


BF16 = {
    "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
    "data_types": {"grad_accum_dtype": "fp32"},
}  # fmt: skip
"""Without ZeRO DeepSpeed 0.19.8 cannot load what its optimizer for bf16 saved."""


def finetune_and_stop(folder, model, steps, lora_rank, bf16):
    """Losses of steps, of a run that goes on from what is in the folder; this rank's weights."""
    torch.manual_seed(0)
    options = {
        "model": str(model),
        "data": Path(__file__),
        "length": 32,
        "lora_rank": lora_rank,
        "save": None,
    }
    run = Finetuning(**options, steps=6, warmup_steps=1, learning_rate=1e-2, eval_batches=1)
    config = {**SIZES, **QUIET, **(BF16 if bf16 else {}), "clapping": INT2}
    made = []

    def initialize(**given):
        made.append(clapping_ds.initialize(**given)[0])
        return (made[0],)

    kept = Checkpoints(folder, checkpoint_steps=2)
    with (
        mock.patch("launch.finetune.save_at_times", partial(stop_after, steps)),
        contextlib.suppress(StoppedError),
    ):
        finetune(run, config, initialize, "", Control(60.0), kept=kept)
    weights = {name: weight.detach().clone() for name, weight in made[0].module.named_parameters()}
    free_groups()
    return made[0].global_steps, weights


class StoppedError(Exception):
    pass


def stop_after(steps, engine, folder, interval, last, step):
    save_at_times(engine, folder, interval, last, step)
    if step == steps:
        raise StoppedError


@pytest.mark.parametrize(("lora_rank", "bf16"), [(0, False), (4, True)])
def test_a_run_that_was_stopped_goes_on(two_ranks, tmp_path, lora_rank, bf16):
    model = tmp_path / "model"
    config = AutoConfig.for_model("llama", **{**SMALL, "vocab_size": 49152})
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    llm.load(llm.SMOLLM2)[1].save_pretrained(model)
    whole = two_ranks.run(finetune_and_stop, tmp_path / "whole", model, 6, lora_rank, bf16)
    two_ranks.run(finetune_and_stop, tmp_path / "parts", model, 3, lora_rank, bf16)
    parts = two_ranks.run(finetune_and_stop, tmp_path / "parts", model, 6, lora_rank, bf16)
    for (steps, wanted), (steps_of_parts, found) in zip(whole, parts, strict=True):
        assert steps == steps_of_parts == 6
        assert {weight.dtype for weight in found.values()} == {torch.bfloat16 if bf16 else torch.float32}
        assert all(torch.equal(weight, found[name]) for name, weight in wanted.items())


def sum_tied_gradients(host):
    """One step of plain descent with rate 1, after which the tied weight has moved by its gradient."""
    model = make("llama, tied")
    before = model.get_input_embeddings().weight.detach().clone()
    if host == "deepspeed":
        module = pipeline(llm.Cuts(model, 2))
        sgd = torch.optim.SGD(module.parameters(), lr=1.0)
        config = {**SIZES, **QUIET, "clapping": NONE}
        engine, *_ = clapping_ds.initialize(model=module, optimizer=sgd, config=config)
        engine.train_batch(data_iter=feed())
        (stage,) = (part for part in module.modules() if isinstance(part, llm.Stage))
    else:
        trainer = Trainer(llm.Cuts(model, 2), RUN, {**SIZES, "clapping": NONE})
        trainer.optimizer = torch.optim.SGD(trainer.stage.parameters(), lr=1.0)
        trainer.step(feed())
        stage = trainer.stage
    moved = before - stage.tied_weight.detach()
    free_groups()
    return moved


@pytest.mark.parametrize("host", ["deepspeed", "torch"])
def test_both_ends_of_a_tied_weight_move_by_the_sum_of_their_gradients(two_ranks, host):
    """Eight gradients of fp32 are added in another order, and the weight is rounded once: 2^-24 each, of
    their sum of magnitudes and of the weight."""
    first, last = two_ranks.run(sum_tied_gradients, host)
    assert torch.equal(first, last)
    model, data = make("llama, tied"), feed()
    weight = model.get_input_embeddings().weight
    total, magnitude = torch.zeros_like(weight), torch.zeros_like(weight)
    for ids, labels in (next(data) for _ in range(NUM_SLOTS)):
        hidden = model.get_input_embeddings()(ids)
        output = model(inputs_embeds=hidden).logits
        loss = llm.loss(output, labels) / NUM_SLOTS
        (of_head, of_hidden) = torch.autograd.grad(loss, [weight, hidden], retain_graph=True)
        of_table = torch.autograd.grad(hidden, weight, of_hidden)[0]
        of_head = of_head - of_table  # `hidden` is of the same weight
        total += of_head + of_table
        magnitude += of_head.abs() + of_table.abs()
    assert ((first - total).abs() <= (2 * NUM_SLOTS * magnitude + weight.abs()) * 2**-23).all()


def with_its_own_text(folder):
    number = dist.get_rank()
    text = folder / f"{number}.txt"
    text.write_text("The same length, and another letter: " + "ab"[number] * 4000)
    prepare_everywhere(Control(30.0), Finetuning(data=text, length=16), 2)


def test_texts_that_differ_between_ranks_are_one_error(two_ranks, tmp_path):
    outcomes = two_ranks.outcomes(with_its_own_text, tmp_path)
    assert_same_error(outcomes, "ValueError", "the ranks differ; accepted: the same everywhere\n")
    assert "checksum of --data: " in outcomes[0].message
