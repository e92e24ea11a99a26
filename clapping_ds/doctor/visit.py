"""How checks are run on every rank, and what is made of their findings.

A check is a function that returns a `Finding`. All ranks run the same checks in the same order, and after
each one tell each other what they found. They do that in the launcher's store, not in a process group, which
is what is being checked. So a check that fails on one rank, in whatever way, leaves no other rank waiting.
"""

import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import torch

from clapping_ds.config import ClappingConfig
from clapping_ds.link.groups import Control, open_store

LEAST_PATIENCE_S = 60.0
"""Of a check, however short `timeout_s` is: something is imported in it, or a process started."""
LINGER_S = 2.0
"""How long the rank that has the store stays for the others to read it."""
POLL_S = 0.02
MOST_TEXTS = 8


class Status(IntEnum):
    """From the lightest to the worst."""

    SKIP = 0
    OK = 1
    WARN = 2
    FAIL = 3

    def __str__(self) -> str:
        return "FAIL" if self is Status.FAIL else self.name.lower()


class Finding(NamedTuple):
    """What a check has found on one rank, or on all."""

    status: Status
    text: str
    advice: str = ""
    """What to do about it."""
    facts: Any = None
    """What the ranks' findings are compared by, and what later checks need of all ranks."""

    def __str__(self) -> str:
        return " ".join((f"{self.text}: {self.advice}" if self.advice else self.text).split())


def ok(text: str, facts: Any = None) -> Finding:
    return Finding(Status.OK, text, facts=facts)


def skip(text: str, facts: Any = None) -> Finding:
    return Finding(Status.SKIP, text, facts=facts)


def warn(text: str, advice: str, facts: Any = None) -> Finding:
    return Finding(Status.WARN, text, advice, facts)


def fail(text: str, advice: str, facts: Any = None) -> Finding:
    return Finding(Status.FAIL, text, advice, facts)


def sum_up(text: str, problems: Sequence[Finding], facts: Any = None) -> Finding:
    """One finding of a check that looks at several things: `text`, and what is wrong."""
    if not problems:
        return ok(text, facts)
    status = max(problem.status for problem in problems)
    return Finding(status, "; ".join([text, *map(str, problems)]), facts=facts)


class Launch(NamedTuple):
    """What the launcher has told this process."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    address: str | None = None
    """MASTER_ADDR. None: there is no launcher, and one rank."""
    port: int = 0


class Board:
    """Where ranks tell each other what they found. store: as `open_store` gives it."""

    def __init__(self, store: Any, rank: int = 0, world_size: int = 1) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.prefix = f"clapping_doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

    def gather(self, name: str, item: Any, timeout_s: float) -> list[Any]:
        """What every rank passed under a name that is new, in the order of ranks. Raises ConnectionError,
        with the same text on every rank that is there, if one is missing after so long."""
        try:
            self.store.set(self._key(name, self.rank), pickle.dumps(item))
            self._wait(name, timeout_s)
            return [pickle.loads(self.store.get(key)) for key in self._keys(name)]
        except RuntimeError as error:
            first_line = str(error).strip().split("\n")[0]
            raise ConnectionError(f"the store of the first rank is gone ({first_line})") from error

    def leave(self) -> None:
        """The last of all. The first rank waits a moment for the others."""
        try:
            self.store.set(self._key("left", self.rank), b"")
            deadline_s = time.monotonic() + (LINGER_S if self.rank == 0 else 0)
            while time.monotonic() < deadline_s and not self.store.check(self._keys("left")):
                time.sleep(POLL_S)
        except RuntimeError:
            return

    def _wait(self, name: str, timeout_s: float) -> None:
        deadline_s, gave_up = time.monotonic() + timeout_s, self._key("gave up", 0)
        while not self.store.check(self._keys(name)):
            if time.monotonic() > deadline_s:
                missing = [n for n, key in enumerate(self._keys(name)) if not self.store.check([key])]
                said = (
                    f"{name}: nothing from {_name_ranks(missing)} of {self.world_size} for {timeout_s:.3g} s"
                )
                self.store.compare_set(gave_up, "", said)
            if self.store.check([gave_up]):
                raise ConnectionError(self.store.get(gave_up).decode())
            time.sleep(POLL_S)

    def _keys(self, name: str) -> list[str]:
        return [self._key(name, number) for number in range(self.world_size)]

    def _key(self, name: str, number: int) -> str:
        return f"{self.prefix}/{name}/{number}"


def make_lone_board() -> Board:
    """Of a rank that has no other to talk to."""
    return Board(open_store(None, 0, hosts_it=True, timeout_s=1.0))


@dataclass
class Visit:
    """One run of the doctor on one rank: what checks are given, and what they have made for later ones."""

    launch: Launch = field(default_factory=Launch)
    timeout_s: float = 60.0
    """How long a rank is waited for."""
    config_path: Path | None = None
    board: Board = field(default_factory=make_lone_board)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    config: ClappingConfig | None = None
    control: Control | None = None
    facts: dict[str, list[Any]] = field(default_factory=dict)
    """By check, those of every rank."""
    findings: dict[str, Finding] = field(default_factory=dict)
    """By check, that of all ranks."""

    @property
    def is_alone(self) -> bool:
        return self.launch.world_size == 1

    @property
    def has_lost_others(self) -> bool:
        """Whether this rank goes on by itself."""
        return self.board.world_size < self.launch.world_size

    @property
    def hosts(self) -> list[str]:
        """By rank."""
        return self.facts["ranks"]


class Check(NamedTuple):
    """One line of the report.

    look      on every rank; may raise
    after     checks without which this one makes no sense: skipped where one of them is not ok or a warning
    compare   what the facts of all ranks say together, in place of what each rank said; None: nothing
    patience  times `timeout_s`: how long it may take on a rank, and the others wait for it
    """

    name: str
    look: Callable[[Visit], Finding]
    after: tuple[str, ...] = ()
    compare: Callable[[Sequence[Any]], Finding | None] | None = None
    patience: float = 3.0

    def find_patience_s(self, timeout_s: float) -> float:
        return max(LEAST_PATIENCE_S, self.patience * timeout_s)


def run_checks(checks: Sequence[Check], visit: Visit, write: Callable[[str], None]) -> bool:
    """Runs the checks and writes a line for each: the first rank for all, and a rank that has lost the others
    what failed on it. Whether nothing failed on any rank. Ends where a rank is lost between two checks."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        finding, is_last = _run_check(check, visit)
        visit.findings[check.name] = finding
        who = f"rank {visit.launch.rank}: " if visit.has_lost_others and visit.launch.rank > 0 else ""
        if visit.launch.rank == 0 or (who and finding.status is Status.FAIL):
            write(f"{who}{check.name.ljust(width)}  {str(finding.status).ljust(4)}  {finding}")
        if is_last:
            break
    return all(finding.status is not Status.FAIL for finding in visit.findings.values())


def _run_check(check: Check, visit: Visit) -> tuple[Finding, bool]:
    """What all ranks have found; and whether nothing more can be found, as a rank is lost."""
    missing = [name for name in check.after if visit.findings[name].status in (Status.SKIP, Status.FAIL)]
    mine = skip(f"needs {', '.join(missing)}") if missing else _look(check, visit)
    try:
        findings = visit.board.gather(check.name, mine, check.find_patience_s(visit.timeout_s))
    except ConnectionError as error:
        visit.board.leave()
        visit.board = make_lone_board()
        return sum_up(str(mine), [fail(str(error), "that rank may have printed why")]), True
    visit.facts[check.name] = [finding.facts for finding in findings]
    merged = merge(findings)
    if check.compare is None or missing or merged.status is Status.FAIL:
        return merged, False
    compared = check.compare(visit.facts[check.name])
    return merged if compared is None or compared.status < merged.status else compared, False


def _look(check: Check, visit: Visit) -> Finding:
    try:
        with _limited(check.name, visit.launch.rank, check.find_patience_s(visit.timeout_s)):
            return check.look(visit)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        return fail(
            f"{type(error).__name__}: {error} ({where})", "if nothing above it failed, please report it"
        )


@contextmanager
def _limited(name: str, rank: int, patience_s: float) -> Iterator[None]:
    """Ends the process where a check does not end: on a GPU nothing else may be possible."""

    def end() -> None:
        print(f"rank {rank}: {name}  FAIL  it was not done after {patience_s:g} s", flush=True)
        os._exit(1)

    timer = Timer(patience_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def merge(findings: Sequence[Finding]) -> Finding:
    """The worst of what the ranks have found, each text once, with the ranks that it is of unless it is of
    all."""
    status = max(finding.status for finding in findings)
    ranks: dict[str, list[int]] = {}
    for number, finding in enumerate(findings):
        if finding.status is status:
            ranks.setdefault(str(finding), []).append(number)
    texts = [
        text if len(of_text) == len(findings) else f"{text} ({_name_ranks(of_text)})"
        for text, of_text in ranks.items()
    ]
    more = [f"and {len(texts) - MOST_TEXTS} more"] if len(texts) > MOST_TEXTS else []
    return Finding(status, "; ".join([*texts[:MOST_TEXTS], *more]))


def _name_ranks(numbers: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(texts)}"
