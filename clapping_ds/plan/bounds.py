"""What no order of work can beat, and how deep a pipeline is made to come near it."""

from itertools import accumulate, pairwise

from clapping_ds.autotune.depth import find_hiding_depth
from clapping_ds.plan.timeline import Link, Stage, Step, work_s

TOLERANCE = 0.05
"""As `clapping_ds.autotune.decision` has it."""


def bound_s(step: Step) -> float:
    """A step takes no less, whatever waits for what, if slots start and end in ascending order.

    For each stage and each direction of each link: the earliest time at which it can start, its work,
    and the least time from the end of its work to the end of the step.
    """
    stages, links = step.stages, step.links
    num_links = len(links)
    turn_s = stages[-1].forward_s + stages[-1].backward_s
    first_there, last_there = _there_s(step, 0), _there_s(step, -1)
    first_back, last_back = _back_s(step, 0), _back_s(step, -1)

    found = []
    for i, stage in enumerate(stages):
        codecs_s = 0.0 if step.codecs_overlap or i == 0 else stage.encode_s + stage.decode_s
        found.append(first_there[i] - codecs_s + work_s(step, i) + last_back[i])
    for i, link in enumerate(links):
        here, there = stages[i], stages[i + 1]
        before = first_there[i] + here.forward_s + here.encode_s
        after = last_there[num_links] - last_there[i + 1] + turn_s + last_back[num_links]
        carrying_s = sum(step.activation_bytes) / link.bytes_per_s + link.latency_s
        found.append(before + carrying_s + there.decode_s + after)
        before = first_there[num_links] + turn_s + first_back[num_links] - first_back[i + 1] + there.encode_s
        carrying_s = sum(step.gradient_bytes) / link.bytes_per_s + link.latency_s
        found.append(before + carrying_s + here.decode_s + here.backward_s + last_back[i])
    return max(found) + step.overhead_s


def automatic_depth(step: Step) -> int:
    """What `"in_flight": "auto"` would choose, were memory no limit."""
    num_slots, num_links = step.num_micro_batches, len(step.links)
    sums = sum(step.activation_bytes), sum(step.gradient_bytes)
    stage_s = max(work_s(step, stage_id) for stage_id in range(num_links + 1)) / num_slots
    transfers_s = [max(sums) / num_slots / link.bytes_per_s for link in step.links]
    delays_s = [sum(sums) / num_slots / link.bytes_per_s + 2 * link.latency_s for link in step.links]
    depth = find_hiding_depth(stage_s, max([stage_s, *transfers_s]), delays_s, TOLERANCE)
    return min(num_slots, depth)


def _hop_s(link: Link, sender: Stage, receiver: Stage, num_bytes: float) -> float:
    return sender.encode_s + num_bytes / link.bytes_per_s + link.latency_s + receiver.decode_s


def _there_s(step: Step, slot: int) -> list[float]:
    """Per stage: from the start of the slot's first forward to that of its forward there, at the least."""
    num_bytes = step.activation_bytes[slot]
    pairs = zip(step.links, pairwise(step.stages), strict=True)
    steps = [here.forward_s + _hop_s(link, here, there, num_bytes) for link, (here, there) in pairs]
    return list(accumulate(steps, initial=0.0))


def _back_s(step: Step, slot: int) -> list[float]:
    """Per stage: from the end of the slot's backward there to the end of its last one, at the least."""
    num_bytes = step.gradient_bytes[slot]
    pairs = zip(step.links, pairwise(step.stages), strict=True)
    steps = [_hop_s(link, there, here, num_bytes) + here.backward_s for link, (here, there) in pairs]
    return list(accumulate(steps, initial=0.0))
