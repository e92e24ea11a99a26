"""Text as tokens: read through a memory map, cut into windows, drawn in a seeded order.

Without a path the corpus is the Python standard library's own sources, which every machine has.
"""

import hashlib
import os
import stat
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

TEXT_SUFFIXES = {".txt", ".py", ".md", ".rst", ".json", ".c", ".h", ".html", ".csv", ".tex"}
TOKEN_DTYPES = {".u8": np.uint8, ".u16": np.uint16, ".u32": np.uint32}
VALIDATION_SHARE = 0.05


def text_files(path: Path | None) -> list[Path]:
    """The files that make up the corpus, in a fixed order."""
    if path is None:
        return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in TEXT_SUFFIXES)
    return [path]


def tokens(path: Path | None, tokenizer: Path | Tokenizer | None = None) -> tuple[np.ndarray, int]:
    """(memory-mapped 1-d array of token numbers, vocabulary size).

    path        folder or file of text, or a flat file of numbers: .u8, .u16 or .u32; None: see above
    tokenizer   of the tokenizers library, or its JSON file; None: the tokens are bytes
    Text is encoded once and kept in `cache_folder()`.
    """
    if path is not None and not path.exists():
        raise ValueError(f"--data = {str(path)!r}: no such file or folder")
    if path is not None and path.suffix in TOKEN_DTYPES:
        numbers = np.memmap(path, TOKEN_DTYPES[path.suffix], mode="r")
        return numbers, int(numbers.max()) + 1
    files = text_files(path)
    if not files:
        raise ValueError(f"--data = {str(path)!r}: no text in it; accepted: {sorted(TEXT_SUFFIXES)}")
    encoder = Tokenizer.from_file(str(tokenizer)) if isinstance(tokenizer, Path) else tokenizer
    stamp = repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
    stamp += "" if encoder is None else encoder.to_str()
    digest = hashlib.sha256(stamp.encode()).hexdigest()[:16]
    suffix, dtype = (".u8", np.uint8) if tokenizer is None else (".u32", np.uint32)
    cached = cache_folder() / f"{digest}{suffix}"
    if not cached.exists():
        _write(cached, files, encoder, dtype)
    vocabulary = 256 if encoder is None else encoder.get_vocab_size()
    return np.memmap(cached, dtype, mode="r"), vocabulary


def cache_folder() -> Path:
    """`clapping_ds` in XDG_CACHE_HOME (default: ~/.cache), made for this user alone if it is not there.

    ValueError if another user owns it, or may write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "clapping_ds"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    owners = {folder.lstat().st_uid, folder.stat().st_uid}  # of a symbolic link, and of where it leads
    mode = stat.S_IMODE(folder.stat().st_mode)
    if owners != {os.geteuid()} or mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"{str(folder)!r}, the folder for encoded text: owner {sorted(owners)}, mode {mode:04o}; "
            f"accepted: owner [{os.geteuid()}], writable by no one else (XDG_CACHE_HOME names another place)"
        )
    return folder


def _write(cached: Path, files: list[Path], encoder: Any, dtype: type) -> None:
    """Encodes the files into a new file; the rename makes a half-written one impossible to see."""
    with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as new:
        for path in files:
            content = path.read_bytes()
            if encoder is None:
                new.write(content)
            else:
                ids = encoder.encode(content.decode("utf-8", errors="replace")).ids
                new.write(np.asarray(ids, dtype).tobytes())
    Path(new.name).rename(cached)


class Windows:
    """Micro-batches of consecutive tokens, from the training or the validation part of a corpus.

    Equal arguments give equal batches, so the first and the last stage each make their own.
    """

    def __init__(self, corpus: np.ndarray, length: int, batch_size: int, validation: bool) -> None:
        cut = int(len(corpus) * (1 - VALIDATION_SHARE))
        self.part = corpus[cut:] if validation else corpus[:cut]
        self.length = length
        self.batch_size = batch_size
        if len(self.part) <= length:
            raise ValueError(f"the corpus has {len(corpus)} tokens; accepted: more than {20 * length}")

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless (inputs, labels), int64 [batch_size, length] each; labels are one token further."""
        generator = np.random.default_rng(seed)
        while True:
            starts = generator.integers(0, len(self.part) - self.length, self.batch_size)
            windows = np.stack([self.part[start : start + self.length + 1] for start in starts])
            window_BT = torch.from_numpy(windows.astype(np.int64))
            yield window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous()
