"""Messages between ranks."""

import torch

from clapping_ds.transport import Wire, all_agree, gather


def exchange(sizes):
    rank = torch.distributed.get_rank()
    wire = Wire(1 - rank, torch.device("cpu"))
    payloads = [torch.full((size,), index + 1, dtype=torch.uint8) for index, size in enumerate(sizes)]
    if rank == 0:
        for payload in payloads:
            wire.send(payload)
        return True
    return all(torch.equal(wire.receive(len(payload)), payload) for payload in payloads)


def test_messages_arrive_whole_and_in_order(two_ranks):
    assert two_ranks.run(exchange, [1, 0, 100_000, 17]) == [True, True]


def vote():
    rank = torch.distributed.get_rank()
    device = torch.device("cpu")
    return all_agree([True, rank == 0, rank == 1, False], device), gather(("rank", rank))


def test_one_no_is_a_no_and_gather_keeps_the_order(two_ranks):
    for agreed, gathered in two_ranks.run(vote):
        assert agreed == [True, False, False, False]
        assert gathered == [("rank", 0), ("rank", 1)]
