"""Data-parallel replicas in one process: a thread for each, which exchange gradients as real ones do."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import Any

import torch

from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.exchange import Exchange
from clapping_ds.gradients.layout import Parameter

CPU = torch.device("cpu")
TIMEOUT_S = 60


class Mail:
    """What was posted, by the number of the call and the place."""

    def __init__(self) -> None:
        self.posted: dict[tuple[int, int], Any] = {}
        self.changed = Condition()

    def post(self, number: int, place: int, item: Any) -> None:
        with self.changed:
            self.posted[number, place] = item
            self.changed.notify_all()

    def read(self, number: int, places: Sequence[int]) -> list[Any]:
        """What all have posted, once they have."""
        keys = [(number, place) for place in places]
        with self.changed:
            if not self.changed.wait_for(lambda: all(key in self.posted for key in keys), TIMEOUT_S):
                raise ConnectionError(f"a replica posted nothing within {TIMEOUT_S} s")
            return [self.posted[key] for key in keys]

    def clear(self) -> None:
        self.posted.clear()


class Arrival:
    """Stands in for a `Transfer`."""

    def __init__(self, take: Callable[[], Any]) -> None:
        self.wait = take


class MailCollective:
    """Stands in for the `Collective` of `size` replicas that post in the same order."""

    def __init__(self, mail: Mail, place: int, size: int) -> None:
        self.mail, self.place, self.size = mail, place, size
        self.device, self.carrier = CPU, CPU
        self.ranks = list(range(size))
        self.num_calls = 0

    def _post(self, item: Any, take: Callable[[list[Any]], Any]) -> Arrival:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        self.mail.post(number, self.place, item)
        return Arrival(lambda: take(self.mail.read(number, self.ranks)))

    def scatter(self, payload: torch.Tensor, sizes: Sequence[int]) -> Arrival:
        parts = payload.clone().split(list(sizes))
        return self._post(parts, lambda all_parts: [of[self.place] for of in all_parts])

    def gather(self, payload: torch.Tensor, sizes: Sequence[int]) -> Arrival:
        return self._post(payload.clone(), lambda payloads: payloads)

    def sum(self, values: torch.Tensor) -> Arrival:
        return self._post(values.clone(), lambda all_values: sum(all_values[1:], all_values[0]))


class Replicas:
    """Exchanges of `size` replicas of the same parameters."""

    def __init__(
        self, plan: DataParallelConfig, parameters: Sequence[Parameter], size: int, **options: Any
    ) -> None:
        self.mail = Mail()
        collectives: list[Any] = [MailCollective(self.mail, place, size) for place in range(size)]
        self.exchanges = [Exchange(plan, parameters, each, **options) for each in collectives]
        self.step = 0

    def average_(self, gradients: Sequence[dict[int, torch.Tensor]], accepted: bool = True) -> None:
        """One step: replaces the gradients of each replica, by number of the parameter, by the mean."""

        def run(exchange: Exchange, mine: dict[int, torch.Tensor]) -> None:
            exchange.begin_step(self.step)
            exchange.start(mine).finish()
            exchange.end_step(accepted)

        with ThreadPoolExecutor(len(self.exchanges)) as threads:
            list(threads.map(run, self.exchanges, gradients))
        self.mail.clear()
        self.step += 1

    @property
    def payload_bytes(self) -> int:
        """Of the first replica."""
        return sum(leg.traffic.payload_bytes for leg in self.exchanges[0].legs.values())

    @property
    def memory_nbytes(self) -> int:
        """That the first replica holds."""
        return sum(leg.memory_nbytes for leg in self.exchanges[0].legs.values())
