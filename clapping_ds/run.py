"""`python -m clapping_ds.run script.py ...`: runs a DeepSpeed script, unchanged, with clapping enabled.

With the launcher: `deepspeed --module clapping_ds.run script.py --deepspeed_config ds_config.json`.
"""

import runpy
import sys
from pathlib import Path

from clapping_ds import enable

USAGE = "usage: python -m clapping_ds.run script.py [arguments of the script]"


def main(arguments: list[str]) -> None:
    """Runs the script as `__main__`. The launcher's `--local_rank=N`, which stands before the script,
    is handed on behind it."""
    launcher_options = []
    while arguments and arguments[0].startswith("--local_rank"):
        launcher_options.append(arguments.pop(0))
    if not arguments:
        raise SystemExit(USAGE)
    script, *rest = arguments
    if not Path(script).is_file():
        raise SystemExit(f"script = {script!r}: no such file; {USAGE}")
    enable()
    sys.argv = [script, *launcher_options, *rest]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
