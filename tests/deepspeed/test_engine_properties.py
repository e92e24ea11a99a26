"""An engine of two ranks, whatever is done, in whatever order: both hold the same finite bits, their bytes
are the formula's, and what goes on from a checkpoint is what would have gone on."""

from hashlib import sha256
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest.mock import patch

import torch
from deepspeed.accelerator import get_accelerator
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from clapping_ds.codecs.base import pad_nbytes
from clapping_ds.link.message import Spec
from tests import models
from tests.cluster import free_groups
from tests.core.random_blocks import blocks, reproducible
from tests.models import ZERO1

FP16 = {
    "fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "min_loss_scale": 1},
}


class Data:
    """Batch number `position` in the length that is asked for at that moment. left: until it ends."""

    def __init__(self):
        self.position, self.length, self.left = 0, models.LENGTH, None

    def __iter__(self):
        return self

    def __next__(self):
        if self.left is not None:
            if self.left == 0:
                raise StopIteration
            self.left -= 1
        self.position += 1
        return next(models.batches(self.position - 1, self.length))


class Found(NamedTuple):
    """What both ranks must have alike after an operation, and what a resumed run must repeat."""

    operation: tuple
    loss: str
    loss_scale: float
    memories: dict[tuple[str, str], str]
    are_finite: bool
    num_bytes: int
    expected_bytes: int


class EngineRun:
    """Operations on one rank's engine. What they gave is judged by the parent, so that no rank waits for
    one that has stopped."""

    def __init__(self, block, ds, folder):
        self.block, self.ds, self.folder = block, ds, folder
        self.is_fp16 = "fp16" in ds
        self.engine = None
        self.data = Data()
        self.expected_bytes = 0
        self.number, self.evaluated_length = 4, None
        self.saved, self.since = None, []
        self.found, self.repeated = [], []
        self.start()

    def start(self):
        self.engine = None
        free_groups()
        self.engine = models.make_engine(self.block, ds=self.ds, module_options={"num_blocks": 2})
        self.evaluated_length = None
        self.num_slots(self.number)

    def apply(self, operation):
        name, *arguments = operation
        loss = getattr(self, name)(*arguments)
        memories = models.memories(self.engine)
        channels = self.engine._endpoint.channels.values()
        held = [held for channel in channels for held in channel.all_held()]
        tensors = [tensor for one in held for tensor in one[1:] if tensor is not None]
        found = Found(
            operation,
            repr(loss),
            self.engine._loss_scale(),
            {end: sha256(repr(held).encode()).hexdigest() for end, held in memories.items()},
            all(bool(tensor.isfinite().all()) for tensor in tensors),
            self.engine.clapping_traffic().payload_bytes,
            self.expected_bytes,
        )
        self.found.append(found)
        if name not in ("save", "load"):
            self.since.append(found)
        return found

    # Operations

    def train(self):
        step, coin = self.engine._endpoints.step, self.engine._endpoints.coin
        before = self.engine._endpoints.num_held.get(coin.pick(step), 0)
        try:
            loss = float(self.engine.train_batch(data_iter=self.data))
        except StopIteration as error:
            return str(error)
        for slot, is_fresh in enumerate(coin.toss(step, self.number)):
            self.expected_bytes += self.num_bytes(slot, is_fresh or slot >= before)
        return loss

    def num_bytes(self, slot, fresh):
        """Of one message in each direction."""
        total = 0
        sampler = self.engine._endpoint.sampler
        length = sampler._pool[sampler._entry][slot][0].shape[1]
        spec = Spec(
            torch.Size((models.BATCH, length, models.WIDTH)), torch.float16 if self.is_fp16 else torch.float32
        )
        for plan in self.engine.clapping.plans.values():
            codec = plan.key if fresh else plan.delta
            is_compressed = spec.shape.numel() >= plan.min_numel
            total += codec.nbytes(*spec) if is_compressed else pad_nbytes(spec.nbytes)
        return total + (2 * 48 if self.block["verify"] else 0)

    def overflow(self):
        """A step of which the activations are not finite: fp16 skips it."""
        if not self.is_fp16:
            return self.train()
        optimizer = self.engine.optimizer
        optimizer.loss_scale = max(optimizer.loss_scale, 2.0)  # at the smallest, 1, DeepSpeed ends the run
        weight = next(self.engine.module.parameters()).data
        before = weight.clone()
        if self.engine.is_first_stage():
            weight[5] = float("inf")
        loss = self.train()
        weight.copy_(before)
        return loss

    def data_ends(self, *left):
        """On each rank after so many more batches. A step that lacks some is not trained, and loses none."""
        self.data.left = left[self.engine.global_rank]
        found = self.train()
        self.data.left = None
        return found

    def all_is_used(self):
        """Whether no rank keeps batches that it drew for a step that others lacked some for."""
        return self.engine._control.agree([not self.engine._endpoint.sampler._drawn])[0]

    def evaluate(self, num_slots):
        if self.evaluated_length != self.data.length:
            self.engine.reset_activation_shape()
        self.evaluated_length = self.data.length
        return float(self.engine.eval_batch(models.batches(9, self.data.length), num_micro_batches=num_slots))

    def num_slots(self, number):
        self.number = number
        self.engine.set_train_batch_size(number * models.BATCH)

    def length(self, length):
        """Of the batches to come, once ranks have drawn as many as each other."""
        if self.all_is_used():
            self.data.length = length

    def scale(self, power):
        if self.is_fp16:
            self.engine.optimizer.loss_scale = 2.0**power

    def save(self):
        """Once a step was trained with what is held: a resumed run draws anew what was not used."""
        last_number = len(self.engine._endpoints.fresh)
        if last_number and self.all_is_used():
            self.engine.save_checkpoint(self.folder)
            self.saved = last_number, self.number, self.data.length, self.expected_bytes
            self.since = []

    def load(self, into_new, with_same_number):
        """With the number of micro-batches of the checkpoint, what was done since gives what it gave; with
        another, nothing is held."""
        if self.saved is None:
            self.save()
        if self.saved is None:
            return
        if into_new:
            self.start()
        last_number, number, self.data.length, self.expected_bytes = self.saved
        self.num_slots(last_number if with_same_number else last_number + 1)
        self.engine.load_checkpoint(self.folder)
        self.num_slots(number)
        self.data.position = self.engine.clapping_num_drawn
        if not with_same_number:
            self.expected_bytes = self.engine.clapping_traffic().payload_bytes
            self.saved, self.since = None, []
            return
        since, self.since = self.since, []
        self.repeated += [(before, self.apply(before.operation)) for before in since]


def run_engine(block, ds, sequence, folder):
    with patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: True):
        run = EngineRun(block, ds, folder)
        for operation in (("train",), *sequence, ("load", True, True)):
            run.apply(operation)
    return run.found, run.repeated


engine_operations = st.one_of(
    st.just(("train",)),
    st.just(("train",)),
    st.just(("overflow",)),
    st.tuples(st.just("data_ends"), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("evaluate"), st.integers(1, 3)),
    st.tuples(st.just("num_slots"), st.integers(1, 6)),
    st.tuples(st.just("length"), st.sampled_from([32, 64])),
    st.tuples(st.just("scale"), st.integers(0, 14)),
    st.just(("save",)),
    st.tuples(st.just("load"), st.booleans(), st.sampled_from([True, True, False])),
)


@given(
    blocks([1024, 6000], refresh=["step", "slot", "cycle"], in_flight=[0, 1, "auto"], overlap=[True]),
    st.sampled_from([{}, FP16, {**FP16, **ZERO1}]),
    st.lists(engine_operations, min_size=20, max_size=20),
)
@settings(reproducible(12), phases=[Phase.generate])
def test_any_sequence_on_an_engine(two_ranks, block, ds, sequence):
    with TemporaryDirectory() as folder:
        (one, repeated), (other, also_repeated) = two_ranks.run(run_engine, block, ds, sequence, folder)
    assert one == other
    for found in one:
        assert found.are_finite, found.operation
        assert found.num_bytes == found.expected_bytes, found.operation
    for before, again in repeated + also_repeated:
        assert before == again, f"after a load, {before.operation} gave something else"
