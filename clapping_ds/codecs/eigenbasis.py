"""The eigenbasis of a tensor's rows: learned by the sender, sent in slices, used by both ends at once.

Messages of a tensor are counted, alike at both ends; `refresh` of them are a period.

    period p        slices of basis p travel, one with each message (from period 1 on)
    in its middle   the covariance so far is handed to a thread, which computes basis p + 1
    its end         both ends take basis p into use (from period 1 on)

So what is used when does not depend on how fast the thread is; a step waits for it only where it takes longer
than half a period. The covariance is of rows divided by their gains, less their mean, of a sample of each
message's rows; of what it was, a quarter is left a period later.

A basis is a matrix of integers, int8 [C, C], and an exponent for each of its rows, int8 [C]:

    U_k = Q_k 2^-p_k        2^6 <= max|Q_k| < 2^7

which is orthonormal up to its rounding. The sender computes coordinates with the inverse of U as it was
rounded, so that x = r U holds all the same, and what rounding costs is a little of the basis being the best.

Where both ends must have the same bits, r U is a product of integers: r_k 2^-p_k as multiples of one power of
two, the smallest with which all stay below 2^22, times Q_k. Such sums are exact in any order.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from clapping_ds.codecs.base import State, ceil_div
from clapping_ds.codecs.reference.transform_reference import LARGEST_W, Coding, invert
from clapping_ds.codecs.statistics import find_statistics
from clapping_ds.streams import start_copy

SAMPLES = 8
"""Rows per coordinate that the covariance gets in half a period, where messages have so many: with the
default `refresh` of 256, C / 16 rows of each, at 2 * C^2 operations a row."""
LEAST_ROWS = 32
"""Of each message: of too few rows little is left when their mean is gone."""
REMEMBERED = 0.25
"""Of the covariance, from period to period."""
INTEGER_BITS = 22
"""Of a coordinate's magnitude. The largest coordinate sets the unit of all: one massive channel's mean can be
ten thousand times another's deviation."""
LARGEST_INT8 = 127
EXPONENT_OF_ONE = 6
"""p of a row whose largest entry is 1."""


def new_state(size: int, device: torch.device) -> State:
    """What is used, and what arrives. The sender's own part comes when it first sends.

    size   C, the number of coordinates
    """
    nbytes = size * (size + 1)
    return State(
        {name: torch.zeros(nbytes, dtype=torch.int8, device=device) for name in ("used", "arriving")}
    )


def count_slice_bytes(size: int, refresh: int) -> int:
    """Of a basis, with each of `refresh` messages."""
    return ceil_div(size * (size + 1), refresh)


def put_identity_(state: State, refresh: int) -> None:
    """Lets a new state be in the middle of a period, with a basis of the coordinates themselves."""
    used = state.shared["used"]
    size = _count_coordinates(used)
    used[: size * size].view(size, size).fill_diagonal_(1 << EXPONENT_OF_ONE)
    used[size * size :] = EXPONENT_OF_ONE
    state.own["used_analysis_CC"] = torch.eye(size, dtype=torch.float32, device=used.device)
    state.num_messages = 2 * refresh + 1


def begin_message(state: State, refresh: int) -> bool:
    """Where a period begins, takes what has arrived into use and sends what was computed on its way. Whether
    there is a basis."""
    period, place = divmod(state.num_messages, refresh)
    if place == 0 and period > 0:
        state.settle()
        own = state.own
        if period > 1:
            state.shared["used"].copy_(state.shared["arriving"])
        if "analysis_CC" in own:
            own["used_analysis_CC"] = own["analysis_CC"]
        if "computed" in own:
            device = state.shared["used"].device
            own["leaving"] = own.pop("computed").to(device, non_blocking=True)
            own["analysis_CC"] = own.pop("inverse_CC").to(device, non_blocking=True)
    return period > 1


def end_message(state: State) -> None:
    state.num_messages += 1


def analyse(state: State, x_MC: torch.Tensor) -> torch.Tensor:
    """Coordinates of rows: r with r U = x. The sender alone."""
    return x_MC @ state.own["used_analysis_CC"]


def synthesise(
    state: State, r_MC: torch.Tensor, coding: Coding, multiply: Callable[..., torch.Tensor] | None
) -> torch.Tensor:
    """fp32 r U.

    multiply   exact, of integers, for the same bits on every machine; None: up to the rounding of fp32 sums
    """
    basis_CC, down_C = _read(state.shared["used"])
    t_MC = r_MC * down_C
    if multiply is None:
        return t_MC @ basis_CC.float()
    bound = ((coding.means.abs() + LARGEST_W * coding.deviations) * down_C).amax()
    up = _power_of_two(INTEGER_BITS - 1 - _exponent(bound))
    return multiply((t_MC * up).round(), basis_CC) * (1.0 / up)


def learn_(state: State, refresh: int, x_MC: torch.Tensor, finite_M: torch.Tensor) -> None:
    """Adds a sample of a message's rows to the covariance. The sender alone."""
    num_rows = max(LEAST_ROWS, ceil_div(SAMPLES * x_MC.shape[1], refresh // 2))
    step = max(1, len(x_MC) // num_rows)
    first = state.num_messages % step
    x_SC = x_MC[first::step]
    # Of each message alike, whatever its outliers were, which set the unit of `x_MC`.
    x_SC = x_SC * invert(x_SC.square().mean().sqrt())
    found = find_statistics(x_SC, finite_M[first::step])
    z_SC = x_SC * invert(found.gains)[:, None] - found.means
    z_SC = z_SC * (found.gains > 0)[:, None]
    own = state.own
    if "covariance_CC" not in own:
        own["covariance_CC"] = x_MC.new_zeros(x_MC.shape[1], x_MC.shape[1])
    own["covariance_CC"].addmm_(z_SC.T, z_SC)
    if state.num_messages % refresh == refresh // 2:
        thread = ThreadPoolExecutor(1)
        copy = start_copy(own["covariance_CC"])
        state.pending = thread.submit(_compute, copy, pins=x_MC.is_cuda)
        thread.shutdown(wait=False)
        own["covariance_CC"] *= REMEMBERED


def put_slice_(state: State, refresh: int, section: torch.Tensor) -> None:
    """Writes the slice that travels with this message. The sender alone."""
    if "leaving" in state.own:
        own = _slice(state.own["leaving"], state.num_messages % refresh, section)
        section[: len(own)].copy_(own)
    take_slice_(state, refresh, section)


def take_slice_(state: State, refresh: int, section: torch.Tensor) -> None:
    """Keeps the slice that came with this message."""
    place = _slice(state.shared["arriving"], state.num_messages % refresh, section)
    place.copy_(section[: len(place)])


def _slice(basis: torch.Tensor, number: int, section: torch.Tensor) -> torch.Tensor:
    return basis[number * len(section) :][: len(section)]


def _compute(copy: Callable[[], torch.Tensor], pins: bool) -> dict[str, torch.Tensor]:
    """The basis of a covariance, and the inverse of what it stands for, on the CPU; pinned, so that nothing
    waits for a copy to a GPU."""
    covariance_CC = copy()
    try:
        found = _round(torch.linalg.eigh(covariance_CC).eigenvectors.T)
    except torch.linalg.LinAlgError:  # LAPACK gave up: the channels as they are
        found = _round(torch.eye(len(covariance_CC), dtype=torch.float32))
    return {name: tensor.pin_memory() for name, tensor in found.items()} if pins else found


def _round(rows_CC: torch.Tensor) -> dict[str, torch.Tensor]:
    down_C1 = _power_of_two(_exponent(rows_CC.abs().amax(1, keepdim=True)) - EXPONENT_OF_ONE)
    integer_CC = (rows_CC / down_C1).round().clamp(-LARGEST_INT8, LARGEST_INT8)
    exponent_C = -_exponent(down_C1[:, 0])
    computed = torch.cat([integer_CC.flatten(), exponent_C]).to(torch.int8)
    return {"computed": computed, "inverse_CC": torch.linalg.inv(integer_CC * down_C1)}


def _read(basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers of a basis, and 2^-p of each row."""
    size = _count_coordinates(basis)
    return basis[: size * size].view(size, size), _power_of_two(-basis[size * size :].int())


def _count_coordinates(basis: torch.Tensor) -> int:
    return int(len(basis) ** 0.5)


def _exponent(x: torch.Tensor) -> torch.Tensor:
    """int32: e with 2^e <= x < 2^(e + 1), at least -105, so that 2^(21 - e) is finite."""
    return ((x.view(torch.int32) >> 23) - 127).clamp(min=-105)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """fp32, exact whatever the device's exp2."""
    return ((exponent + 127) << 23).view(torch.float32)
