"""Before the first message: every rank has the same configuration and versions, or all raise one error; and
what no host, or no host with a schedule of its own, can do is refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from clapping_ds.config import BLOCK_NAME, ClappingConfig
from clapping_ds.link.groups import gather, rank
from clapping_ds.report import say
from clapping_ds.version import __version__

PACKAGES = ("torch", "triton", "deepspeed", "megatron-core")
Result = TypeVar("Result")


def agree_on_config(ds_config: Mapping[str, Any], facts: Mapping[str, Any]) -> ClappingConfig:
    """The configuration that every rank read; without a block, one that is not enabled, on every host. A
    collective of all ranks.

    facts   what else must be the same everywhere, by the name that an error shall have for it
    Raises ValueError on every rank, with the same text, if one rank's block is wrong or if ranks differ.
    """
    config = check_on_every_rank(lambda: ClappingConfig.from_ds_config(ds_config))
    check_equal({**dict(_flatten(BLOCK_NAME, config.model_dump())), **_list_versions(), **facts})
    if not config.enabled and rank() == 0:
        why = '"enabled": false' if BLOCK_NAME in ds_config else f'no "{BLOCK_NAME}" block'
        say(f"nothing is compressed ({why})")
    return config


def check_on_every_rank(check: Callable[[], Result]) -> Result:
    """What `check` returns. If it raises ValueError or OSError on any rank, every rank raises ValueError,
    with the same text. A collective of all ranks."""
    result, mistake = None, None
    try:
        result = check()
    except (ValueError, OSError) as error:
        mistake = str(error)
    mistakes = gather(mistake)
    if any(mistakes):
        raise ValueError("\n".join(_grouped(mistakes)))
    return result  # type: ignore[return-value]


def check_equal(facts: Mapping[str, Any]) -> None:
    """Raises ValueError on every rank, with the same text, if ranks differ in a fact. A collective of all
    ranks. facts: by the name that an error shall have for it."""
    found = gather(dict(facts))
    names = dict.fromkeys(name for rank in found for name in rank)
    differences = [
        f"{name}: " + "; ".join(_grouped([repr(rank.get(name)) for rank in found]))
        for name in names
        if any(rank.get(name) != found[0].get(name) for rank in found)
    ]
    if differences:
        raise ValueError("\n".join(["the ranks differ; accepted: the same everywhere", *differences]))


def _grouped(texts: Sequence[str | None]) -> list[str]:
    """Each text once, with the ranks that it is of, unless it is of all."""
    lines = []
    for text in dict.fromkeys(text for text in texts if text is not None):
        ranks = [number for number, other in enumerate(texts) if other == text]
        where = "" if len(ranks) == len(texts) else f" (rank {', '.join(map(str, ranks))})"
        lines.append(text + where)
    return lines


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}", inner)
    else:
        yield prefix, value


def _list_versions() -> dict[str, str]:
    found = {"clapping_ds": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {f"version of {package}": number for package, number in found.items()}


def refuse_without_links(config: ClappingConfig, found: str, num_ranks: int) -> None:
    """Raises ValueError for a pipeline on one rank. found: what has so few, with its value."""
    if config.enabled and num_ranks < 2:
        raise ValueError(
            f'"{BLOCK_NAME}" block with {found}: there is no link to compress; accepted: at least 2, or '
            f'"{BLOCK_NAME}": {{"enabled": false}}'
        )


def refuse_tuning(config: ClappingConfig, host: str) -> None:
    """Raises ValueError for what a host whose schedule is its own cannot follow: a depth, chosen links."""
    if config.in_flight not in ("auto", 0):
        raise ValueError(
            f"{BLOCK_NAME}.in_flight = {config.in_flight} with {host}, which has a schedule of its own; "
            "accepted: 'auto', or 0"
        )
    if config.links is not None:
        links = config.links.model_dump(exclude_defaults=True) or "auto"
        raise ValueError(
            f"{BLOCK_NAME}.links = {links!r} with {host}, whose links are not measured; accepted: null"
        )
