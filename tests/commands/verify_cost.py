"""What `verify` costs: encoding and decoding one message with it, against without it, interleaved.

python -m tests.commands.verify_cost
"""

import time
from statistics import median

import torch

from clapping_ds.link.message import Spec
from tests.core.test_channel import Ends

SHAPES = ((1, 64, 512), (4, 128, 1024))
STEPS, WARM_UP = 40, 5


def seconds(ends: Ends, step: int, value: torch.Tensor) -> float:
    """Of a message from one end to the other; fresh in step 0."""
    for end in (ends.sender, ends.receiver):
        end.begin_step(step, 1)
    start = time.perf_counter()
    ends.sender.send(0, step == 0, [value])
    ends.receiver.expect(0, step == 0, [Spec.of(value)])
    ends.receiver.receive()
    took_s = time.perf_counter() - start
    for end in (ends.sender, ends.receiver):
        end.end_step()
    return took_s


def main() -> None:
    torch.set_num_threads(1)
    for codec in ("int4", "int2", "eden2"):
        for shape in SHAPES:
            block = {"activations": {"delta": codec}, "strategy": "fc", "lazy": {"p_new": 1e-9}}
            pair = [Ends(**block, verify=verify) for verify in (False, True)]
            rows = [
                [seconds(ends, step, torch.randn(shape)) for ends in pair] for step in range(STEPS + WARM_UP)
            ]
            without, verified = (median(column) for column in zip(*rows[WARM_UP:], strict=True))
            print(f"{codec} {shape}: {without * 1e3:.2f} ms, {verified / without:.2f} times as long verified")


if __name__ == "__main__":
    main()
