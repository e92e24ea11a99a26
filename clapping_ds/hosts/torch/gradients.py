"""torch's DistributedDataParallel: its buckets of gradients, compressed, by a communication hook.

    model = DistributedDataParallel(model)
    +gradients = clapping_ds.compress_gradients(model, {"clapping": {"data_parallel": {}}})

Each bucket is encoded and sent when it is ready, so that it travels during the rest of the backward pass;
means are taken when the last one is. A backward pass under `no_sync` exchanges nothing, as in stock. In a
pipeline of torch.distributed.pipelining `ClappingPipeline` does the same for stages whose modules are of that
class.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from clapping_ds import report
from clapping_ds.config import BLOCK_NAME, ClappingConfig
from clapping_ds.gradients.averaging import KEY, Averaging
from clapping_ds.gradients.exchange import Round
from clapping_ds.gradients.layout import Parameter
from clapping_ds.link.groups import Control, get_group_ranks, rank
from clapping_ds.stage.handshake import Source, agree_on_config, read_source, refuse_tuning
from clapping_ds.streams import is_asynchronous, mark


class ReplicaGradients:
    """The exchange of one DistributedDataParallel module's gradients.

    scaler   of `torch.amp`, where losses are scaled: what is held back follows its scale
    name     of the link between replicas, in figures
    """

    def __init__(
        self,
        module: DistributedDataParallel,
        config: ClappingConfig,
        control: Control,
        scaler: torch.amp.GradScaler | None = None,
        name: str = "replicas",
    ) -> None:
        # Configuration
        self.module = module
        self.scaler = scaler
        named = [(name, weight) for name, weight in module.module.named_parameters() if weight.requires_grad]
        self.numbers = {id(weight): number for number, (_, weight) in enumerate(named)}
        self.averaging = Averaging(
            config,
            control,
            [Parameter(name, weight.shape) for name, weight in named],
            get_group_ranks(module.process_group),
            next(module.module.parameters()).device,
            joins=False,  # DDP changes its buckets after the first backward pass, and in a resumed run again
            name=name,
        )
        self.measures_error = False
        """Whether the relative error of codecs is measured; costs a pass over each bucket."""
        # State
        self._started: list[tuple[Round, torch.Tensor, torch.futures.Future[torch.Tensor]]] = []
        """With the bucket's buffer, and what tells DDP that it is done."""
        self._is_finite: torch.Tensor | None = None
        """On the CPU, once `_wait` returned: whether all means of the last backward pass are. None before the
        first, and once it was read."""
        self._wait: Callable[[], None] = lambda: None
        if not self.averaging.plan.is_raw:
            module.register_comm_hook(self, ReplicaGradients.exchange)

    def exchange(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """For DDP: replaces a bucket of gradients by its mean over replicas."""
        if bucket.index() == 0:
            self._begin_step()
        buffer = bucket.buffer()
        if not self.averaging.compresses:
            if bucket.is_last():
                self._is_finite, self._wait = torch.ones((), dtype=torch.bool), lambda: None
            return allreduce_hook(self.module.process_group, bucket)
        numbers = [self.numbers[id(weight)] for weight in bucket.parameters()]
        round_ = self.averaging.start(dict(zip(numbers, bucket.gradients(), strict=True)))
        devices: list[Any] = [buffer.device] if buffer.is_cuda else []
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        self._started.append((round_, buffer, future))
        if bucket.is_last():
            self._finish()
        return future

    def _begin_step(self) -> None:
        self.settle()
        self._started = []
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        self.averaging.begin_step(scale, self.measures_error)

    def _finish(self) -> None:
        """In the order of buckets, which is the same on every replica."""
        for started, _, _ in self._started:
            started.advance()
        sums = []
        for started, buffer, future in self._started:
            started.finish()
            sums.append(buffer.float().sum())
            future.set_result(buffer)
        is_finite = torch.stack(sums).sum().isfinite()
        pins = is_asynchronous(is_finite.device)
        self._is_finite = torch.empty((), dtype=torch.bool, pin_memory=pins)
        self._is_finite.copy_(is_finite, non_blocking=True)
        self._wait = mark(is_finite.device)
        self._started = []

    def settle(self) -> None:
        """After a backward pass: what was lost in it is held back, unless its means are not finite, where
        optimizers skip the step. (Done before the next one, so that no GPU is waited for in this one.)"""
        if self._is_finite is not None:
            self._wait()
            self.averaging.end_step(accepted=bool(self._is_finite))
            self._is_finite = None

    def clapping_report(self) -> list[dict[str, Any]]:
        """A row for each way of every rank's gradients. A collective of all ranks."""
        return self.averaging.report()

    def state_dict(self) -> dict[str, Any]:
        """What each rank must save, in a file of its own, between two steps."""
        self.settle()
        return self.averaging.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> str | None:
        """Takes what `state_dict` gave, if every rank has it and it fits; else forgets what is held back, and
        says why. A collective of all ranks."""
        self._is_finite = None
        return self.averaging.load_state_dict(state)


def compress_gradients(
    module: DistributedDataParallel,
    config: Source,
    scaler: torch.amp.GradScaler | None = None,
) -> ReplicaGradients | None:
    """Has a DistributedDataParallel module exchange its gradients as the block's `data_parallel` says.
    Without that, or without an enabled block: None, and nothing changes.

    config   what has the "clapping" block, or the path of its JSON
    scaler   the GradScaler of the losses, if there is one
    A collective of all ranks. Raises ValueError on every rank for a block that is wrong on one, and where
    blocks or parameters differ.
    """
    device = next(module.module.parameters()).device
    found, control = agree_on_config(lambda: read_source(config), {}, device)
    if not found.enabled or found.data_parallel is None:
        if found.enabled and rank() == 0:
            report.say(f'gradients are not compressed (no "data_parallel" in the "{BLOCK_NAME}" block)')
        return None
    check(found)
    return ReplicaGradients(module, found, control, scaler)


def check(config: ClappingConfig) -> None:
    """Raises ValueError for what a hook cannot do."""
    assert config.data_parallel is not None
    refuse_tuning(config, "DistributedDataParallel")
    if config.data_parallel.delay:
        raise ValueError(
            f"{KEY}.delay = {config.data_parallel.delay} with DistributedDataParallel, which uses gradients "
            "at once; accepted: 0"
        )
    if config.data_parallel.weights is not None:
        raise ValueError(
            f"{KEY}.weights with DistributedDataParallel, whose optimizer is not split; accepted: null"
        )
