"""What one rank saves of its memories and held batches beside a host's checkpoint: a file of its own."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from clapping_ds.link.groups import rank


def path_in(folder: Path) -> Path:
    """This rank's file in a checkpoint's folder."""
    return folder / f"clapping_rank_{rank():05d}.pt"


def write(state: dict[str, Any], folder: Path) -> None:
    """Writes this rank's file in one piece: it is there as a whole, or as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    file = path_in(folder)
    unfinished = file.with_name(f"{file.name}.unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, file)


def read(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """This rank's state; None where there is no file, or none that can be read. As hosts do with their own
    files, it loads whatever objects held batches are made of: a checkpoint must come from who is trusted."""
    try:
        state: dict[str, Any] = torch.load(path_in(folder), map_location=device, weights_only=False)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return None
    return state
