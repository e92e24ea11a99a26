"""clapping_ds: compressed communication between pipeline stages, for slow links.

Importing it changes nothing. The names below import their host when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clapping_ds.version import __version__ as __version__

if TYPE_CHECKING:
    from clapping_ds.config import ClappingConfig
    from clapping_ds.hosts.deepspeed.attach import attach
    from clapping_ds.hosts.deepspeed.enable import enable, initialize
    from clapping_ds.hosts.megatron.pipeline import MegatronPipeline
    from clapping_ds.hosts.torch.gradients import compress_gradients
    from clapping_ds.hosts.torch.pipeline import ClappingPipeline
    from clapping_ds.hosts.torch.stage import ClappingStage

_HOMES = {
    "ClappingConfig": "clapping_ds.config",
    "attach": "clapping_ds.hosts.deepspeed.attach",
    "enable": "clapping_ds.hosts.deepspeed.enable",
    "initialize": "clapping_ds.hosts.deepspeed.enable",
    "MegatronPipeline": "clapping_ds.hosts.megatron.pipeline",
    "ClappingPipeline": "clapping_ds.hosts.torch.pipeline",
    "ClappingStage": "clapping_ds.hosts.torch.stage",
    "compress_gradients": "clapping_ds.hosts.torch.gradients",
}
__all__ = [
    "ClappingConfig",
    "ClappingPipeline",
    "ClappingStage",
    "MegatronPipeline",
    "attach",
    "compress_gradients",
    "enable",
    "initialize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
