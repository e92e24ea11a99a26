"""What one rank saves of its memories and held batches beside a host's checkpoint: a file of its own."""

import os
from pathlib import Path
from typing import Any

import torch

from clapping_ds.link.groups import rank
from clapping_ds.report import say


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


def read(folder: Path) -> dict[str, Any] | None:
    """This rank's state, mapped from the file: its owners copy tensor by tensor to where each belongs.

    None where there is no file, or none that can be read, which this rank then says: the others must not
    wait for it. As hosts do with their own files, it loads whatever objects held batches are made of: a
    checkpoint must come from who is trusted.
    """
    file = path_in(folder)
    if not file.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # whatever a broken file, or a class that is gone, raises
        say(f"rank {rank()} cannot read {file} ({type(error).__name__}: {error})")
        return None
    return state
