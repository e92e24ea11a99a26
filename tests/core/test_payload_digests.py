"""What each codec puts on the wire and leaves in memory is what it was: a recorded digest per codec.

`python -m tests.core.test_payload_digests` records them anew, for a wire format that is changed on purpose.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from clapping_ds.codecs import Context, Eden, Float8, LowRank, Quantizer, RandK, Raw, TopK

RECORDED = Path(__file__).parent / "payload_digests.json"
SEED = 0x9ABCDEF012345678
CODECS = [
    Raw(),
    *(Quantizer(name=name) for name in ("int8", "int4", "int3", "int2", "sign")),
    *(Quantizer(name=name, rotate=True) for name in ("int8", "int4", "int3", "int2")),
    *(Quantizer(name=name, stochastic=True) for name in ("int8", "int4", "int3", "int2")),
    *(Quantizer(name=name, scale="maximum", group_size=64) for name in ("int3", "int2")),
    *(Eden(name=name) for name in ("eden4", "eden3", "eden2", "eden1")),
    *(Eden(name=name, scale="unbiased", group_size=32) for name in ("eden4", "eden1")),
    *(Float8(name=name) for name in ("fp8_e4m3", "fp8_e5m2")),
    *(TopK(values=values) for values in ("bfloat16", "int8")),
    RandK(),
    LowRank(),
]


def values_of(num_values: int, salt: int) -> torch.Tensor:
    """fp32, heavy-tailed, made of integers so that it is the same with every torch."""
    number = torch.arange(num_values, dtype=torch.int64) * 2654435761 + salt * 40503
    number = (number ^ (number >> 13)) * 1274126177 & 0xFFFFFF
    unit = number.float() / (1 << 23) - 1.0
    return unit * unit * unit * 8.0


def digest_of(codec) -> str:
    """SHA-256 of payload, memories and what is delivered, over dtypes, memories and bases."""
    found = hashlib.sha256()
    for case, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        value = values_of(33 * 71, case).view(33, 71).to(dtype)
        for memory_dtype, carry in ((None, False), (torch.float32, True), (torch.bfloat16, True)):
            start = values_of(value.numel(), 7).view(value.shape)
            memories = [None if memory_dtype is None else start.to(memory_dtype) for _ in range(2)]
            states = [codec.new_state(value.shape[-1], value.device) for _ in range(2)]
            if isinstance(codec, LowRank):  # its factors are the library's: their product is ours
                payload = values_of(codec.nbytes(value.shape, dtype) // 2, 9).bfloat16().view(torch.uint8)
            else:
                payload = torch.empty(codec.nbytes(value.shape, dtype), dtype=torch.uint8)
                codec.encode_(value, payload, Context(memories[0], carry, SEED, states[0]))
            out = torch.empty_like(value)
            codec.decode_(payload, out, Context(memories[1], carry, SEED, states[1]))
            for tensor in (payload, *memories, out):
                if tensor is not None:
                    found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_payloads_are_what_they_were(codec):
    assert digest_of(codec) == json.loads(RECORDED.read_text())[repr(codec)]


if __name__ == "__main__":
    digests = {repr(codec): digest_of(codec) for codec in CODECS}
    RECORDED.write_text(json.dumps(digests, indent=1) + "\n")
