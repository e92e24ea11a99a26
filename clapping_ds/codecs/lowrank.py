"""The codec `lowrank`: two factors of rank r, warm-started. Source: PowerSGD, Vogels et al., NeurIPS 2019
(arXiv 1905.13727), algorithm 1: one step of subspace iteration per message.

For x = fp32(v - m) as a matrix [N, D], D the last dimension, and the state Q [D, r]:

    P <- orthonormal basis of x Q       Q <- x^T P       D(x) = P Q^T

P and Q are rounded to bfloat16 before they are sent, and Q after P was, so that it fits the P that
arrives. Products of two bfloat16 values are exact in fp32 and are added in the order of the rank, so
both ends compute the same memory on any machine. The next message of the tensor, of whatever slot,
starts from the Q of this one; where a column of Q is zero, from what was there before. At first Q is
random, from a fixed seed.

Wire: P as [r, N], then Q as [r, D], both bfloat16, then padding to 16 bytes. A row of x that is not
finite is left out and has NaN in P. r is at most N and D.

The factors come from torch's matrix product and QR; one kernel, used at both ends, multiplies them out
and updates the memory.
"""

from types import ModuleType
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, Field

from clapping_ds.codecs.base import STRICT, Context, State, pad_nbytes, width_of
from clapping_ds.codecs.reference import lowrank_reference
from clapping_ds.codecs.reference.numerics_reference import subtract_base

LARGEST = 2.0**96
SMALLEST = 2.0**-100


class LowRank(BaseModel):
    """Factors of rank `rank`: 16 * rank * (1/D + 1/N) bits per value of an [N, D] matrix."""

    model_config = STRICT
    carries_by_default: ClassVar[bool] = True

    name: Literal["lowrank"] = "lowrank"
    rank: Annotated[int, Field(ge=1, le=64)] = 4
    """Columns of each factor."""

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """2 * rank * (N + D), padded to 16."""
        rank, num_rows, num_columns = self._sizes(shape)
        return pad_nbytes(2 * rank * (num_rows + num_columns))

    def new_state(self, width: int, device: torch.device) -> State:
        """bfloat16 [min(rank, D), D]: the right factor that the first message starts from."""
        start = torch.randn(min(self.rank, width), width, generator=torch.Generator().manual_seed(0))
        return State({"right_RD": start.bfloat16().to(device)})

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        left_RN, right_RD, padding = self._sections(payload, value.shape)
        assert context.state is not None
        x_ND, _, finite_N = subtract_base(value, context.base, left_RN.shape[1], right_RD.shape[1])
        start_RD = context.state.shared["right_RD"][: len(right_RD)]
        factor(x_ND, finite_N, start_RD, left_RN, right_RD)
        self._apply_(left_RN, right_RD, value, None, context)
        padding.zero_()

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        left_RN, right_RD, _ = self._sections(payload, out.shape)
        self._apply_(left_RN, right_RD, out, out, context)

    @staticmethod
    def _apply_(
        left_RN: torch.Tensor,
        right_RD: torch.Tensor,
        like: torch.Tensor,
        out: torch.Tensor | None,
        context: Context,
    ) -> None:
        assert context.state is not None
        known_RD = context.state.shared["right_RD"][: len(right_RD)]
        known_RD.copy_(torch.where((right_RD != 0).any(1, keepdim=True), right_RD, known_RD))
        if out is None and context.memory is None:
            return
        _implementation(like).apply_(left_RN, right_RD, like, out, context)

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Rank, rows and columns."""
        num_columns = width_of(shape)
        num_rows = torch.Size(shape).numel() // max(1, num_columns)
        return min(self.rank, num_rows, num_columns), num_rows, num_columns

    def _sections(
        self, payload: torch.Tensor, shape: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the payload: P (bfloat16 [r, N]), Q (bfloat16 [r, D]), padding (uint8)."""
        rank, num_rows, num_columns = self._sizes(shape)
        middle, end = 2 * rank * num_rows, 2 * rank * (num_rows + num_columns)
        factors = payload[:end].view(torch.bfloat16)
        left_RN = factors[: middle // 2].view(rank, num_rows)
        return left_RN, factors[middle // 2 :].view(rank, num_columns), payload[end:]


def factor(
    x_ND: torch.Tensor, finite_N: torch.Tensor, state_RD: torch.Tensor,
    left_RN: torch.Tensor, right_RD: torch.Tensor,
) -> None:  # fmt: skip
    """Writes the factors of fp32 `x_ND`, of which the rows that are not finite are zeros."""
    largest = x_ND.clamp_(-LARGEST, LARGEST).abs().amax()
    # A power of two: exact, and neither products nor norms overflow.
    scale = torch.exp2(torch.floor(torch.log2(largest.clamp(min=SMALLEST))))
    x_ND = x_ND / scale * (largest >= SMALLEST)
    basis_NR = torch.linalg.qr(x_ND @ state_RD.float().T).Q
    left_RN.copy_(basis_NR.T.masked_fill(~finite_N, torch.nan))
    sent_NR = basis_NR.bfloat16().float().masked_fill(~finite_N[:, None], 0.0)
    right_RD.copy_(sent_NR.T @ x_ND * scale)


def _implementation(tensor: torch.Tensor) -> ModuleType:
    """Triton's for a tensor on a GPU, plain torch elsewhere."""
    if tensor.is_cuda:
        from clapping_ds.codecs.kernels import lowrank_kernel

        return lowrank_kernel
    return lowrank_reference
