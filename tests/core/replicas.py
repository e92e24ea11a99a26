"""Replicas as threads of one process, on small random gradients."""

from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.model.replicas import Mail, MailCollective
from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.exchange import Exchange
from clapping_ds.gradients.layout import Parameter
from clapping_ds.gradients.node import NodeExchange


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
    return all(
        torch.equal(one[n].view(-1).view(torch.uint8), other[n].view(-1).view(torch.uint8)) for n in one
    )


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
