"""Files that are there whole or not at all, also after a power cut, and what is said of a disk that takes no more."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

LOCK = ".lock"  # in a run's folder: held by the process that writes there, and let go by the system when that ends
REFUSALS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}  # a disk's or a folder's, whatever was to be written there


def write(file: Path, content: bytes) -> None:
    """Write a file; whoever reads it finds the old content or the new one."""
    aside = file.with_name(f".{file.name}.partial")
    try:
        aside.write_bytes(content)
        sync(aside)
        aside.replace(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(file.parent)


def append(file: Path, line: str) -> None:
    """Add a line to a file; where the disk takes but a part of it, none is left."""
    with file.open("ab", buffering=0) as opened:  # or closing it would try the rest again
        before, left = opened.tell(), line.encode() + b"\n"
        try:
            while left:
                left = left[opened.write(left) :]
            os.fsync(opened.fileno())
        except OSError:
            with suppress(OSError):
                opened.truncate(before)
            raise
    if not before:
        sync(file.parent)


def sync(path: Path) -> None:
    """Wait until the disk holds a file's content, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """The same for all that is in a folder, and for the folder."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def delete(folder: Path) -> None:
    """Delete a folder: under its name it is there whole until it is not there at all."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder, so that no other process trains there; to hold it twice in one process is an error too.

    Raises:
        ValueError: another process holds it.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"output_dir: another aegpo train is at work in {folder}; let it end, or give another --output-dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def refuse_unwritable(folder: Path) -> None:
    """Raise ValueError where a folder, or the one that it is to be made in, takes no file."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir: {there} may not be written to; make it writable, or give another --output-dir")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What safetensors says of a disk that takes no more becomes the OSError that it is, of this path."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
