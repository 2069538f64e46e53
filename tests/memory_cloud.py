"""fsspec's file system in memory, in place of a cloud."""

from collections.abc import Iterator

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class RefusedError(Exception):
    """No OSError, as botocore's NoCredentialsError is none."""


def emptied() -> Iterator[MemoryFileSystem]:
    """The file system, empty before and after."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()
