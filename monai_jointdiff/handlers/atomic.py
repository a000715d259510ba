# Copyright (c) MONAI-JointDiff Contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Files that are either whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["atomic_save", "atomic_write_bytes", "atomic_write_text", "sweep_partial_files"]

PARTIAL = re.compile(r"^\..+\.\d+\.partial$")  # .<final name>.<process id>.partial


def atomic_save(obj: Any, path: str | os.PathLike) -> Path:
    """`torch.save` that never leaves a broken file under its final name.

    The content goes to a file beside, is flushed to the disk, and takes the final name in one step (`os.replace`). A
    process killed at any moment leaves the former file whole, and at most one partial file
    (:func:`sweep_partial_files`). The bytes depend only on the content, not on the name.

    Args:
        obj: tensors, numbers, strings and containers of them, so that `torch.load(..., weights_only=True)` reads it.
        path: final name; its folder is made if it is missing.

    Returns:
        the final path.
    """
    return _atomic_write(path, lambda stream: torch.save(obj, stream))


def atomic_write_bytes(path: str | os.PathLike, content: bytes) -> Path:
    """Write a file in one step, see :func:`atomic_save`.

    Args:
        path: final name; its folder is made if it is missing.
        content: of the file.

    Returns:
        the final path.
    """
    return _atomic_write(path, lambda stream: stream.write(content))


def atomic_write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a UTF-8 text file in one step, see :func:`atomic_save`.

    Args:
        path: final name; its folder is made if it is missing.
        text: the content; line ends are written as they are.

    Returns:
        the final path.
    """
    return atomic_write_bytes(path, text.encode("utf-8"))


def sweep_partial_files(directory: str | os.PathLike) -> list[Path]:
    """Remove what killed processes left half written in a folder.

    Args:
        directory: searched without its subfolders; nothing happens when it does not exist.

    Returns:
        the removed files, sorted.
    """
    folder = Path(directory)
    stale = sorted(path for path in folder.glob(".*.partial") if PARTIAL.match(path.name)) if folder.is_dir() else []
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def _atomic_write(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> Path:
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_directory(final.parent)
    return final


def _sync_directory(directory: Path) -> None:
    """Make the renaming itself durable; only POSIX systems can open a folder for that."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
