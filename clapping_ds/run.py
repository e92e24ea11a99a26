"""`python -m clapping_ds.run script.py ...`: runs a DeepSpeed script, unchanged, with clapping enabled.

With the launcher: `deepspeed --module clapping_ds.run script.py --deepspeed_config ds_config.json`.
"""

import runpy
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import clapping_ds

USAGE = "usage: python -m clapping_ds.run script.py [arguments of the script]"


def prepare_script(arguments: Sequence[str], usage: str) -> None:
    """Sets arguments and path as Python does for the script `arguments[0]`: what is imported from now on is
    found beside it first. Exits with `usage` if there is no such file."""
    if not arguments:
        raise SystemExit(usage)
    if not Path(arguments[0]).is_file():
        raise SystemExit(f"script = {arguments[0]!r}: no such file; {usage}")
    sys.argv = [*arguments]
    sys.path[0] = str(Path(arguments[0]).resolve().parent)


def run_prepared_script() -> None:
    """As `__main__`."""
    runpy.run_path(sys.argv[0], run_name="__main__")


def main(arguments: Sequence[str]) -> None:
    """The launcher's `--local_rank=N`, which stands before the script, is handed on behind it."""
    options = [*takewhile(lambda argument: argument.startswith("--local_rank"), arguments)]
    script = arguments[len(options) :]
    prepare_script([*script[:1], *(options if script else []), *script[1:]], USAGE)
    clapping_ds.enable()
    run_prepared_script()


if __name__ == "__main__":
    main(sys.argv[1:])
