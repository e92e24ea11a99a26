"""Replicas as threads of one process."""

from concurrent.futures import ThreadPoolExecutor
from threading import Condition

import torch

from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.exchange import Exchange
from clapping_ds.gradients.layout import Parameter
from clapping_ds.gradients.node import NodeExchange

CPU = torch.device("cpu")


TIMEOUT_S = 20


class Mail:
    """What was posted, by the number of the call and the place."""

    def __init__(self):
        self.posted = {}
        self.changed = Condition()

    def post(self, number, place, item):
        with self.changed:
            self.posted[number, place] = item
            self.changed.notify_all()

    def read(self, number, places):
        """What all have posted, once they have."""
        keys = [(number, place) for place in places]
        with self.changed:
            assert self.changed.wait_for(lambda: all(key in self.posted for key in keys), TIMEOUT_S)
            return [self.posted[key] for key in keys]


class Arrival:
    def __init__(self, take):
        self.wait = take


class MailCollective:
    """Stands in for `Collective` of `size` replicas that post in the same order."""

    def __init__(self, mail, place, size):
        self.mail, self.place, self.size = mail, place, size
        self.device, self.carrier = CPU, CPU
        self.ranks = list(range(size))
        self.num_calls = 0

    def _post(self, item, take):
        number, self.num_calls = self.num_calls, self.num_calls + 1
        self.mail.post(number, self.place, item)
        return Arrival(lambda: take(self.mail.read(number, self.ranks)))

    def scatter(self, payload, sizes):
        parts = payload.clone().split(list(sizes))
        return self._post(parts, lambda all_parts: torch.stack([of[self.place] for of in all_parts]))

    def gather(self, payload, sizes):
        return self._post(payload.clone(), lambda payloads: payloads)

    def sum(self, values):
        return self._post(values.clone(), lambda all_values: sum(all_values[1:], all_values[0]))


class Replicas:
    """Exchanges of all replicas."""

    def __init__(self, size, plan=None, shapes=((24, 64), (16, 4, 64), (7,)), tied=(), **options):
        self.mail = Mail()
        parameters = [
            Parameter(f"weight {number}", torch.Size(shape), number in tied)
            for number, shape in enumerate(shapes)
        ]
        self.parameters = parameters
        self.plan = DataParallelConfig.model_validate({"min_numel": 512, **(plan or {})})
        self.exchanges = [
            Exchange(self.plan, parameters, MailCollective(self.mail, place, size), **options)
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

        def run(exchange, mine):
            exchange.begin_step(step, measures_error)
            exchange.start(mine).finish()
            exchange.end_step(accepted)

        with ThreadPoolExecutor(len(self.exchanges)) as threads:
            list(threads.map(run, self.exchanges, gradients))
        return gradients


def mean_of(gradients):
    return {n: sum(of[n].float() for of in gradients) / len(gradients) for n in gradients[0]}


def same_bits(one, other):
    return all(torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8)) for n in one)


class NodeReplicas(Replicas):
    """`num_nodes` nodes of `node_size` replicas each."""

    def __init__(self, num_nodes, node_size, plan=None, shapes=((24, 64), (16, 4, 64), (7,)), tied=()):
        super().__init__(2, plan, shapes, tied)
        nodes, crossings = [Mail() for _ in range(num_nodes)], [Mail() for _ in range(node_size)]
        self.exchanges = [
            NodeExchange(
                self.plan,
                self.parameters,
                MailCollective(nodes[node], place, node_size),
                MailCollective(crossings[place], node, num_nodes),
            )
            for node in range(num_nodes)
            for place in range(node_size)
        ]
