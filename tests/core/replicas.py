"""Replicas in one process: what they send each other is posted by all of them before any of them waits."""

import torch

from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.exchange import Exchange
from clapping_ds.gradients.layout import Parameter

CPU = torch.device("cpu")


class Mail:
    """What was posted, by the number of the call and the place."""

    def __init__(self):
        self.posted = {}


class Arrival:
    def __init__(self, take):
        self.wait = take


class LockstepCollective:
    """Stands in for `Collective` of `size` replicas that post in the same order."""

    def __init__(self, mail, place, size):
        self.mail, self.place, self.size = mail, place, size
        self.device, self.carrier = CPU, CPU
        self.ranks = list(range(size))
        self.num_calls = 0

    def _post(self, item, take):
        number, self.num_calls = self.num_calls, self.num_calls + 1
        self.mail.posted[number, self.place] = item
        return Arrival(lambda: take([self.mail.posted[number, place] for place in self.ranks]))

    def scatter(self, payload, sizes):
        parts = payload.clone().split(list(sizes))
        return self._post(parts, lambda all_parts: torch.stack([of[self.place] for of in all_parts]))

    def gather(self, payload, sizes):
        return self._post(payload.clone(), lambda payloads: payloads)

    def sum(self, values):
        return self._post(values.clone(), lambda all_values: sum(all_values[1:], all_values[0]))


class Replicas:
    """Exchanges of all replicas, which run step by step."""

    def __init__(self, size, plan=None, shapes=((24, 64), (16, 4, 64), (7,)), tied=(), **options):
        self.mail = Mail()
        parameters = [
            Parameter(f"weight {number}", torch.Size(shape), number in tied)
            for number, shape in enumerate(shapes)
        ]
        self.parameters = parameters
        self.plan = DataParallelConfig.model_validate({"min_numel": 512, **(plan or {})})
        self.exchanges = [
            Exchange(self.plan, parameters, LockstepCollective(self.mail, place, size), **options)
            for place in range(size)
        ]

    def draw(self, step, dtype=torch.float32):
        """Gradients of each replica."""
        found = []
        for place in range(len(self.exchanges)):
            generator = torch.Generator().manual_seed(1000 * step + place)
            found.append({
                number: torch.randn(each.shape, generator=generator).to(dtype)
                for number, each in enumerate(self.parameters)
            })  # fmt: skip
        return found

    def average(self, step, gradients, accepted=True, measures_error=False):
        """Each replica's means, in copies."""
        gradients = [{n: g.clone() for n, g in of.items()} for of in gradients]
        rounds = []
        for exchange, mine in zip(self.exchanges, gradients, strict=True):
            exchange.begin_step(step, measures_error)
            rounds.append(exchange.start(mine))
        for each in rounds:
            each.advance()
        for each in rounds:
            each.finish()
        for exchange in self.exchanges:
            exchange.end_step(accepted)
        return gradients


def mean_of(gradients):
    return {n: sum(of[n].float() for of in gradients) / len(gradients) for n in gradients[0]}


def same_bits(one, other):
    return all(torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8)) for n in one)
