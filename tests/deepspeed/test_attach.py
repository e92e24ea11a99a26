"""Engines that somebody else's code makes: a subclass with a `train_batch` of its own, made without
`deepspeed.initialize`; and one whose instructions are patched after it was made, with an iterator of each
step."""

import warnings
from itertools import islice
from typing import ClassVar
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

import clapping_ds
from tests import models
from tests.cluster import assert_same_error
from tests.models import INT2, NONE

DIRECT = {"strategy": "direct"}
STEPS = 4


def _count_forward(engine, buffer_id):
    engine.num_forwards += 1
    PipelineEngine._exec_forward_pass(engine, buffer_id)


class OwnEngine(PipelineEngine):
    """As scripts for fine-tuning have one: `train_batch` takes nothing and returns a list, and builds its
    own schedule; shapes are new in each step; a forward pass of its own."""

    num_forwards = 0
    _INSTRUCTION_MAP: ClassVar = {**PipelineEngine._INSTRUCTION_MAP, schedule.ForwardPass: _count_forward}

    def __init__(self, *args, tokenizer, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokenizer = tokenizer

    def train_batch(self):
        self.reset_activation_shape()
        iterator = self.data_iterator
        self.module.train()
        self.total_loss = self.total_additional_losses = None
        self._compute_loss = True
        sizes = {"stages": self.num_stages, "stage_id": self.stage_id}
        self._exec_schedule(self.make_schedule(micro_batches=self.micro_batches, **sizes))
        self.set_dataiterator(iterator)
        return [float(self._aggregate_total_loss())]

    def make_schedule(self, **sizes):
        return schedule.TrainSchedule(**sizes)

    def eval_batch(self, data_iter):
        self.reset_activation_shape()
        return [float(super().eval_batch(data_iter))]


def make(block, cls=OwnEngine, num_stages=2, **options):
    model = models.pipeline(num_stages)
    config = {"train_micro_batch_size_per_gpu": models.BATCH, "gradient_accumulation_steps": 4, **options}
    if block is not None:
        config["clapping"] = block
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mpu = model.mpu()
    engine = cls(
        args=None, model=model, optimizer=optimizer, mpu=mpu, config=config, tokenizer="a tokenizer",
        config_class=DeepSpeedConfig(config, mpu),
    )  # fmt: skip
    engine.set_dataiterator(models.batches())
    return engine


def train_own(engine, steps=STEPS):
    losses = []
    for _ in range(steps):
        losses += [*engine.train_batch(), *engine.eval_batch(models.batches(9))]
    return losses


def train_reference(block, stock):
    engine, data, losses = models.make_engine(block, stock=stock), models.batches(), []
    for _ in range(STEPS):
        losses += [float(engine.train_batch(data)), float(engine.eval_batch(models.batches(9)))]
    return losses


def own_engines():
    found = {"stock": train_own(make(None))}
    for name, block in (("none", NONE), ("int2", INT2), ("direct", DIRECT)):
        found[name] = train_own(clapping_ds.attach(make(block)))
        decorated = clapping_ds.attach(type("Decorated", (OwnEngine,), {}))
        found[f"{name}, decorated"] = train_own(make(block, cls=decorated))
        found[f"{name}, initialized"] = train_reference(block, stock=False)
    found["config"] = train_own(clapping_ds.attach(make(None), {"clapping": INT2}))
    return found


def test_an_engine_with_its_own_train_batch(two_ranks):
    for found in two_ranks.run(own_engines):
        assert found["stock"] == found["none"] == found["none, decorated"] == found["none, initialized"]
        for name in ("int2", "direct"):
            assert found[name] == found[f"{name}, decorated"] == found[f"{name}, initialized"]
            assert found[name] != found["stock"]
        assert found["config"] == found["int2"]


def kept():
    """Whether an attached engine is what it was."""
    engine = make(DIRECT)
    is_same = clapping_ds.attach(engine) is engine
    train_own(engine, 1)
    facts = (
        is_same, isinstance(engine, OwnEngine), type(engine).__qualname__, engine.num_forwards,
        engine.tokenizer, engine._INSTRUCTION_MAP is OwnEngine._INSTRUCTION_MAP,
    )  # fmt: skip
    plain = make({"enabled": False})
    return facts, len(engine.clapping_report()), type(clapping_ds.attach(plain)) is OwnEngine


def test_an_engine_stays_one_of_its_class(two_ranks):
    for facts, num_channels, is_plain in two_ranks.run(kept):
        assert facts == (True, True, "OwnEngine", 8, "a tokenizer", True)
        assert num_channels == 2
        assert is_plain


def patched_later(block):
    """A stock engine, attached; then `ReduceGrads` is patched in the class's map, and each step has an
    iterator of its own. Losses, and how often the patch was called."""
    engine = models.make_engine(block, stock=True)
    if block is not None:
        clapping_ds.attach(engine)
    called = []

    def reduce(engine):
        called.append(None)
        PipelineEngine._exec_reduce_grads(engine)

    data, losses = models.batches(), []
    with mock.patch.dict(PipelineEngine._INSTRUCTION_MAP, {schedule.ReduceGrads: reduce}):
        for _ in range(STEPS):
            engine.reset_activation_shape()
            losses.append(float(engine.train_batch(iter(list(islice(data, 4))))))
            losses.append(float(engine.eval_batch(models.batches(9), num_micro_batches=2)))
    return losses, len(called)


def all_patched_later():
    blocks = {"stock": None, "none": NONE, "direct": DIRECT}
    found = {name: patched_later(block) for name, block in blocks.items()}
    return found, train_reference(DIRECT, stock=False)


def test_an_engine_whose_map_is_patched_later(two_ranks):
    for found, reference in two_ranks.run(all_patched_later):
        assert found["stock"] == found["none"]
        assert found["direct"][0][::2] == reference[::2]
        assert found["direct"][1] == STEPS


def resumed(folder):
    """Losses of a run, and of one that was saved after two steps and loaded by another engine."""
    whole = train_own(clapping_ds.attach(make(INT2)))
    first = clapping_ds.attach(make(INT2))
    before = train_own(first, 2)
    first.save_checkpoint(folder)
    second = clapping_ds.attach(make(INT2))
    second.load_checkpoint(folder)
    next(islice(second.data_iterator, second.clapping_num_drawn - 1, None))
    return whole, before + train_own(second, 2)


def test_an_attached_engine_resumes(two_ranks, tmp_path):
    for whole, in_two in two_ranks.run(resumed, str(tmp_path)):
        assert whole == in_two


class OwnSchedule(schedule.TrainSchedule):
    pass


def _load_past(engine, buffer_id):
    """As an engine that keeps its data to itself."""
    tokens, labels = next(engine.data_iterator)
    name, value = ("inputs", tokens) if engine.is_first_stage() else ("labels", labels)
    engine.pipe_buffers[name][buffer_id] = value


class InlineEngine(OwnEngine):
    """Works its schedule off itself."""

    def _exec_inline(self):
        sizes = {"stages": self.num_stages, "stage_id": self.stage_id}
        todo = schedule.TrainSchedule(micro_batches=self.micro_batches, **sizes)
        self._reserve_pipe_buffers(todo.num_pipe_buffers())
        self.fwd_outputs = []
        self.module.train()
        self.total_loss = None
        self._compute_loss = True
        for commands in todo:
            for command in commands:
                self._INSTRUCTION_MAP[type(command)](self, **command.kwargs)

    train_batch = _exec_inline


class OwnStep(OwnEngine):
    def _end_step(self, reports):
        pass


class OwnSaving(OwnEngine):
    def save_checkpoint(self, folder):
        super().save_checkpoint(folder)


OWN = {"inline": InlineEngine, "names": OwnStep, "saving": OwnSaving}


def refused(what):
    number = dist.get_rank()
    block = {"strategie": "fc"} if what == "block" and number == 1 else DIRECT
    engine = make(block, OWN.get(what, OwnEngine))
    if what == "attribute" and number == 0:
        engine._shapes = None
    if what == "no engine":
        clapping_ds.attach(engine.module)
    clapping_ds.attach(engine)
    if what == "twice":
        clapping_ds.attach(engine)
    if what == "schedule":
        engine.make_schedule = OwnSchedule
    if what == "micro-batches":
        engine.make_schedule = lambda micro_batches, **sizes: schedule.TrainSchedule(2, **sizes)
    if what in ("sends", "loads"):
        kind = schedule.SendActivation if what == "sends" else schedule.LoadMicroBatch
        own = _count_forward if what == "sends" else _load_past
        engine._INSTRUCTION_MAP = {**OwnEngine._INSTRUCTION_MAP, kind: own}
    engine.train_batch()


ATTACH = "attach to tests.deepspeed.test_attach."


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("block", "clapping.strategie = 'fc': unknown key"),
        ("no engine", "attach to deepspeed.runtime.pipe.module.PipelineModule; accepted: a DeepSpeed"),
        ("twice", f"{ATTACH}OwnEngine; accepted: a DeepSpeed PipelineEngine"),
        ("names", "attach to an engine that has a _end_step of its own; accepted: another name"),
        ("attribute", "attach to an engine that has a _shapes of its own; accepted: another name"),
        ("saving", "attach to an engine whose save_checkpoint takes other arguments than DeepSpeed's"),
        ("schedule", "a training step with the schedule OwnSchedule; accepted: TrainSchedule"),
        ("micro-batches", "a training step of 2 micro-batches where the engine has 4"),
        ("sends", "an engine whose SendActivation is _count_forward; accepted: that of DeepSpeed"),
        ("loads", "a training step that took 0 of 4 micro-batches from _next_batch"),
        ("inline", "an optimizer step outside of a training schedule, whose messages went past the channels"),
    ],
)
def test_what_cannot_be_attached_is_one_error(two_ranks, what, message):
    assert_same_error(two_ranks.outcomes(refused, what), "ValueError", message)


def repaired():
    """A step that is refused, and the next; and an engine whose attaching fails, which goes on as stock."""
    engine = clapping_ds.attach(make(DIRECT))
    engine.make_schedule = OwnSchedule
    with pytest.raises(ValueError, match="OwnSchedule"):
        engine.train_batch()
    del engine.make_schedule
    after = engine.train_batch()
    config = {"clapping": {**NONE, "data_parallel": {"node_size": 2}}}
    failed = make(None)
    before = dict(vars(failed))
    with pytest.raises(ValueError, match="1 replica"):
        clapping_ds.attach(failed, config)
    return after, type(failed) is OwnEngine and vars(failed) == before, failed.train_batch()


def split():
    """Of replicas whose optimizer is split, stock, and after an attach that failed: losses, and whether the
    optimizer's step is still its own."""
    found = []
    for block in (None, {"data_parallel": {"min_numel": 512}, "links": {"read": "nowhere.json"}}):
        engine = make(None, num_stages=1, **models.ZERO1)
        if block is not None:
            with pytest.raises(ValueError, match=r"nowhere.json"):
                clapping_ds.attach(engine, {"clapping": block})
        is_own = "step" not in vars(engine.optimizer)
        found.append((engine.train_batch() + engine.train_batch(), is_own))
    return found


def test_an_optimizer_is_left_alone_where_attaching_fails(two_ranks):
    for stock, after in two_ranks.run(split):
        assert stock == after
        assert stock[1]


def test_after_a_refusal_all_is_as_before(two_ranks):
    first, stock = two_ranks.run(first_losses)[0]
    for after, is_as_before, losses in two_ranks.run(repaired):
        assert (after, is_as_before, losses) == (first, True, stock)


def first_losses():
    return clapping_ds.attach(make(DIRECT)).train_batch(), make(None).train_batch()


def late():
    """Attached after two steps: what is counted, and the losses of the next two with nothing compressed."""
    engine, stock = make(NONE), make(NONE)
    for _ in range(2):
        engine.train_batch()
        stock.train_batch()
    clapping_ds.attach(engine)
    both = [(engine.train_batch(), stock.train_batch()) for _ in range(2)]
    return engine.clapping_num_drawn, all(mine == other for mine, other in both)


def test_attached_after_some_steps(two_ranks):
    assert two_ranks.run(late) == [(16, True)] * 2


def explicit():
    class Explicit(PipelineEngine):
        def __init__(self, *args, **kwargs):
            super(Explicit, self).__init__(*args, **kwargs)  # noqa: UP008

    Explicit = clapping_ds.attach(Explicit)
    model = models.pipeline(2)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "clapping": DIRECT}
    optimizer, mpu = torch.optim.AdamW(model.parameters(), lr=3e-3), model.mpu()
    options = {"args": None, "model": model, "optimizer": optimizer, "mpu": mpu, "config": config}
    engine = Explicit(**options, config_class=DeepSpeedConfig(config, mpu))
    return float(engine.train_batch(models.batches())), len(engine.clapping_report())


def test_a_decorated_class_that_names_itself(two_ranks):
    for loss, num_channels in two_ranks.run(explicit):
        assert (loss > 0, num_channels) == (True, 2)


def ended(again):
    """An iterator that ends in the second step, and what the step gives when it is tried again."""
    engine = clapping_ds.attach(make(DIRECT))
    engine.set_dataiterator(islice(models.batches(), 6))
    first = engine.train_batch()
    with pytest.raises(StopIteration, match="Nothing of this step was trained or lost"):
        engine.train_batch()
    engine.set_dataiterator(islice(models.batches(), 6, None))
    return first + engine.train_batch() if again else first


def test_a_step_whose_data_ended_is_tried_again(two_ranks):
    whole = two_ranks.run(resumed_reference)
    assert two_ranks.run(ended, True) == whole


def resumed_reference():
    engine = clapping_ds.attach(make(DIRECT))
    return engine.train_batch() + engine.train_batch()


def warned(kind):
    """What the first two steps warn of."""
    clapping_ds.enable()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind == "no pipeline":
            config = {"train_micro_batch_size_per_gpu": 1, "clapping": DIRECT}
            layer = torch.nn.Linear(2, 2)
            adam = torch.optim.AdamW(layer.parameters())
            engine, *_ = deepspeed.initialize(model=layer, optimizer=adam, config=config)
            for _ in range(2):
                engine.backward(engine(torch.ones(1, 2)).sum())
                engine.step()
        else:
            engine = make({"enabled": False} if kind == "off" else DIRECT)
            if kind == "attached":
                clapping_ds.attach(engine)
            for _ in range(2):
                engine.train_batch()
    return [str(each.message) for each in caught if "clapping" in str(each.message)]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("no pipeline", "deepspeed.runtime.engine.DeepSpeedEngine has no pipeline"),
        ("own", "tests.deepspeed.test_attach.OwnEngine was not made by deepspeed.initialize after"),
        ("attached", None),
        ("off", None),
    ],
)
def test_a_block_that_reaches_no_engine_warns_once(two_ranks, fresh_ranks, kind, why):
    ranks = fresh_ranks(2) if kind == "no pipeline" else two_ranks  # where no pipeline ever was
    first, second = ranks.run(warned, kind)
    assert second == []
    assert len(first) == (why is not None)
    if why is not None:
        assert first[0].startswith(f'the "clapping" block has no effect, as {why}')
