"""The product of factors: `clapping_ds.codecs.lowrank`'s kernel in plain torch."""

import torch

from clapping_ds.codecs.memory import limit
from clapping_ds.codecs.protocol import Context
from clapping_ds.codecs.reference.steps import deliver_, grouped, keep_, stepped


def apply_(
    left_RN: torch.Tensor,
    right_RD: torch.Tensor,
    like: torch.Tensor,
    out: torch.Tensor | None,
    context: Context,
) -> None:
    """Steps the memory by the product of the factors; `out`, where given, gets the result.

    left_RN, right_RD   bfloat16 factors of rank R; a row that is not finite is NaN in left_RN
    like                a tensor of the message's dtype
    """
    sent_ND = torch.zeros(left_RN.shape[1], right_RD.shape[1], device=like.device)
    for left_N, right_D in zip(left_RN.float(), right_RD.float(), strict=True):
        sent_ND = sent_ND + left_N[:, None] * right_D
    memory = context.memory
    base_ND = torch.zeros_like(sent_ND)
    if memory is not None and context.carry:
        base_ND = grouped(memory, *sent_ND.shape)
    memory_ND = stepped(base_ND, sent_ND, limit(like, memory))
    finite_N = left_RN[0].isfinite()
    if out is not None:
        deliver_(memory, out, memory_ND, finite_N)
    else:
        assert memory is not None
        keep_(memory, memory_ND, finite_N)
