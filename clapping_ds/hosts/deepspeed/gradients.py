"""Where DeepSpeed's pipeline engine has its gradients, and how its own exchange of them is left out.

Three kinds of optimizer: one that is not split over replicas (ZeRO stage 0 in fp32 and fp16),
`BF16_Optimizer` (bf16, stages 0 and 1), and ZeRO stage 1 in fp32 and fp16. The last two are split: a replica
needs its own part of the mean alone. Their code is not replaced: gradients are averaged before DeepSpeed's
own reduction, of which the one method that sends is then without effect.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from clapping_ds.gradients.averaging import KEY, Averaging
from clapping_ds.gradients.layout import Cut, Parameter, Piece
from clapping_ds.link.groups import get_group_ranks


class Gradients:
    """Of one engine, in the order of its module's parameters, with their exchange."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        engine._control.check(lambda: _refuse(engine))
        tied = {id(weight) for weight, _ in engine.module.get_tied_weights_and_groups()}
        if engine.is_model_parallel:  # whole on each tensor-parallel rank, and replicas draw for themselves
            weights = engine.module.parameters()
            tied |= {id(weight) for weight in weights if not is_model_parallel_parameter(weight)}
        optimizer = engine.optimizer
        positions = _find_positions(optimizer)
        named = [
            (name, weight)
            for name, weight in engine.module.named_parameters()
            if weight.requires_grad and weight.numel() > 0 and (positions is None or id(weight) in positions)
        ]
        self.weights = [weight for _, weight in named]
        parameters = [Parameter(name, weight.shape, id(weight) in tied) for name, weight in named]
        self._positions = [] if positions is None else [positions[id(weight)] for weight in self.weights]
        """Of a split optimizer, by parameter: its group, and its place there."""
        cut: Cut | None = None
        if isinstance(optimizer, BF16_Optimizer):
            cut = [self._cut_flat(number) for number in range(len(named))].__getitem__
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            cut = [self._cut_zero(number) for number in range(len(named))].__getitem__
        self.averaging = Averaging(
            engine.clapping,
            engine._control,
            parameters,
            get_group_ranks(engine.grid.get_data_parallel_group()),
            engine.device,
            cut,
            name=f"replicas {engine.stage_id}",
        )
        self.is_averaged = False
        if isinstance(optimizer, BF16_Optimizer):
            optimizer.get_grads_for_norm = self._get_grads_for_norm
            optimizer.update_lp_params = self._update_lp_params
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            optimizer.step = self._step_zero

    def average_(self) -> None:
        """Replaces this step's gradients by their mean over replicas; where the optimizer is split, this
        replica's part of them."""
        gradients = {number: self._find(number) for number in range(len(self.weights))}
        self.averaging.average_(gradients)
        if not self.engine.gradient_average:
            for gradient in gradients.values():
                gradient.mul_(self.averaging.exchange.num_replicas)
        if isinstance(self.engine.optimizer, BF16_Optimizer):
            self._clear_others(gradients)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Around DeepSpeed's own reduction of gradients that are averaged: inside, it sends nothing."""
        self.is_averaged = True
        optimizer = self.engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            optimizer.average_tensor = optimizer._add_full_reduction_to_compact_grad_partition
            try:
                yield
            finally:
                del optimizer.average_tensor
        else:
            yield

    def _find(self, number: int) -> torch.Tensor:
        """Where the gradient of a weight is accumulated; zeros where no backward pass has come to it."""
        optimizer, weight = self.engine.optimizer, self.weights[number]
        if isinstance(optimizer, BF16_Optimizer):
            group, place = self._positions[number]
            return optimizer.fp32_groups_gradients[group][place].view(weight.shape)
        is_zero = isinstance(optimizer, DeepSpeedZeroOptimizer)
        if is_zero and optimizer.use_grad_accum_attribute:
            if weight.grad_accum is None:
                weight.grad_accum = torch.zeros_like(weight, dtype=optimizer.gradient_accumulation_dtype)
            return weight.grad_accum
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad.data

    def _parts(self, is_mine: bool) -> Iterator[tuple[int, int, int]]:
        """Of a split optimizer, (number, start, stop) of all that this replica has, or that others have."""
        exchange = self.averaging.exchange
        for number in range(len(self.weights)):
            for owner, start, stop in exchange.cut(number):
                if (owner == exchange.collective.place) == is_mine:
                    yield number, start, stop

    # BF16_Optimizer

    def _find_begin(self, number: int) -> int:
        """Of a parameter, in the flat values of its group."""
        group, place = self._positions[number]
        return sum(weight.numel() for weight in self.engine.optimizer.bf16_groups[group][:place])

    def _cut_flat(self, number: int) -> list[tuple[int, int, int]]:
        """Of the flat gradients of a group of parameters each replica has an equal part."""
        group, _ = self._positions[number]
        begin = self._find_begin(number)
        partitions = self.engine.optimizer.bf16_partitioned_groups[group]
        size, numel = partitions[0].numel(), self.weights[number].numel()
        bounds = [min(max(owner * size - begin, 0), numel) for owner in range(len(partitions) + 1)]
        return [(owner, start, stop) for owner, (start, stop) in enumerate(pairwise(bounds))]

    def _clear_others(self, gradients: Mapping[int, torch.Tensor]) -> None:
        """Zeros where other replicas have the mean."""
        for number, start, stop in self._parts(is_mine=False):
            gradients[number].view(-1)[start:stop].zero_()

    def _get_grads_for_norm(self, for_clipping: bool = False) -> Any:
        """As `BF16_Optimizer.get_grads_for_norm`, which counts on every replica having all of the mean: here
        one value with the norm of all, of which each replica has its part."""
        found = BF16_Optimizer.get_grads_for_norm(self.engine.optimizer, for_clipping)
        if for_clipping or not self.is_averaged:
            return found
        gradients, of_experts = found
        squares = [gradient.float().square().sum() for gradient in gradients]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self.engine.device)
        total = self.averaging.exchange.collective.sum(total.view(1)).wait()
        return [total.sqrt()], of_experts

    def _update_lp_params(self) -> None:
        """As `BF16_Optimizer.update_lp_params`, which gathers all replicas' parts of the weights."""
        if self.is_averaged and self.averaging.weights is not None:
            self.averaging.share_weights_(self.weights, self._find_bf16_master)
        else:
            with self.averaging.timing():
                BF16_Optimizer.update_lp_params(self.engine.optimizer)

    def _find_bf16_master(self, piece: Piece) -> torch.Tensor:
        group, _ = self._positions[piece.number]
        master = self.engine.optimizer.fp32_groups_flat_partition[group]
        mine = self.averaging.exchange.collective.place * master.numel()
        begin = self._find_begin(piece.number) + piece.start - mine
        return master.detach()[begin : begin + piece.numel]

    # ZeRO stage 1

    def _step_zero(self, closure: Any = None) -> None:
        """As `DeepSpeedZeroOptimizer.step`, which calls a function of its module to gather the weights."""
        optimizer, gather = self.engine.optimizer, stage_1_and_2.all_gather_dp_groups
        compresses = self.is_averaged and self.averaging.weights is not None
        parts = [
            self.weights[number].detach().view(-1)[start:stop]
            for number, start, stop in (self._parts(is_mine=True) if compresses else ())
        ]
        before = [part.clone() for part in parts]

        def share(*args: Any, **kwargs: Any) -> None:
            if not compresses:
                with self.averaging.timing():
                    return gather(*args, **kwargs)
            for part, values in zip(parts, before, strict=True):  # the step has put the master copy there
                part.copy_(values)
            self.averaging.share_weights_(self.weights, self._find_zero_master)

        stage_1_and_2.all_gather_dp_groups = share
        try:
            DeepSpeedZeroOptimizer.step(optimizer, closure)
        finally:
            stage_1_and_2.all_gather_dp_groups = gather

    def _find_zero_master(self, piece: Piece) -> torch.Tensor:
        optimizer = self.engine.optimizer
        weight_id = optimizer.get_param_id(self.weights[piece.number])
        group, _ = self._positions[piece.number]
        mine = self.averaging.exchange.collective.place
        start = int(optimizer.grad_start_offset[group][mine][weight_id])
        begin = int(optimizer.grad_partition_insertion_offset[group][mine][weight_id]) + piece.start - start
        return optimizer.single_partition_of_fp32_groups[group].detach()[begin : begin + piece.numel]

    def _cut_zero(self, number: int) -> list[tuple[int, int, int]]:
        """As `DeepSpeedZeroOptimizer.average_tensor` finds the replicas that a gradient goes to."""
        optimizer, weight = self.engine.optimizer, self.weights[number]
        group, _ = self._positions[number]
        weight_id = optimizer.get_param_id(weight)
        owners = optimizer.param_to_partition_ids[group][weight_id]
        starts = sorted(
            (int(optimizer.grad_start_offset[group][owner][weight_id]), owner) for owner in owners
        )
        stops = [start for start, _ in starts[1:]] + [weight.numel()]
        return [(owner, start, stop) for (start, owner), stop in zip(starts, stops, strict=True)]

    def end_step(self) -> None:
        """After the optimizer's step, which skips one whose gradients are not finite."""
        self.is_averaged = False
        self.averaging.end_step(accepted=not getattr(self.engine.optimizer, "overflow", False))


def _find_positions(optimizer: Any) -> dict[int, tuple[int, int]] | None:
    """By the id of each weight that an optimizer splits over replicas (it reduces gradients of no other): its
    group, and its place there. None: it splits none, and gradients of all weights are reduced."""
    if isinstance(optimizer, BF16_Optimizer):
        groups = optimizer.bf16_groups
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        groups = optimizer.bit16_groups
    else:
        return None
    return {
        id(weight): (group, place)
        for group, members in enumerate(groups)
        for place, weight in enumerate(members)
    }


def _refuse(engine: Any) -> None:
    """Raises ValueError for what gradients are exchanged in other ways."""
    optimizer = engine.optimizer
    is_zero = isinstance(optimizer, DeepSpeedZeroOptimizer)
    refused = {
        "mixture-of-experts layers": engine.has_moe_layers,
        "Embedding(sparse=True)": any(getattr(each, "sparse", False) for each in engine.module.modules()),
        "zero_optimization.contiguous_gradients = false": is_zero and not optimizer.contiguous_gradients,
        "zero_optimization.offload_optimizer": is_zero and optimizer.cpu_offload,
        "zero_optimization.overlap_comm = true": is_zero and optimizer.overlap_comm,
        "zero_optimization.zenflow": bool(engine.zenflow),
        "Muon": any(getattr(weight, "use_muon", False) for weight in engine.module.parameters()),
        "torch_autocast with a GradScaler": getattr(engine, "torch_autocast_z0_gradscaler", None) is not None,
    }
    for what in (what for what, is_there in refused.items() if is_there):
        raise ValueError(f"{KEY} with {what}; accepted: without, or {KEY} = null")
    if engine.clapping.data_parallel.delay and engine.fp16_enabled():
        raise ValueError(
            f"{KEY}.delay = {engine.clapping.data_parallel.delay} with fp16, whose overflows would show too "
            "late; accepted: 0, or bf16 or fp32"
        )
