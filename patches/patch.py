"""One symbol of a host, replaced at run time: checked first, marked, and put back by `undo`."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from packaging.version import Version

MARK = "__clapping_patch__"


class Patch:
    """Replaces `owner.name` by `replacement(original)`.

    replacement  of the original, the function in its place
    signatures   the parameters that the original must have, as `inspect` lists their names: one of these
    """

    def __init__(
        self, owner: Any, name: str, replacement: Callable[[Any], Callable[..., Any]], *signatures: str
    ) -> None:
        self.owner = owner
        self.name = name
        self.replacement = replacement
        self.signatures = signatures

    def check(self) -> None:
        """Raises ImportError if the host's symbol is missing, or is not the one that is known."""
        symbol = f"{self.owner.__name__}.{self.name}"
        found = getattr(self.owner, self.name, None)
        if found is None:
            raise ImportError(f"{symbol} is missing")
        if self.is_applied:
            return
        parameters = ", ".join(inspect.signature(found).parameters)
        if parameters not in self.signatures:
            accepted = " or ".join(f"({signature})" for signature in self.signatures)
            raise ImportError(f"{symbol} takes ({parameters}); accepted: {accepted}")

    @property
    def is_applied(self) -> bool:
        return hasattr(getattr(self.owner, self.name), MARK)

    def apply(self) -> None:
        """Applying it again changes nothing."""
        self.check()
        if not self.is_applied:
            original = getattr(self.owner, self.name)
            new = self.replacement(original)
            setattr(new, MARK, original)
            setattr(self.owner, self.name, new)

    def undo(self) -> None:
        """Puts the original back. Undoing what is not applied changes nothing."""
        original = getattr(getattr(self.owner, self.name), MARK, None)
        if original is not None:
            setattr(self.owner, self.name, original)


def check_version(package: str, found: str, accepted: Sequence[str]) -> None:
    """Raises ImportError unless the version is of one of the `accepted` releases: 0.19.8+cpu is of 0.19."""
    release = Version(found).release
    if not any(release[: len(known)] == known for known in (Version(each).release for each in accepted)):
        raise ImportError(f"{package} {found} is not known to this patch; accepted: {', '.join(accepted)}")
