"""Lazy sampling: the coin that says which slots get a new sample, and the batches that are kept.

The coin is a pure function of (seed, step, slot), so that all ranks, and a resumed run, agree on it
without a message. Source: Clapping, arXiv 2509.19029, Algorithm 1, where one coin is tossed per step and one
mini-batch is held. Here a pool of them is.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import floor
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves, tree_map

from clapping_ds.link.seeds import draw_word


def draw_uniform(seed: int, step: int, slot: int) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    return (draw_word(seed, step, slot) >> 11) / (1 << 53)


@lru_cache(maxsize=2)
def draw_order(seed: int, round_number: int, pool: int) -> list[int]:
    """The numbers below `pool`, in an order that depends on nothing but the arguments."""
    return sorted(range(pool), key=lambda entry: draw_word(seed, round_number, entry, pool))


@dataclass(frozen=True)
class Coin:
    """Which of the pool's entries a step uses, and which of its slots are fresh. Steps come in rounds: each
    uses every entry once, and the first is all fresh.

    refresh   "step": one coin for the whole step; "slot": one per slot; "cycle": in turn, so that
              p_new * num_slots of the slots are fresh in every step (rounded so that the mean of a round is
              exact), spread over the step, so that large and small messages alternate on the link
    """

    p_new: float
    refresh: Literal["step", "slot", "cycle"]
    seed: int
    pool: int = 1

    def pick(self, step: int) -> int:
        """The entry that a step uses."""
        round_number, place = divmod(step, self.pool)
        return draw_order(self.seed, round_number, self.pool)[place]

    def toss(self, step: int, num_slots: int) -> list[bool]:
        """For each slot 0 .. num_slots - 1, whether its sample is new in this step."""
        round_number = step // self.pool
        if round_number == 0:
            return [True] * num_slots
        if self.refresh == "step":
            return [draw_uniform(self.seed, step, 0) < self.p_new] * num_slots
        if self.refresh == "slot":
            return [draw_uniform(self.seed, step, slot) < self.p_new for slot in range(num_slots)]
        per_step, phase = Fraction(repr(self.p_new)) * num_slots, Fraction(self.pick(step), self.pool)
        # Of all entries of a round as many as of its steps together: sum of floor(x + e / P) = floor(P x).
        turns = range(floor((round_number - 1) * per_step + phase), floor(round_number * per_step + phase))
        stride = round(min(1 / max(self.p_new, 1e-9), num_slots))
        order = [slot for first in range(stride) for slot in range(first, num_slots, stride)]
        chosen = {order[turn % num_slots] for turn in turns}
        return [slot in chosen for slot in range(num_slots)]


class LazySampler:
    """Keeps one batch per slot of each entry of a pool, and draws a new one only where the slot is fresh.

    It wraps a function that returns the next batch; what the batches are made of does not matter.
    Tensors are cloned when they are kept, so that a loader may reuse its buffers.
    """

    def __init__(self) -> None:
        self._pool: dict[int, list[Any]] = {}
        self._entry = 0
        """Of the step."""
        self._shapes: Counter[tuple[Any, ...]] = Counter()
        """Of all that is held."""
        self._drawn: list[Any] = []
        self._next_slot = 0

    def draw(self, num_fresh: int, next_batch: Callable[[], Any]) -> None:
        """Gets the new batches of a step, which `begin` puts in place.

        Raises StopIteration when `next_batch` does. What was drawn up to then is not lost: the next
        fresh slots get it, in order, whichever they are.
        """
        while len(self._drawn) < num_fresh:
            self._drawn.append(_clone(next_batch()))

    def begin(self, fresh: Sequence[bool], entry: int = 0) -> None:
        """Starts a step with what was drawn for it. The entry's slots from `len(fresh)` on are freed."""
        drawn, known = iter(self._drawn), self._pool.get(entry, [])
        kept = [*known, *[None] * len(fresh)]
        self._pool[entry] = [next(drawn) if is_fresh else kept[slot] for slot, is_fresh in enumerate(fresh)]
        self._shapes.subtract(map(_list_shapes, known))
        self._shapes.update(map(_list_shapes, self._pool[entry]))
        self._entry = entry
        self._drawn = list(drawn)
        self._next_slot = 0

    @property
    def num_waiting(self) -> int:
        """Batches that were drawn for the step to come."""
        return len(self._drawn)

    @property
    def num_used(self) -> int:
        """Batches that the step has taken so far."""
        return self._next_slot

    def drop_drawn(self, num_kept: int = 0) -> None:
        """Forgets what was drawn for a step that will not begin. num_kept: but for so many, the first."""
        del self._drawn[num_kept:]

    def forget_held(self) -> None:
        """Forgets all but what was drawn for the step to come."""
        self._pool, self._shapes = {}, Counter()

    def next(self) -> Any:
        """The batch of the next slot of the step, safe to be changed by the caller."""
        batch = _clone(self._pool[self._entry][self._next_slot])
        self._next_slot += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The held batches, between two steps, and on what kind of device each of their tensors is."""
        devices = [leaf.device.type for leaf in tree_leaves(self._pool) if torch.is_tensor(leaf)]
        return {"pool": self._pool, "devices": devices}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Takes copies of what `state_dict` gave. device: this rank's, for what was not on the CPU."""
        kinds = iter(state["devices"])

        def put_back(leaf: Any) -> Any:
            if not torch.is_tensor(leaf):
                return deepcopy(leaf)
            return leaf.to("cpu" if next(kinds) == "cpu" else device, copy=True)

        self._pool, self._drawn = tree_map(put_back, state["pool"]), []
        self._shapes = Counter(_list_shapes(batch) for held in self._pool.values() for batch in held)

    def list_shapes(self) -> set[tuple[Any, ...]]:
        """The distinct (shape, dtype) lists of the batches held and drawn; one where all are alike."""
        held = {shapes for shapes, number in self._shapes.items() if number > 0}
        return held.union(map(_list_shapes, self._drawn))


def to_iterator(batches: Iterator[Any] | Sequence[Any] | None) -> Iterator[Any] | None:
    """What a host is given as data: an iterator, or a step's batches."""
    return iter(batches) if isinstance(batches, Sequence) else batches


def _clone(batch: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, batch)


def _list_shapes(batch: Any) -> tuple[Any, ...]:
    return tuple((leaf.shape, leaf.dtype) for leaf in tree_leaves(batch) if torch.is_tensor(leaf))
