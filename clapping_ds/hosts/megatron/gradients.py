"""Megatron-Core's DistributedDataParallel: what its bucket groups reduce over replicas, compressed.

`start_grad_sync` of each bucket group is replaced, and the handle that it leaves to be waited for. When a
group is ready, where its gradients are, and who waits stays Megatron-Core's. What stages reduce among each
other comes after: both copies of a tied embedding get the same sum of the same means.

With `weights`, in steps that compress, distributed optimizers do not write their master copies into the
weights, and bucket groups gather nothing: once the step is made replicas send each other the changes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any

import torch

from clapping_ds.config import ClappingConfig
from clapping_ds.gradients.averaging import KEY, Averaging
from clapping_ds.gradients.exchange import Round
from clapping_ds.gradients.layout import Cut, Parameter, Piece
from clapping_ds.gradients.weights import Masters
from clapping_ds.hosts.megatron.core import DistributedDataParallel
from clapping_ds.link.groups import Control, get_group_ranks


class Started:
    """The handle of a bucket group that is on its way."""

    def __init__(self, gradients: "MegatronGradients", group: Any, round_: Round) -> None:
        self.gradients = gradients
        self.group = group
        self.round = round_

    def wait(self) -> None:
        self.gradients.finish(self)


class MegatronGradients:
    """Of all model chunks of one rank.

    model_chunks   DistributedDataParallel modules
    optimizer      Megatron-Core's, of these chunks: whether its step used the gradients decides what is held
    stage          the rank's place in its pipeline, for figures
    Making it is a collective of all ranks. Raises ValueError on every rank, with the same text, for what
    cannot be exchanged and where replicas differ.
    """

    def __init__(
        self,
        model_chunks: Sequence[Any],
        optimizer: Any,
        config: ClappingConfig,
        control: Control,
        device: torch.device,
        stage: int,
    ) -> None:
        # Configuration
        control.check(lambda: _refuse(model_chunks))
        settings = model_chunks[0].ddp_config
        control.check_equal({
            "number of model chunks": len(model_chunks),
            "use_distributed_optimizer": settings.use_distributed_optimizer,
            "overlap_grad_reduce": settings.overlap_grad_reduce,
        })  # fmt: skip
        groups = [group for chunk in model_chunks for group in chunk.bucket_groups]
        self.buckets = {
            id(weight): bucket for group in groups for bucket in group.buckets for weight in bucket.params
        }
        named = _list_weights(model_chunks)
        self.weights = [weight for _, weight in named]
        self.numbers = {id(weight): number for number, weight in enumerate(self.weights)}
        ranks = get_group_ranks(model_chunks[0].intra_dp_cp_group)
        cut: Cut | None = None
        if settings.use_distributed_optimizer:
            cut = [self._cut(weight, len(ranks)) for weight in self.weights].__getitem__
        self.averaging = Averaging(
            config,
            control,
            [_describe(name, weight, model_chunks[0]) for name, weight in named],
            ranks,
            device,
            cut,
            name=f"replicas {stage}",
        )
        self.groups = groups
        self.optimizers = _list_optimizers(optimizer)
        if self.averaging.weights is not None:
            control.check(lambda: _refuse_weights(self.optimizers))
        # State
        self._has_begun = False
        """Whether gradients of this step may still come, and the optimizer use them."""
        self._started: list[Started] = []
        """In the order of starts, which is the same on all replicas."""
        self._shares = False
        """Whether changes of weights are sent in the last step that was begun, in place of the weights."""
        # From here on nothing is refused.
        for group in groups:
            group.start_grad_sync = self._replace_start(group)
        optimizer.step = self._watch(optimizer.step)
        if self.averaging.weights is not None:
            for group in groups:
                group.start_param_sync = self._replace_gather(group)
            for each in self.optimizers:
                each._copy_main_params_to_model_params = self._put_off(each._copy_main_params_to_model_params)

    # Steps

    def begin_step(self, scale: float, measures_error: bool) -> None:
        """scale: of this step's losses."""
        self.end_step(accepted=False)  # of a backward pass that no optimizer step came after
        self._started = []
        self.averaging.begin_step(scale, measures_error)
        self._has_begun = True

    def end_step(self, accepted: bool) -> None:
        if self._has_begun:
            self.averaging.end_step(accepted)
        self._has_begun = False

    def _watch(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def watched(*args: Any, **options: Any) -> Any:
            has_weights, did_share = self.averaging.weights is not None, self._shares
            self._shares = has_weights and self._has_begun and self.averaging.compresses
            if self._shares and not did_share:
                self._gather()
            result = step(*args, **options)
            was_used, *_ = result
            if self._shares and was_used:
                self.averaging.share_weights_(self.weights, _make_masters(self.optimizers, self.weights))
            self.end_step(bool(was_used))
            return result

        return watched

    # Bucket groups

    def _replace_start(self, group: Any) -> Callable[..., None]:
        stock = group.start_grad_sync

        @wraps(stock)
        def start_grad_sync(force_all_reduce: bool | None = False) -> None:
            if force_all_reduce or not (self._has_begun and self.averaging.compresses):
                stock(force_all_reduce=force_all_reduce)
            elif group.grad_reduce_handle is None:
                self._start(group)
            else:
                assert group.is_first_batch, "a bucket group whose gradients are on their way is started"

        start_grad_sync.stock = stock  # type: ignore[attr-defined]
        return start_grad_sync

    def _start(self, group: Any) -> None:
        _prepare(group)
        weights = [weight for bucket in group.buckets for weight in bucket.params_list if weight.numel()]
        found = {self.numbers[id(weight)]: _find_gradient(weight) for weight in weights}
        started = Started(self, group, self.averaging.start(found))
        self._started.append(started)
        if group.ddp_config.overlap_grad_reduce:
            group.grad_reduce_handle = started
        else:
            started.wait()

    def finish(self, started: Started) -> None:
        """Before the first group is waited for, all that have been started are sent on: their second way is
        gone while the first group's is waited for."""
        for each in self._started:
            each.round.advance()
        started.round.finish()
        self._started.remove(started)
        for bucket in started.group.buckets:
            factor = bucket.gradient_scaling_factor
            if not started.group.ddp_config.average_in_collective:
                factor *= self.averaging.exchange.num_replicas  # stock adds up what it has scaled
            if factor != 1:
                bucket.grad_data *= factor

    def _cut(self, weight: Any, num_owners: int) -> list[tuple[int, int, int]]:
        """Each replica's optimizer has an equal part of every bucket."""
        buffer, numel = self.buckets[id(weight)].grad_data, weight.numel()
        begin, size = _find_gradient(weight).storage_offset() - buffer.storage_offset(), buffer.numel()
        bounds = [min(max(size // num_owners * owner - begin, 0), numel) for owner in range(num_owners + 1)]
        return [(owner, start, stop) for owner, (start, stop) in enumerate(pairwise(bounds))]

    # Weights of distributed optimizers

    def _replace_gather(self, group: Any) -> Callable[..., None]:
        stock = group.start_param_sync

        @wraps(stock)
        def start_param_sync(force_sync: bool = False) -> None:
            if self._shares:
                group.param_gather_dispatched = True
            else:
                stock(force_sync=force_sync)

        start_param_sync.stock = stock  # type: ignore[attr-defined]
        return start_param_sync

    def _put_off(self, copy: Callable[[], None]) -> Callable[[], None]:
        @wraps(copy)
        def copy_main_params_to_model_params() -> None:
            if not self._shares:
                copy()

        return copy_main_params_to_model_params

    def _gather(self) -> None:
        """All weights, as stock does, before the first changes: what replicas do not have alike then they
        never would have again. Stock may not have gathered what no forward pass used since its last step."""
        for group in self.groups:
            group.start_param_sync.stock(force_sync=True)

    # Figures and checkpoints

    def report(self) -> list[dict[str, Any]]:
        """A row for each way of every rank's gradients. A collective of all ranks."""
        return self.averaging.report()

    def state_dict(self) -> dict[str, Any]:
        """What this rank must save, in a file of its own, after an optimizer step."""
        return self.averaging.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> str | None:
        """As `Averaging.load_state_dict`. A collective of all ranks."""
        self._shares = False
        return self.averaging.load_state_dict(state)


def _describe(name: str, weight: Any, chunk: Any) -> Parameter:
    has_copy = bool(getattr(weight, "shared_embedding", False))
    return Parameter(name, weight.shape, _is_repeated(weight, chunk), has_copy)


def _list_weights(model_chunks: Sequence[Any]) -> list[tuple[str, Any]]:
    """What is trained, by names of which no two chunks have the same."""
    return [
        (name if len(model_chunks) == 1 else f"{number}.{name}", weight)
        for number, chunk in enumerate(model_chunks)
        for name, weight in chunk.module.named_parameters()
        if weight.requires_grad and weight.numel() > 0
    ]


def _is_repeated(weight: Any, chunk: Any) -> bool:
    """Whether each tensor-parallel rank has a weight as a whole, and replicas of its own: the means must be
    the same bits on all."""
    return chunk.tp_group.size() > 1 and not getattr(weight, "tensor_model_parallel", False)


def _list_optimizers(optimizer: Any) -> list[Any]:
    """Distributed optimizers, but those of no weights."""
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each for each in optimizers if not getattr(each, "is_stub_optimizer", False)]


def _make_masters(optimizers: Sequence[Any], weights: Sequence[Any]) -> Masters:
    """weights: by the number of the parameter."""
    found = {}
    for each in optimizers:
        for members, masters in zip(
            each.model_float16_groups, each.shard_fp32_from_float16_groups, strict=True
        ):
            for weight, master in zip(members, masters, strict=True):
                found[id(weight)] = master.detach(), each._get_model_param_range_map(weight)["param"].start

    def find(piece: Piece) -> torch.Tensor:
        master, begin = found[id(weights[piece.number])]
        return master[piece.start - begin : piece.stop - begin]

    return find


def _find_gradient(weight: Any) -> torch.Tensor:
    """In the buffer of gradients: that is where stock reduces it, wherever it is accumulated."""
    copy = getattr(weight, "main_grad_copy_in_grad_buffer", None)
    return weight.main_grad if copy is None else copy


def _prepare(group: Any) -> None:
    """As Megatron-Core does before it reduces a bucket group."""
    for weight in (weight for bucket in group.buckets for weight in bucket.params_list):
        event = getattr(weight, "_cudagraph_wgrad_ready_event", None)
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        gradient = _find_gradient(weight)
        if gradient is not weight.main_grad:
            gradient.copy_(weight.main_grad)
    settings = group.ddp_config
    if settings.check_for_nan_in_grad or settings.check_for_large_grads:
        group.check_grads(
            check_for_nan_or_inf=settings.check_for_nan_in_grad,
            check_for_large=settings.check_for_large_grads,
        )


def _refuse(model_chunks: Sequence[Any]) -> None:
    """Raises ValueError for model chunks whose gradients are exchanged in other ways."""
    for chunk in model_chunks:
        if not isinstance(chunk, DistributedDataParallel):
            raise ValueError(
                f"{KEY} with a model chunk of {type(chunk).__name__}; accepted: of Megatron-Core's "
                "DistributedDataParallel"
            )
        if chunk.expert_parallel_bucket_groups:
            raise ValueError(
                f"{KEY} with expert_model_parallel_size > 1, whose experts have replicas of their own; "
                f"accepted: 1, or {KEY} = null"
            )
        num_instances = chunk.ddp_config.num_distributed_optimizer_instances
        if num_instances > 1:
            raise ValueError(
                f"{KEY} with num_distributed_optimizer_instances = {num_instances}; accepted: 1, or {KEY} = "
                "null"
            )
        if any(hasattr(group.start_grad_sync, "stock") for group in chunk.bucket_groups):
            raise ValueError("compress_gradients was called for these model chunks before; accepted: once")


def _refuse_weights(optimizers: Sequence[Any]) -> None:
    """Raises ValueError for distributed optimizers that have their master copies elsewhere."""
    for each in optimizers:
        if not hasattr(each, "shard_fp32_from_float16_groups"):
            raise ValueError(
                f"{KEY}.weights with an optimizer of {type(each).__name__}; accepted: of Megatron-Core's "
                f"DistributedOptimizer, or {KEY}.weights = null"
            )
        settings = each.config
        refused = {
            "parameters in fp32, which have no master copy": any(map(len, each.model_fp32_groups)),
            "fp8_param_gather": each.ddp_config.fp8_param_gather,
            "fp4_param_gather": getattr(each.ddp_config, "fp4_param_gather", False),
            "optimizer_cuda_graph": getattr(settings, "optimizer_cuda_graph", False),
            "use_precision_aware_optimizer": settings.use_precision_aware_optimizer,
            "optimizer_cpu_offload": settings.optimizer_cpu_offload,
            "overlap_param_gather_with_optimizer_step": settings.overlap_param_gather_with_optimizer_step,
        }
        for what in (what for what, is_there in refused.items() if is_there):
            raise ValueError(f"{KEY}.weights with {what}; accepted: without, or {KEY}.weights = null")
