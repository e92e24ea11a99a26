"""The codec `transform`: bits where the variance is, and outlier tokens apart.

Tensors between the blocks of a trained model are far from noise: a few channels are a hundred times larger
than the others, a few tokens a hundred times larger still, and what tokens have in common is half of the
rest. For the rows (tokens) of x = fp32(v - base) as a matrix [N, D], D the last dimension:

1. *Outliers*: the ceil(N / `rows_per_outlier`) rows of largest norm travel in bfloat16, with their indexes.
2. *Gain* g_n of each other row: the root mean square over channels d of x_nd / (root mean square of channel
   d), times the root mean square of all.
3. *Coordinates* y_n of x_n / g_n: with `basis: "channel"` the channels as they are, with "eigen"
   x_n U^-1 / g_n.
4. *Anchor*: with `anchors` above zero, of so many points a_j that were learned from earlier messages the one
   nearest to y_n; its number j_n travels, and z_n = y_n - a_j is what is left. Else z_n = y_n.
5. *Mean* mu_k of z_nk for each coordinate; *scale* s_n of what is left of each row, its root mean square as
   that of step 2 is; *deviation* sigma_k of (z_nk - mu_k) / s_n for each coordinate.
6. *Bits*: coordinates are sorted by deviation and cut into blocks of 16; whole bits, 0 to 8 per block, are
   given out one by one to the block whose error they lower most (reverse water-filling), `bits` per value
   in all.
7. *Codes*: (z_nk - mu_k) / (s_n sigma_k), random signs drawn afresh for every message, the Hadamard matrix of
   each block, and the Lloyd-Max code of a Gaussian.

    r_nk = mu_k + s_n sigma_k w_nk + a_jk       w: signs and Hadamard of the levels, over 4
    D(x)_n = g_n r_n                            "channel"
    D(x)_n = g_n r_n U                          "eigen"

All but the basis and the anchors (see `learning`) is computed by the sender for every message and sent with
it, so that a message is coded well whatever the ones before it were.

Both ends hold the same bits, whatever their libraries and GPUs: levels are multiples of 2^-8, so that w is
exact; gains, scales, means and deviations are bfloat16 and are used as they arrive; what is rounded is two
sums and three products, each by itself, and with "eigen" a product of integers (see `eigenbasis`), whose sums
are exact in any order. A row that is not finite arrives as NaN throughout, and leaves its part of the memory
as it was. A message whose largest value is 2^113 or more is scaled down to it; a deviation below 2^-60 is
zero.

Wire, for M rows that are no outliers, C = D rounded up to whole blocks, and W bits a row: places of outliers
(int32 [N - M], ascending), outliers (bfloat16 [N - M, D]), gains (bfloat16 [M]), scales (bfloat16 [M]), with
anchors their numbers (int16 [M]), means (bfloat16 [C]), deviations (bfloat16 [C]), bits of blocks
(uint8 [C / 16]), a slice of what is learned next (int8), padding to 16 bytes; then codes: M rows of W words
of 16 bits, where a block of b bits has b words, word i the i-th bits of its 16 codes; padding to 16 bytes.
"""

import math
from itertools import pairwise
from types import ModuleType
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import AfterValidator, BaseModel, Field

from clapping_ds.codecs.base import STRICT, Context, State, ceil_div, pad_nbytes, width_of
from clapping_ds.codecs.learning import Layout, Learning
from clapping_ds.codecs.reference import transform_reference
from clapping_ds.codecs.reference.numerics_reference import pad_end
from clapping_ds.codecs.reference.transform_reference import (
    BLOCK,
    ERRORS,
    LARGEST,
    LARGEST_W,
    MOST_BITS,
    Arrived,
    Coding,
    invert,
)
from clapping_ds.codecs.statistics import Moments, find_gains, find_moments

UNIT = 1 / 16
MOST_COORDINATES = 16384
"""Of what is learned; for wider tensors nothing is."""
MOST_ANCHORS = 1 << 14


class Sizes(NamedTuple):
    """Of a message."""

    num_rows: int
    num_outliers: int
    num_channels: int
    num_blocks: int
    num_words: int
    """Of a row's codes: the bits that are given out to its blocks."""
    has_anchors: bool
    slice_nbytes: int

    @property
    def num_coded(self) -> int:
        return self.num_rows - self.num_outliers

    @property
    def num_coordinates(self) -> int:
        return self.num_blocks * BLOCK


class Sections(NamedTuple):
    """Views of a payload."""

    places: torch.Tensor
    """Of the outliers."""
    outliers: torch.Tensor
    gains: torch.Tensor
    """NaN: the row is not finite."""
    scales: torch.Tensor
    anchors: torch.Tensor
    """Their numbers; empty without."""
    means: torch.Tensor
    deviations: torch.Tensor
    bits: torch.Tensor
    slice: torch.Tensor
    codes: torch.Tensor

    @property
    def coding(self) -> Coding:
        """How coordinates are coded: derived alike at both ends."""
        order_C = self.deviations.view(torch.int16).argsort(descending=True, stable=True)
        end_B = self.bits.cumsum(0, dtype=torch.int32)
        return Coding(self.means.float(), self.deviations.float(), order_C, self.bits, end_B)


class Rows(NamedTuple):
    """What the sender has."""

    places: torch.Tensor
    """int64 [K], ascending: of the outliers."""
    outliers: torch.Tensor
    """fp32 [K, D]; NaN where a row is not finite."""
    coded: torch.Tensor
    """fp32 [M, C]: the others over their gains, padded with zeros to whole blocks."""
    gains: torch.Tensor
    """bfloat16 [M]; NaN where a row is not finite."""
    counted: torch.Tensor
    """bool [M]: which of these are finite and have a gain; the others are zeros."""


def _check_unit(bits: float) -> float:
    if bits % UNIT:
        raise ValueError("a multiple of 1/16")
    return bits


Bits = Annotated[float, Field(ge=UNIT, le=MOST_BITS), AfterValidator(_check_unit)]


class Transform(BaseModel):
    """Variance per coordinate, outlier tokens apart, blocks of 16 coordinates with 0 to 8 bits each."""

    model_config = STRICT
    carries_by_default: ClassVar[bool] = False

    name: Literal["transform"] = "transform"
    bits: Bits = 3.0
    """Of codes, per value: a multiple of 1/16, rounded up to a bit per block."""
    basis: Literal["channel", "eigen"] = "channel"
    """What is coded: the channels as they are; or their coordinates in the eigenbasis of earlier messages."""
    refresh: Annotated[int, Field(ge=2, le=1 << 16)] = 256
    """Basis and anchors are new every so many messages of a tensor, a slice of them with each; the first are
    used from the message with twice this number on, and until then it is as with "channel" and no anchors."""
    anchors: Annotated[int, Field(ge=0, le=MOST_ANCHORS)] = 0
    """Points that rows gather around; 0: none."""
    rows_per_outlier: Annotated[int, Field(ge=16, le=1 << 16)] = 128
    """Of so many rows the one of largest norm is sent in bfloat16: with 128 that adds 1/8 bit per value."""

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Outliers, and what rows and coordinates have in common, then codes, each padded to 16."""
        sizes = self._sizes(shape)
        return pad_nbytes(_count_side_bytes(sizes)) + pad_nbytes(2 * sizes.num_coded * sizes.num_words)

    def new_state(self, width: int, device: torch.device) -> State | None:
        """What is learned, where something is; see `learning`."""
        layout = self.layout(width)
        return None if layout is None else layout.new_state(device)

    def layout(self, width: int) -> Layout | None:
        """Of what is learned of rows of so many channels; None: nothing is."""
        size = ceil_div(width, BLOCK) * BLOCK
        if size > MOST_COORDINATES or (self.basis == "channel" and not self.anchors):
            return None
        return Layout(size, self.basis == "eigen", self.anchors, self.refresh)

    def has_learned(self, state: State, width: int) -> bool:
        """Whether what is learned is in use."""
        layout = self.layout(width)
        assert layout is not None
        return Learning(state, layout).is_used

    def warm_up_(self, state: State, width: int) -> None:
        """Lets a new state be as after many messages, for measurements."""
        layout = self.layout(width)
        assert layout is not None
        Learning(state, layout).put_plain_()

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        sizes, learning = self._sizes(value.shape), self._learning(value, context)
        payload.zero_()
        sections = _split(payload, sizes)
        rows = _part_rows(value, context, sizes)
        z_MC = rows.coded
        if learning is not None:
            learning.begin_message()
            learning.learn_(z_MC)
            if learning.is_used:
                z_MC = learning.analyse(z_MC, rows.counted, sections.anchors)
        moments = find_moments(z_MC, rows.counted)
        _write_side_(rows, moments, sections, sizes.num_words)
        _implementation(value).write_codes_(moments.rows, sections.coding, context.seed, sections.codes)
        if learning is not None:
            learning.put_slice_(sections.slice)
        if context.memory is not None:
            arrived = _read(sections, sizes, learning, context)
            _implementation(value).apply_(arrived, value, None, context)
        if learning is not None:
            learning.end_message()

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        sizes, learning = self._sizes(out.shape), self._learning(out, context)
        sections = _split(payload, sizes)
        if learning is not None:
            learning.begin_message()
        _implementation(out).apply_(_read(sections, sizes, learning, context), out, out, context)
        if learning is not None:
            learning.take_slice_(sections.slice)
            learning.end_message()

    def _learning(self, tensor: torch.Tensor, context: Context) -> Learning | None:
        layout = self.layout(width_of(tensor.shape))
        return None if layout is None or context.state is None else Learning(context.state, layout)

    def _sizes(self, shape: tuple[int, ...]) -> Sizes:
        num_channels = width_of(shape)
        num_rows = torch.Size(shape).numel() // max(1, num_channels)
        num_blocks = ceil_div(num_channels, BLOCK)
        num_words = math.ceil(self.bits * num_blocks)
        layout = self.layout(num_channels)
        return Sizes(
            num_rows=num_rows,
            num_outliers=ceil_div(num_rows, self.rows_per_outlier),
            num_channels=num_channels,
            num_blocks=num_blocks,
            num_words=num_words,
            has_anchors=layout is not None and layout.num_anchors > 0,
            slice_nbytes=0 if layout is None else layout.slice_nbytes,
        )


def _list_sections(sizes: Sizes) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """What comes before the codes. Each begins at a multiple of its dtype's size."""
    return [
        (torch.int32, (sizes.num_outliers,)),
        (torch.bfloat16, (sizes.num_outliers, sizes.num_channels)),
        (torch.bfloat16, (sizes.num_coded,)),
        (torch.bfloat16, (sizes.num_coded,)),
        (torch.int16, (sizes.num_coded * sizes.has_anchors,)),
        (torch.bfloat16, (sizes.num_coordinates,)),
        (torch.bfloat16, (sizes.num_coordinates,)),
        (torch.uint8, (sizes.num_blocks,)),
        (torch.int8, (sizes.slice_nbytes,)),
    ]


def _count_side_bytes(sizes: Sizes) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in _list_sections(sizes))


def _split(payload: torch.Tensor, sizes: Sizes) -> Sections:
    found: list[torch.Tensor] = []
    start = 0
    for dtype, shape in _list_sections(sizes):
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        found.append(payload[start : start + num_bytes].view(dtype).view(shape))
        start += num_bytes
    codes = payload[pad_nbytes(start) :][: 2 * sizes.num_coded * sizes.num_words].view(torch.int16)
    found.append(codes.view(sizes.num_coded, sizes.num_words))
    return Sections(*found)


def _read(sections: Sections, sizes: Sizes, learning: Learning | None, context: Context) -> Arrived:
    """What a message says."""
    coding, implementation = sections.coding, _implementation(sections.codes)
    r_MC = implementation.read_codes(sections.codes, coding, sections.scales.float(), context.seed)
    if learning is not None and learning.is_used:
        multiply = None if context.memory is None else implementation.multiply
        r_MC = learning.synthesise(r_MC, _find_bound(coding, sections), sections.anchors, multiply)
    places_K = sections.places.long()
    order_N = torch.cat([_list_others(places_K, sizes.num_rows), places_K])
    finite_N = torch.cat([sections.gains.isfinite(), sections.outliers.isfinite().all(1)])
    return Arrived(r_MC, sections.gains, sections.outliers, order_N, finite_N)


def _find_bound(coding: Coding, sections: Sections) -> torch.Tensor:
    """fp32 [C]: of the magnitudes that codes stand for."""
    scale = sections.scales.float().amax() if sections.scales.numel() else 0.0
    return coding.means.abs() + LARGEST_W * coding.deviations * scale


def _list_others(places_K: torch.Tensor, num_rows: int) -> torch.Tensor:
    """int64 [M], ascending: the rows that are no outliers."""
    is_outlier_N = places_K.new_zeros(num_rows).index_fill_(0, places_K, 1)
    return is_outlier_N.argsort(stable=True)[: num_rows - len(places_K)]


# The sender alone


def _part_rows(value: torch.Tensor, context: Context, sizes: Sizes) -> Rows:
    """Those of largest norm, or not finite where there is room, and the others."""
    x_ND = value.reshape(sizes.num_rows, sizes.num_channels).float()
    if context.base is not None:
        x_ND = x_ND - context.base.view_as(x_ND).float()
    largest_N = torch.maximum(x_ND.amax(1), -x_ND.amin(1))
    finite_N = largest_N.isfinite()
    largest = largest_N.where(finite_N, 0.0).amax() if sizes.num_rows else largest_N.new_zeros(())
    exponent = torch.floor(torch.log2(largest.clamp(min=1 / LARGEST)))
    x_ND = x_ND * torch.exp2(-exponent)  # so that no square overflows
    unit = torch.exp2(exponent.clamp(max=math.log2(LARGEST)))
    norm_N = torch.linalg.vector_norm(x_ND, dim=1).where(finite_N, -1.0)
    places_K = norm_N.topk(sizes.num_outliers).indices.sort().values
    others_M = _list_others(places_K, sizes.num_rows)
    outliers_KD = (x_ND[places_K] * unit).masked_fill(~finite_N[places_K, None], torch.nan)
    finite_M = finite_N[others_M]
    x_MC = pad_end(x_ND[others_M].where(finite_M[:, None], 0.0), sizes.num_coordinates)
    gain_M = find_gains(x_MC, finite_M)
    sent_M = (gain_M * unit).bfloat16()
    x_MC *= invert(sent_M.float() / unit)[:, None]
    return Rows(places_K, outliers_KD, x_MC, sent_M.masked_fill(~finite_M, torch.nan), sent_M > 0)


def _write_side_(rows: Rows, moments: Moments, sections: Sections, num_words: int) -> None:
    """All but codes, anchors, and what is learned."""
    sections.places.copy_(rows.places)
    sections.outliers.copy_(rows.outliers)
    sections.gains.copy_(rows.gains)
    sections.scales.copy_(moments.scales)
    sections.means.copy_(moments.means)
    sections.deviations.copy_(moments.deviations)
    in_order_C = sections.deviations.float()[sections.coding.order]
    sections.bits.copy_(give_out_bits(in_order_C, num_words))


def give_out_bits(deviation_C: torch.Tensor, num_bits: int) -> torch.Tensor:
    """uint8 [B]: the bits of each block of sorted coordinates. A block's error falls ever less with each bit,
    so the largest falls of all are those that giving out one bit after the other would reach."""
    variance_B = deviation_C.double().square().view(-1, BLOCK).sum(1)
    falls = [variance_B * (before - after) for before, after in pairwise(ERRORS)]  # no copy from the host
    fall_B8 = torch.stack(falls, 1)
    taken = fall_B8.flatten().argsort(descending=True, stable=True)[:num_bits]
    given_B = torch.zeros(len(variance_B), dtype=torch.int32, device=deviation_C.device)
    return given_B.index_add_(0, taken // MOST_BITS, torch.ones_like(taken, dtype=torch.int32)).to(
        torch.uint8
    )


def _implementation(tensor: torch.Tensor) -> ModuleType:
    """Triton's for a tensor on a GPU, plain torch elsewhere."""
    if tensor.is_cuda:
        from clapping_ds.codecs.kernels import transform_kernel

        return transform_kernel
    return transform_reference
