"""The reference through torch's C++ compiler: the same functions, hence the same bits, in fewer passes."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

ARGUMENTS: dict[str, Any] = {
    "fullgraph": True,
    # Without it the compiler drops a rounding to a narrow dtype and back, and memories differ. It contracts
    # no multiply-adds, and keeps the order of sums that are written out.
    "options": {"emulate_precision_casts": True},
    # Kinds of arguments (dtypes, carry, shapes) per codec; not isolated, all codecs would share 8.
    "recompile_limit": 32,
    "isolate_recompiles": True,
}


class Compiled:
    """A function, compiled at its first call for each kind of arguments (10 to 20 s, then from torch's
    cache on disk). Without a C++ compiler it warns once and calls the function as it is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.run: Callable[..., Any] = torch.compile(function, **ARGUMENTS)

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self.run(*arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            # Raised while compiling, before anything is written.
            if self.run is self.function:
                raise
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"the CPU path is not compiled: {reason}", RuntimeWarning, stacklevel=2)
            self.run = self.function
            return self.function(*arguments)
