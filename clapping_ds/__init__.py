"""clapping_ds: compressed communication between pipeline stages, for slow links.

Importing it changes nothing. The names below import their host when they are first used.
"""

from typing import Any

from clapping_ds.config import ClappingConfig

__version__ = "0.1.0"
__all__ = ["ClappingConfig", "enable", "initialize"]


def enable() -> None:
    """From now on `deepspeed.initialize` heeds the `"clapping"` block. Patches nothing else."""
    from clapping_ds.engines import deepspeed_enable

    deepspeed_enable.enable()


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Takes the place of `deepspeed.initialize`: same arguments, same result, "clapping" heeded."""
    from clapping_ds.engines import deepspeed_enable

    return deepspeed_enable.initialize(*args, **kwargs)
