"""1F1B with more micro-batches in flight, so that a link's latency and transfer hide behind compute.

Stock 1F1B runs S - s forwards on stage s of S before its first backward: just enough to fill the
pipeline when links take no time. Here every link holds `in_flight` more, so stage s runs
1 + (S - 1 - s) * (1 + in_flight), the last stage always one. Then backward and forward alternate.
Gradients are added up in the same order, so losses are the same for every depth, bit for bit; what
grows is memory, by the activations of one micro-batch for each additional forward.

Messages are sent as soon as they are computed. That needs sends that do not block.
"""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Literal

from clapping_ds.stage.endpoint import ACTIVATIONS_FROM_PREVIOUS, GRADIENTS_FROM_NEXT, End

Work = tuple[Literal["forward", "backward"], int]


def count_warmup(num_micro_batches: int, num_stages: int, stage_id: int, in_flight: int) -> int:
    """Forwards before the first backward: how many micro-batches a stage stores at most."""
    return min(num_micro_batches, 1 + (num_stages - 1 - stage_id) * (1 + in_flight))


def order_work(num_micro_batches: int, num_stages: int, stage_id: int, in_flight: int) -> Iterator[Work]:
    """What a stage computes, in order: every micro-batch forward and backward, both ascending."""
    warmup = count_warmup(num_micro_batches, num_stages, stage_id, in_flight)
    for micro_batch in range(warmup):
        yield "forward", micro_batch
    for micro_batch in range(num_micro_batches):
        yield "backward", micro_batch
        if micro_batch + warmup < num_micro_batches:
            yield "forward", micro_batch + warmup


def find_leads(num_micro_batches: int, num_stages: int, stage_id: int, in_flight: int) -> dict[End, int]:
    """By receiving end, how many messages a stage may have announced in `order_work` before it has sent
    anything back on that link; each message that it sends back allows one more.

    A message that is announced or sent on NCCL keeps its GPU busy until the peer has sent or announced it,
    and whatever waits for the whole GPU (`.item()` in the user's forward pass, a kernel that is loaded,
    memory that is given back) waits for it. So the two ends of a link must come to its messages in the same
    order, as if each of them blocked. On the link between s and s + 1, with W the warm-up of s + 1 and any
    0 <= d <= in_flight + 1:

        s sends     activations 0 .. W+d-1,   then for i = 0, 1, ...   announces gradients i, sends W+d+i
        s+1         announces 0 .. W+d-1,     then for i = 0, 1, ...   sends gradients i, announces W+d+i

    d divides what is ahead between the directions: d activations and in_flight + 1 - d gradients.
    """
    d = (in_flight + 1) // 2
    own, of_next = (
        count_warmup(num_micro_batches, num_stages, stage, in_flight) for stage in (stage_id, stage_id + 1)
    )
    return {ACTIVATIONS_FROM_PREVIOUS: own + d, GRADIENTS_FROM_NEXT: 1 - of_next - d}


def find_hiding_depth(compute_s: float, period_s: float, delays_s: Sequence[float], tolerance: float) -> int:
    """The smallest `in_flight` with which the links' delays do not hold up the pipeline.

    compute_s   forward and backward of one micro-batch on the slowest stage
    period_s    between two micro-batches when nothing is waited for: the most of compute_s and of the
                time that one micro-batch takes on the wire of any link and direction
    delays_s    for each link, first stage first, the time that a micro-batch spends on its way there
                and back
    tolerance   part of the throughput that may be given up for a smaller depth

    From stage s of S a micro-batch takes (S - s) * compute_s and the delays of the links after s until
    its gradient is back. Little's law: as many are needed on their way as periods fit into that.
    """
    depth = 0
    for num_links in range(1, len(delays_s) + 1):
        round_trip_s = (num_links + 1) * compute_s + sum(delays_s[-num_links:])
        num_needed = round_trip_s / period_s * (1 - tolerance)
        depth = max(depth, ceil((num_needed - 1) / num_links - 1))
    return depth
