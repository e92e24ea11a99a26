"""Which replica averages which part of the gradients, and what is coded together.

Every parameter that is compressed is cut into pieces, one per owner: a replica that takes the mean there. The
pieces of one owner are coded as one vector, but where a codec works on matrices: there a piece is whole rows,
and coded by itself.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from clapping_ds.codecs import AnyCodec, LowRank
from clapping_ds.codecs.sequence import list_members

BUCKET_NUMEL = 1 << 23
"""Values that are exchanged together: while one bucket is averaged the next one is on the wire."""


class Parameter(NamedTuple):
    """A parameter whose gradient is exchanged."""

    name: str
    shape: torch.Size
    is_tied: bool = False
    """Whether another stage has it too: its gradient must be the same bits there."""
    has_copy: bool = False
    """Whether another stage has it too and updates it by itself: weights must stay the same bits there."""


class Piece(NamedTuple):
    """Consecutive values of one parameter, flattened."""

    number: int
    """Of the parameter."""
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class Section(NamedTuple):
    """What is coded together."""

    pieces: tuple[Piece, ...]
    shape: torch.Size

    @property
    def sizes(self) -> list[int]:
        return [piece.numel for piece in self.pieces]


class Bucket(NamedTuple):
    """What is exchanged together."""

    raw: tuple[int, ...]
    """Numbers of parameters that travel raw, as one message."""
    tied: tuple[int, ...]
    """Numbers of those that travel raw, each by itself: a message's size decides the order of additions."""
    sections: tuple[tuple[Section, ...], ...]
    """By owner."""


Cut = Callable[[int], Sequence[tuple[int, int, int]]]
"""Of a parameter's number: (owner, start, stop) of each piece."""


Flat = Mapping[int, torch.Tensor] | Sequence[torch.Tensor]
"""By the number of the parameter, its values in one dimension."""


def flatten(tensors: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Of one dimension each: views, but of what has gaps."""
    return {number: tensor.detach().contiguous().view(-1) for number, tensor in tensors.items()}


def put_back(flat: Mapping[int, torch.Tensor], tensors: Mapping[int, torch.Tensor]) -> None:
    """What was written into `flatten`'s copies, into the tensors."""
    for number, tensor in tensors.items():
        if tensor.data_ptr() != flat[number].data_ptr():
            tensor.copy_(flat[number].view_as(tensor))


def read(section: Section, flat: Flat) -> torch.Tensor:
    """The values of all its pieces, a copy of one dimension."""
    return torch.cat([flat[piece.number][piece.start : piece.stop] for piece in section.pieces])


def store(pieces: Sequence[Piece], values: torch.Tensor, flat: Flat) -> None:
    """Writes the values of all pieces, one after the other, to where they belong."""
    for piece, part in zip(pieces, values.split([piece.numel for piece in pieces]), strict=True):
        flat[piece.number][piece.start : piece.stop].copy_(part)


def works_on_matrices(codec: AnyCodec) -> bool:
    return any(isinstance(member, LowRank) for member in list_members(codec))


def cut_rows(parameters: Sequence[Parameter], num_owners: int) -> Cut:
    """Each parameter's rows in equal parts, as near as may be."""

    def cut(number: int) -> list[tuple[int, int, int]]:
        num_rows, width = find_sides(parameters[number])
        bounds = [num_rows * owner // num_owners * width for owner in range(num_owners + 1)]
        return [(owner, start, stop) for owner, (start, stop) in enumerate(pairwise(bounds))]

    return cut


def make_buckets(
    parameters: Sequence[Parameter],
    numbers: Sequence[int],
    num_owners: int,
    cut: Cut,
    min_numel: int,
    has_matrices: bool,
    joins: bool = True,
) -> list[Bucket]:
    """How the parameters of these numbers are exchanged. Every bucket has as much of each owner, or one
    replica would be sent to while all others wait. What travels raw is in the first.

    min_numel      parameters with fewer values, or of one dimension, travel raw
    has_matrices   whether pieces are coded as matrices
    joins          whether all pieces of an owner are coded as one vector; else each by itself, so that the
                   bits do not depend on what else is in a bucket
    """
    tied = [number for number in numbers if parameters[number].is_tied]
    coded = [number for number in numbers if _is_compressed(parameters[number], min_numel)]
    raw = [number for number in numbers if number not in {*tied, *coded}]
    pieces: list[list[Piece]] = [[] for _ in range(num_owners)]
    for number in coded:
        for owner, start, stop in cut(number):
            if start < stop:
                pieces[owner].append(Piece(number, start, stop))
    num_buckets = max(1, -(-sum(piece.numel for of in pieces for piece in of) // BUCKET_NUMEL))
    parts = [_split(of_owner, num_buckets, joins and not has_matrices) for of_owner in pieces]
    buckets = []
    for place in range(num_buckets):
        mine = [of_owner[place] for of_owner in parts]
        if has_matrices:
            sections = [[_as_matrix(parameters, piece) for piece in of_owner] for of_owner in mine]
        elif joins:
            sections = [[_as_vector(of_owner)] if of_owner else [] for of_owner in mine]
        else:
            sections = [[_as_vector([piece]) for piece in of_owner] for of_owner in mine]
        buckets.append(Bucket((), (), tuple(map(tuple, sections))))
    return [buckets[0]._replace(raw=tuple(raw), tied=tuple(tied)), *buckets[1:]]


def _split(pieces: Sequence[Piece], num_parts: int, cuts: bool) -> list[list[Piece]]:
    """In so many parts, of about equal size. cuts: whether pieces may be cut for it."""
    total = sum(piece.numel for piece in pieces)
    bounds = [total * (part + 1) // num_parts for part in range(num_parts)]
    parts: list[list[Piece]] = [[] for _ in range(num_parts)]
    begin = 0
    for piece in pieces:
        end = begin + piece.numel
        if cuts:
            inside = [bound for bound in bounds if begin < bound < end]
            for start, stop in pairwise([begin, *inside, end]):
                part = bisect_right(bounds, start)
                parts[part].append(
                    Piece(piece.number, piece.start + start - begin, piece.start + stop - begin)
                )
        else:
            parts[bisect_right(bounds, begin)].append(piece)
        begin = end
    return parts


def _is_compressed(parameter: Parameter, min_numel: int) -> bool:
    has_rows = len(parameter.shape) > 1
    return has_rows and not parameter.is_tied and parameter.shape.numel() >= max(1, min_numel)


def find_sides(parameter: Parameter) -> tuple[int, int]:
    """Rows, and values of each."""
    num_rows = parameter.shape[0] if parameter.shape else 1
    return num_rows, parameter.shape.numel() // max(1, num_rows)


def _as_matrix(parameters: Sequence[Parameter], piece: Piece) -> Section:
    _, width = find_sides(parameters[piece.number])
    return Section((piece,), torch.Size((piece.numel // width, width)))


def _as_vector(pieces: Sequence[Piece]) -> Section:
    return Section(tuple(pieces), torch.Size((sum(piece.numel for piece in pieces),)))
