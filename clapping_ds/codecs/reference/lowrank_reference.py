"""The product of factors, for `clapping_ds.codecs.lowrank`, in plain torch."""

import torch

from clapping_ds.codecs.base import Context, limit
from clapping_ds.codecs.reference.numerics_reference import deliver_, keep_, load_base_like, update


def apply_(
    left_RN: torch.Tensor,
    right_RD: torch.Tensor,
    like: torch.Tensor,
    out: torch.Tensor | None,
    context: Context,
) -> None:
    """Updates the memory by the product of the factors; `out`, where given, gets the result.

    left_RN, right_RD   bfloat16 factors of rank R; a row that is not finite is NaN in left_RN
    like                a tensor of the message's dtype
    """
    sent_ND = torch.zeros(left_RN.shape[1], right_RD.shape[1], device=like.device)
    for left_N, right_D in zip(left_RN.float(), right_RD.float(), strict=True):
        sent_ND = sent_ND + left_N[:, None] * right_D
    finite_N = left_RN[0].isfinite()
    if out is not None:
        deliver_(out, sent_ND, finite_N, context)
    else:
        memory = context.memory
        assert memory is not None
        keep_(memory, update(load_base_like(sent_ND, context), sent_ND, limit(like, memory)), finite_N)
