"""What the sender of a tensor learns of its rows, and how both ends come to use it at once.

Messages of a tensor are counted, alike at both ends; `refresh` of them are a period.

    period p        slices of what was learned as number p travel, one with each message (p > 0)
    in its middle   a sample of the rows since the last middle goes to a thread, which learns number p + 1
    its end         both ends take number p into use (p > 0)

So what is used when does not depend on how fast the thread is; a step waits for it only where it takes longer
than half a period. Rows are a sample of each message's, divided by their gains.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from clapping_ds.codecs import eigenbasis
from clapping_ds.codecs.anchors import Anchors, Search, find_anchors, prepare_search
from clapping_ds.codecs.base import State, ceil_div
from clapping_ds.codecs.eigenbasis import Basis
from clapping_ds.codecs.integers import EXPONENT_OF_ONE
from clapping_ds.streams import is_asynchronous, mark

ROWS_PER_COORDINATE = 16
"""That a basis is learned from."""
ROWS_PER_ANCHOR = 16
ROWS_AT_ONCE = 4096
"""Of which there is a copy while they are learned from."""


class Layout(NamedTuple):
    """What is learned, by bytes."""

    num_coordinates: int
    """C"""
    has_basis: bool
    num_anchors: int
    """K; 0: none."""
    refresh: int

    @property
    def basis_nbytes(self) -> int:
        return self.num_coordinates * (self.num_coordinates + 1) if self.has_basis else 0

    @property
    def nbytes(self) -> int:
        of_anchors = self.num_coordinates * (self.num_anchors + 1) if self.num_anchors else 0
        return self.basis_nbytes + of_anchors

    @property
    def slice_nbytes(self) -> int:
        """With each message."""
        return ceil_div(self.nbytes, self.refresh)

    @property
    def rows_per_message(self) -> int:
        """Of the sample, where messages have so many."""
        of_basis = ROWS_PER_COORDINATE * self.num_coordinates * self.has_basis
        return ceil_div(max(of_basis, ROWS_PER_ANCHOR * self.num_anchors), self.refresh)

    def new_state(self, device: torch.device) -> State:
        """What is used, and what arrives. The sender's own part comes when it first sends."""
        names = "used", "arriving"
        return State({name: torch.zeros(self.nbytes, dtype=torch.int8, device=device) for name in names})

    def basis(self, learned: torch.Tensor) -> Basis | None:
        """Views of the bytes; None: there is none."""
        if not self.has_basis:
            return None
        of_basis, size = learned[: self.basis_nbytes], self.num_coordinates
        return Basis(of_basis[: size * size].view(size, size), of_basis[size * size :])

    def anchors(self, learned: torch.Tensor) -> Anchors | None:
        """Views of the bytes; None: there are none."""
        if not self.num_anchors:
            return None
        of_anchors, size = learned[self.basis_nbytes :], self.num_coordinates * self.num_anchors
        return Anchors(of_anchors[:size].view(self.num_anchors, -1), of_anchors[size:])


class Learning(NamedTuple):
    """What one end of a channel has learned of a tensor, between two messages."""

    state: State
    layout: Layout

    def put_plain_(self) -> None:
        """Lets a new state be in the middle of a period, with a basis of the coordinates themselves, and
        anchors at zero."""
        used = self.state.shared["used"]
        basis = self.layout.basis(used)
        if basis is not None:
            basis.integers.fill_diagonal_(1 << EXPONENT_OF_ONE)
            basis.exponents.fill_(EXPONENT_OF_ONE)
            size = self.layout.num_coordinates
            self.state.own["used_analysis_CC"] = torch.eye(size, dtype=torch.float32, device=used.device)
        self._prepare_search()
        self.state.num_messages = 2 * self.layout.refresh + 1

    @property
    def is_used(self) -> bool:
        """Whether something is in use."""
        return self.state.num_messages >= 2 * self.layout.refresh

    def begin_message(self) -> None:
        """Where a period begins, takes what has arrived into use and sends what was computed on its way."""
        state, own = self.state, self.state.own
        period, place = divmod(state.num_messages, self.layout.refresh)
        if place or not period:
            return
        state.settle()
        if self.is_used:
            state.shared["used"].copy_(state.shared["arriving"])
            if "leaving" in own:
                self._prepare_search()
        if "analysis_CC" in own:
            own["used_analysis_CC"] = own["analysis_CC"]
        device = state.shared["used"].device
        for computed, name in (("computed", "leaving"), ("inverse_CC", "analysis_CC")):
            if computed in own:
                own[name] = own.pop(computed).to(device, non_blocking=True)

    def end_message(self) -> None:
        self.state.num_messages += 1

    def analyse(self, z_MC: torch.Tensor, counted_M: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Coordinates of rows, less the nearest anchors. The sender alone.

        z_MC        rows over their gains
        counted_M   which of them are not zero; the others stay so
        numbers     int16 [M], written: of the anchors
        """
        own = self.state.own
        y_MC = z_MC @ own["used_analysis_CC"] if self.layout.has_basis else z_MC.clone()
        anchors = self.layout.anchors(self.state.shared["used"])
        if anchors is not None:
            search = Search(*(own[f"search_{name}"] for name in Search._fields))
            number_M = search.find_nearest(y_MC)
            numbers.copy_(number_M)
            y_MC -= anchors.take(number_M)
            y_MC *= counted_M[:, None]
        return y_MC

    def synthesise(
        self,
        r_MC: torch.Tensor,
        bound_C: torch.Tensor,
        numbers: torch.Tensor,
        multiply: Callable[..., torch.Tensor] | None,
    ) -> torch.Tensor:
        """fp32 [M, C]: rows over their gains, of what is coded of their coordinates. Overwrites `r_MC`.

        bound_C    of the magnitudes of r, equal at both ends
        numbers    int16 [M]: of the anchors
        multiply   as of `eigenbasis.synthesise`
        """
        used = self.state.shared["used"]
        anchors, basis = self.layout.anchors(used), self.layout.basis(used)
        if anchors is not None:
            r_MC += anchors.take(numbers.long())
            bound_C = bound_C + anchors.bounds
        return r_MC if basis is None else eigenbasis.synthesise(basis, r_MC, bound_C, multiply)

    def learn_(self, z_MC: torch.Tensor) -> None:
        """Adds a sample of a message's rows, over their gains, to those that are learned from. The sender
        alone."""
        num_slots, refresh, state = self.layout.rows_per_message, self.layout.refresh, self.state
        step = max(1, len(z_MC) // num_slots)
        z_SC = z_MC[state.num_messages % step : step * num_slots : step]
        if "rows_RC" not in state.host:
            state.host["rows_RC"] = self._new_rows(z_MC.device).zero_()
        place = (state.num_messages - refresh // 2 - 1) % refresh
        slots_SC = state.host["rows_RC"][place * num_slots :][:num_slots]
        slots_SC[len(z_SC) :].zero_()
        slots_SC[: len(z_SC)].copy_(z_SC, non_blocking=True)
        if place == refresh - 1:
            thread = ThreadPoolExecutor(1)
            row_RC = state.host.pop("rows_RC")
            pins = is_asynchronous(z_MC.device)
            state.pending = thread.submit(compute, row_RC, mark(z_MC.device), self.layout, pins)
            thread.shutdown(wait=False)
            state.host["rows_RC"] = self._new_rows(z_MC.device)

    def put_slice_(self, section: torch.Tensor) -> None:
        """Writes the slice that travels with this message. The sender alone."""
        if "leaving" in self.state.own:
            own = self._slice(self.state.own["leaving"])
            section[: len(own)].copy_(own)
        self.take_slice_(section)

    def take_slice_(self, section: torch.Tensor) -> None:
        """Keeps the slice that came with this message."""
        place = self._slice(self.state.shared["arriving"])
        place.copy_(section[: len(place)])

    def _slice(self, learned: torch.Tensor) -> torch.Tensor:
        number, size = self.state.num_messages % self.layout.refresh, self.layout.slice_nbytes
        return learned[number * size :][:size]

    def _prepare_search(self) -> None:
        anchors = self.layout.anchors(self.state.shared["used"])
        if anchors is not None:
            search = prepare_search(anchors)
            self.state.own |= {f"search_{name}": tensor for name, tensor in search._asdict().items()}

    def _new_rows(self, device: torch.device) -> torch.Tensor:
        """On the CPU, pinned for copies from a GPU."""
        shape = self.layout.rows_per_message * self.layout.refresh, self.layout.num_coordinates
        pins = is_asynchronous(device)
        return torch.empty(shape, dtype=torch.bfloat16, device="cpu", pin_memory=pins)


def compute(
    row_RC: torch.Tensor, wait: Callable[[], None], layout: Layout, pins: bool
) -> dict[str, torch.Tensor]:
    """What is learned of rows, and the inverse of the basis, on the CPU; pinned, so that nothing waits for a
    copy to a GPU. Rows of zeros are no rows."""
    wait()
    z_RC = row_RC[row_RC.any(1)].float()
    learned = torch.zeros(layout.nbytes, dtype=torch.int8)
    basis, anchors = layout.basis(learned), layout.anchors(learned)
    found = {"computed": learned}
    if anchors is None:
        centre_KC, nearest_R = z_RC.mean(0, keepdim=True), torch.zeros(len(z_RC), dtype=torch.int64)
    else:
        centre_KC, nearest_R = find_anchors(z_RC, layout.num_anchors)
    if basis is not None:
        for rows_r in torch.arange(len(z_RC)).split(ROWS_AT_ONCE):
            z_RC[rows_r] -= centre_KC[nearest_R[rows_r]]
        found["inverse_CC"] = basis.write_(z_RC.T @ z_RC)
        centre_KC = centre_KC @ found["inverse_CC"]
    if anchors is not None:
        anchors.write_(centre_KC)
    return {name: tensor.pin_memory() for name, tensor in found.items()} if pins else found
