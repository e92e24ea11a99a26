"""Messages between ranks."""

import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from clapping_ds.link.groups import (
    Control,
    _share_no_rank,
    get_group_ranks,
    make_direction_groups,
    make_peers,
)
from clapping_ds.link.wire import Buffers, Wire
from clapping_ds.stage.handshake import agree_on_config
from tests.cluster import assert_same_error

CPU = torch.device("cpu")


def exchange(sizes, num_ahead, carrier="cpu"):
    """Rank 0 sends, rank 1 announces `num_ahead` messages and compares."""
    wire = Wire(1 - dist.get_rank(), CPU, most_pending=num_ahead)
    if carrier != "cpu":
        wire.carried = Buffers(wire.side, CPU)
    messages = [torch.full((size,), index + 1, dtype=torch.uint8) for index, size in enumerate(sizes)]
    if dist.get_rank() == 0:
        for message in messages:
            wire.send(wire.new_payload(len(message)).copy_(message))
        wire.drain()
        return True, wire.most_payloads
    equal, announced = True, 0
    for index, message in enumerate(messages):
        while announced < min(index + num_ahead, len(messages)):
            wire.expect(sizes[announced])
            announced += 1
        payload = wire.receive()
        equal &= torch.equal(payload, message)
        wire.done_with(payload)
    return equal, wire.most_payloads


@pytest.mark.parametrize("num_ahead", [1, 2, 5])
@pytest.mark.parametrize("carrier", ["cpu", "another device"])
def test_messages_arrive_whole_and_in_order_in_few_buffers(two_ranks, num_ahead, carrier):
    sizes = [1, 0, 100_000, 17, 0, 3, 50_000, 50_001, 1, 1]
    (sent, sent_in), (arrived, arrived_in) = two_ranks.run(exchange, sizes, num_ahead, carrier)
    assert sent
    assert arrived
    assert sent_in <= num_ahead + 1
    assert arrived_in <= num_ahead + 1


def send_without_a_receiver():
    """A send returns before the peer knows of it; both directions at once."""
    groups = make_direction_groups([(0, 1)], CPU, timeout_s=60)
    outgoing, incoming = (Wire(1 - dist.get_rank(), CPU, groups[i ^ dist.get_rank()]) for i in range(2))
    outgoing.send(outgoing.new_payload(1 << 20).fill_(dist.get_rank()))
    incoming.expect(1 << 20)
    value = int(incoming.receive()[-1])
    outgoing.drain()
    return value


def test_sends_do_not_wait_for_the_peer(two_ranks):
    assert two_ranks.run(send_without_a_receiver) == [1, 0]


def peers_of_links():
    """By stage and neighbour: the peer's rank; and, for each of the peers' groups, its ranks. Of two
    pipelines, in which the second of three stages has a rank of its own."""
    peers = make_peers([[0, 2], [1, 3]], [0, 1, 0], CPU, timeout_s=60)
    groups = {id(group): group for peer in peers.values() for group in peer[1:]}
    ranks = {between: peer.rank for between, peer in peers.items()}
    return ranks, sorted(get_group_ranks(group) for group in groups.values())


def test_no_two_directions_or_links_of_a_rank_share_a_group(four_ranks):
    for rank, (peers, groups) in enumerate(four_ranks.run(peers_of_links)):
        first = rank % 2
        assert groups == [[first, first + 2]] * 4
        assert peers == {(0, 1): first + 2, (1, 0): first, (1, 2): first, (2, 1): first + 2}


def blocking():
    wire = Wire(1 - dist.get_rank(), CPU)
    dist.barrier()
    if dist.get_rank() == 0:
        start = time.perf_counter()
        wire.send(wire.new_payload(8))
        wire.drain()
        return time.perf_counter() - start
    time.sleep(0.3)
    wire.expect(8)
    wire.done_with(wire.receive())
    return 1.0


def test_draining_waits_for_the_peer(two_ranks):
    assert min(two_ranks.run(blocking)) >= 0.2


def vote():
    rank, control = dist.get_rank(), Control(timeout_s=60)
    return control.agree([True, rank == 0, rank == 1, False]), control.gather(("rank", rank))


def test_one_no_is_a_no_and_gather_keeps_the_order(two_ranks):
    for agreed, gathered in two_ranks.run(vote):
        assert agreed == [True, False, False, False]
        assert gathered == [("rank", 0), ("rank", 1)]


def ask_alone():
    """Rank 1 does not answer."""
    control = Control(timeout_s=1.0)
    if dist.get_rank() == 1:
        time.sleep(3)
        return None
    start = time.perf_counter()
    try:
        control.agree([True])
    except ConnectionError as error:
        return str(error), time.perf_counter() - start
    return "answered", 0.0


def test_a_rank_that_does_not_answer_is_an_error_within_the_time(two_ranks):
    message, took_s = two_ranks.run(ask_alone)[0]
    assert "another rank ended, or was silent for more than 1 s, while all ranks voted" in message
    assert took_s < 2.5


class Never:
    def is_completed(self):
        return False


def wait_for_a_queued_message():
    """As over NCCL, where `receive` returns before the message is there."""
    wire = Wire(1 - dist.get_rank(), CPU)
    wire._awaited.append(Never())
    wire.wait_for_arrivals(timeout_s=0.2)


def test_a_queued_message_that_does_not_come_names_the_peer(two_ranks):
    for rank, outcome in enumerate(two_ranks.outcomes(wait_for_a_queued_message)):
        assert outcome.kind == "ConnectionError"
        assert outcome.message == f"rank {1 - rank} ended or was silent for more than 0.2 s"


def test_links_that_share_no_rank_share_groups_on_nccl():
    links = [(stage, (first + stage, first + stage + 1)) for stage in range(3) for first in (0, 4)]
    even, odd = _share_no_rank(links)
    assert [stage for stage, _ in even] == [0, 0, 2, 2]
    assert [ends for _, ends in odd] == [(1, 2), (5, 6)]


class Failed:
    def is_completed(self):
        return True

    def wait(self):
        raise RuntimeError("NCCL remote error")


def wait_for_a_failed_message():
    wire = Wire(1 - dist.get_rank(), CPU)
    wire._awaited.append(Failed())
    wire.wait_for_arrivals(timeout_s=60)


def test_a_queued_message_that_failed_is_no_arrival(two_ranks):
    for outcome in two_ranks.outcomes(wait_for_a_failed_message):
        assert outcome.kind == "ConnectionError"
        assert "NCCL remote error" in outcome.message


def agree_with_gpus(num_gpus, block):
    device = torch.device("cuda", dist.get_rank())
    with mock.patch("torch.cuda.device_count", return_value=num_gpus):
        return agree_on_config(lambda: block, {}, device)[0].enabled


def test_more_ranks_on_a_node_than_gpus_is_one_error_on_every_rank(two_ranks):
    enabled = {"clapping": {}}
    assert_same_error(two_ranks.outcomes(agree_with_gpus, 1, enabled), "ValueError", "device = cuda:1 on ")
    assert two_ranks.run(agree_with_gpus, 2, enabled) == [True, True]
    assert two_ranks.run(agree_with_gpus, 1, {}) == [False, False]
