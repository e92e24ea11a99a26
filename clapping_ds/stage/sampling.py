"""Lazy sampling: the coin that says which slots get a new sample, and the batches that are kept.

The coin is a pure function of (seed, step, slot), so that all ranks, and a resumed run, agree on it
without a message. Source: Clapping, arXiv 2509.19029, Algorithm 1, where one coin is tossed per step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves, tree_map

from clapping_ds.link.seeds import draw_word


def draw_uniform(seed: int, step: int, slot: int) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    return (draw_word(seed, step, slot) >> 11) / (1 << 53)


@dataclass(frozen=True)
class Coin:
    """Which slots of a step are fresh. Step 0 is all fresh.

    refresh   "step": one coin for the whole step; "slot": one per slot; "cycle": in turn, so that
              p_new * num_slots of the slots are fresh in every step (rounded so that the mean is exact),
              spread over the step, so that large and small messages alternate on the link
    """

    p_new: float
    refresh: Literal["step", "slot", "cycle"]
    seed: int

    def toss(self, step: int, num_slots: int) -> list[bool]:
        """For each slot 0 .. num_slots - 1, whether its sample is new in this step."""
        if step == 0:
            return [True] * num_slots
        if self.refresh == "step":
            return [draw_uniform(self.seed, step, 0) < self.p_new] * num_slots
        if self.refresh == "slot":
            return [draw_uniform(self.seed, step, slot) < self.p_new for slot in range(num_slots)]
        per_step = Fraction(repr(self.p_new)) * num_slots
        turns = range(floor((step - 1) * per_step), floor(step * per_step))
        stride = round(min(1 / self.p_new, num_slots))
        order = [slot for first in range(stride) for slot in range(first, num_slots, stride)]
        chosen = {order[turn % num_slots] for turn in turns}
        return [slot in chosen for slot in range(num_slots)]


class LazySampler:
    """Keeps one batch per slot, and draws a new one only where the slot is fresh.

    It wraps a function that returns the next batch; what the batches are made of does not matter.
    Tensors are cloned when they are kept, so that a loader may reuse its buffers.
    """

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._drawn: list[Any] = []
        self._next_slot = 0

    def draw(self, num_fresh: int, next_batch: Callable[[], Any]) -> None:
        """Gets the new batches of a step, which `begin` puts in place.

        Raises StopIteration when `next_batch` does. What was drawn up to then is not lost: the next
        fresh slots get it, in order, whichever they are.
        """
        while len(self._drawn) < num_fresh:
            self._drawn.append(_clone(next_batch()))

    def begin(self, fresh: Sequence[bool]) -> None:
        """Starts a step with what was drawn for it. Held slots from `len(fresh)` on are freed."""
        drawn, kept = iter(self._drawn), [*self._held, *[None] * len(fresh)]
        self._held = [next(drawn) if is_fresh else kept[slot] for slot, is_fresh in enumerate(fresh)]
        self._drawn = list(drawn)
        self._next_slot = 0

    def drop_drawn(self) -> None:
        """Forgets what was drawn for a step that will not begin."""
        self._drawn = []

    def next(self) -> Any:
        """The batch of the next slot of the step, safe to be changed by the caller."""
        batch = _clone(self._held[self._next_slot])
        self._next_slot += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The held batches, between two steps, and on what kind of device each of their tensors is."""
        devices = [leaf.device.type for leaf in tree_leaves(self._held) if torch.is_tensor(leaf)]
        return {"held": self._held, "devices": devices}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Takes what `state_dict` gave. device: this rank's, for what was not on the CPU."""
        kinds = iter(state["devices"])

        def put_back(leaf: Any) -> Any:
            is_elsewhere = torch.is_tensor(leaf) and next(kinds) != "cpu"
            return leaf.to(device) if is_elsewhere else leaf

        self._held, self._drawn = tree_map(put_back, state["held"]), []

    def list_shapes(self) -> set[tuple[Any, ...]]:
        """The distinct (shape, dtype) lists of the batches held and drawn; one where all are alike."""
        return {_list_shapes(batch) for batch in (*self._held, *self._drawn)}


def _clone(batch: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, batch)


def _list_shapes(batch: Any) -> tuple[Any, ...]:
    return tuple((leaf.shape, leaf.dtype) for leaf in tree_leaves(batch) if torch.is_tensor(leaf))
