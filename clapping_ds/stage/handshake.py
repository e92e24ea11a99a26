"""Before the first message: every rank has the same configuration and versions, or all raise one error; and
what no host, or no host with a schedule of its own, can do is refused.
"""

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from clapping_ds.config import BLOCK_NAME, ClappingConfig
from clapping_ds.link.groups import Control, rank
from clapping_ds.report import say
from clapping_ds.version import __version__

PACKAGES = ("torch", "triton", "deepspeed", "megatron-core")

Source = Mapping[str, Any] | str | Path
"""What has the block, or its file."""


def read_source(source: Source) -> Mapping[str, Any]:
    """Raises OSError or ValueError for a file that is missing, or no JSON object."""
    block = source
    if not isinstance(source, Mapping):
        try:
            block = json.loads(Path(source).read_text())
        except ValueError as error:
            raise ValueError(f"{source} is no JSON ({error})") from error
    if not isinstance(block, Mapping):
        raise ValueError(f'{source} is no JSON object; accepted: {{"{BLOCK_NAME}": {{...}}}}')
    return block


def agree_on_config(
    read: Callable[[], Mapping[str, Any]], facts: Mapping[str, Any], device: torch.device
) -> tuple[ClappingConfig, Control]:
    """The configuration that every rank read (without a block, one that is not enabled, on every host), and
    the means to agree on more. A collective of all ranks, which needs no device.

    read     returns what has the block, or raises ValueError or OSError
    facts    what else must be the same everywhere, by the name that an error shall have for it
    device   where this rank will compute
    Raises ValueError on every rank, with the same text, if one rank's block is wrong, if ranks differ, or if
    a rank has no such device. Raises ConnectionError if a rank is missing.
    """
    read = cache(read)
    control = Control(_find_timeout_s(read))
    config = control.check(lambda: ClappingConfig.from_ds_config(read()))
    control.check_equal({**dict(_flatten(BLOCK_NAME, config.model_dump())), **_list_versions(), **facts})
    if config.enabled:
        control.check(lambda: _check_device(device))
    if not config.enabled and rank() == 0:
        why = '"enabled": false' if BLOCK_NAME in read() else f'no "{BLOCK_NAME}" block'
        say(f"nothing is compressed ({why})")
    return config, control


def _find_timeout_s(read: Callable[[], Mapping[str, Any]]) -> float:
    """The block's, while it is not known whether the block is right."""
    try:
        return ClappingConfig.from_ds_config(read()).timeout_s
    except (ValueError, OSError):
        return ClappingConfig().timeout_s


def _check_device(device: torch.device) -> None:
    num_gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ValueError(
            f"device = {device} on {socket.gethostname()}, which has {num_gpus} GPUs; accepted: as many "
            "ranks on a node as it has GPUs"
        )


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
    if config.enabled and config.data_parallel is None and num_ranks < 2:
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
