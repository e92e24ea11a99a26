"""Several replicas on one node: raw between them, compressed between nodes.

The replicas of a node take the mean of their gradients, each of its own share; each then exchanges its
share with the replica of the same place on every other node; and the node's replicas tell each other the
results. So every value crosses between nodes once, and from one replica of each node.
"""

from collections.abc import Mapping, Sequence

import torch

from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.exchange import Exchange, Round
from clapping_ds.gradients.layout import Parameter, Piece, cut_rows, find_sides, flatten, put_back, store
from clapping_ds.link.collective import Collective


class NodeExchange(Exchange):
    """An exchange with the other nodes, of this replica's share. node: the replicas on this one."""

    def __init__(
        self,
        plan: DataParallelConfig,
        parameters: Sequence[Parameter],
        node: Collective,
        others: Collective,
        seed: int = 0,
        joins: bool = True,
        verifies: bool = False,
        compiles: bool = False,
    ) -> None:
        self.node = node
        cut = cut_rows(parameters, node.size)
        self.shares: list[list[Piece]] = [[] for _ in range(node.size)]
        """By place on the node: a piece of every parameter."""
        for number in range(len(parameters)):
            for owner, start, stop in cut(number):
                self.shares[owner].append(Piece(number, start, stop))
        mine = [_as_parameter(parameters[piece.number], piece) for piece in self.shares[node.place]]
        plan = plan.model_copy(update={"min_numel": plan.min_numel // node.size})
        super().__init__(plan, mine, others, seed, None, joins, verifies, compiles)
        self.num_replicas = node.size * others.size

    def start(self, gradients: Mapping[int, torch.Tensor]) -> "NodeRound":
        return NodeRound(self, gradients)

    def sizes(self, numbers: Sequence[int]) -> list[int]:
        """By place on the node, the values of its share of these parameters."""
        return [sum(share[number].numel for number in numbers) for share in self.shares]


class NodeRound(Round):
    """One exchange on its way."""

    def __init__(self, exchange: NodeExchange, gradients: Mapping[int, torch.Tensor]) -> None:
        self.node, self.shares = exchange.node, exchange.shares
        self.nbytes = [4 * size for size in exchange.sizes(list(gradients))]
        self.whole = gradients
        self.share = self._average_on_node()
        pieces = [self.shares[self.node.place][number] for number in gradients]
        parts = self.share.split([piece.numel for piece in pieces])
        shapes = [exchange.parameters[number].shape for number in gradients]
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        super().__init__(exchange, dict(zip(gradients, views, strict=True)))

    def finish(self) -> None:
        super().finish()
        told = self.node.gather(self.share.view(torch.uint8), self.nbytes)
        flat = flatten(self.whole)
        for share, received in zip(self.shares, told.wait(), strict=True):
            store([share[number] for number in self.whole], received.view(torch.float32), flat)
        put_back(flat, self.whole)

    def _average_on_node(self) -> torch.Tensor:
        """fp32, flat: the mean of this replica's share over its node."""
        flat = flatten(self.whole)
        values = torch.cat([
            flat[piece.number][piece.start : piece.stop].float()
            for share in self.shares
            for piece in (share[number] for number in self.whole)
        ])  # fmt: skip
        received = self.node.scatter(values.view(torch.uint8), self.nbytes).wait()
        total = torch.zeros(self.nbytes[self.node.place] // 4, device=self.node.device)
        for sent in received:
            total += sent.view(torch.float32)
        return total / self.node.size


def _as_parameter(parameter: Parameter, piece: Piece) -> Parameter:
    _, width = find_sides(parameter)
    is_matrix = len(parameter.shape) > 1
    shape = (piece.numel // max(1, width), width) if is_matrix else (piece.numel,)
    return Parameter(f"{parameter.name}[{piece.start}:{piece.stop}]", torch.Size(shape), parameter.is_tied)
