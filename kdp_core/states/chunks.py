"""The chunk files of a Zarr array: the check that each file is complete, and files that two arrays share.

If the file of a chunk is missing, Zarr reads zeros (zarr-developers/zarr-python#486). A file may be missing after an
exceeded quota or an interrupted copy. Arrays are therefore written with every chunk, all zeros included, and without
compression, so that every file has one size. Before an array is read, its files are measured.

Such a file holds the bytes of the chunk and nothing else. The large arrays are therefore written and read as plain
files. Zarr needs 1 to 2 ms for a chunk of 1 MB, and the file system needs a small part of this time.
"""
import itertools
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

PLAIN: dict[str, Any] = {"compressors": None, "config": {"write_empty_chunks": True}}
"""Arguments with which an array must be created."""


class LostChunk(RuntimeError):
    """A part of an array is not on disk."""


def whole(array: zarr.Array) -> np.ndarray:
    """All values. Raises LostChunk."""
    check(array, range(array.cdata_shape[0]))
    return array[:]


def write(array: zarr.Array, place: tuple[int, ...], values: np.ndarray) -> None:
    """Write the chunk at `place`, with the bytes that Zarr would write. A part beyond the end of the array is zero."""
    if values.shape != array.chunks:
        padded = np.zeros(array.chunks, values.dtype)
        padded[tuple(map(slice, values.shape))] = values
        values = padded
    file = _file(array, place)
    file.parent.mkdir(parents=True, exist_ok=True)
    # the error of ndarray.tofile would not say why the disk refused to write
    file.write_bytes(np.ascontiguousarray(values, array.dtype.newbyteorder("<")).data)


def floats(array: zarr.Array, place: int) -> Tensor:
    """The values at one place of the first axis as float32, chunk by chunk. Raises LostChunk."""
    first, inside = divmod(place, array.chunks[0])
    check(array, [first])
    # unlike torch, NumPy requests large pages from the system; a warm read spends most of its time on new pages
    found = torch.from_numpy(np.empty(array.shape[1:], np.float32))
    chunk = np.empty(array.chunks, array.dtype.newbyteorder("<"))
    for later in np.ndindex(array.cdata_shape[1:]):
        with _file(array, (first, *later)).open("rb", buffering=0) as file:
            file.readinto(chunk)
        target = found[tuple(slice(number * size, (number + 1) * size)
                             for number, size in zip(later, array.chunks[1:], strict=True))]
        target.copy_(torch.from_numpy(chunk[inside])[tuple(map(slice, target.shape))])
    return found


def check(array: zarr.Array, places: Iterable[int]) -> None:
    """Raise LostChunk if a chunk at one of these places of the first axis is missing or cut short."""
    size = math.prod(array.chunks) * array.dtype.itemsize
    for place in itertools.product(places, *map(range, array.cdata_shape[1:])):
        file = _file(array, place)
        if (found := file.stat().st_size if file.is_file() else 0) != size:
            raise LostChunk(f"{file} holds {found} bytes of {size}, so values are lost; delete {array.store.root} and "
                            "make it again")


def link(part: zarr.Array, whole: zarr.Array, before: int) -> None:
    """Link every chunk file of a part to its name in the whole array, `before` chunks later along the second axis."""
    check(part, range(part.cdata_shape[0]))
    for first, second, *rest in np.ndindex(part.cdata_shape):
        source, target = _file(part, (first, second, *rest)), _file(whole, (first, before + second, *rest))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            # some parallel file systems allow links only within one folder
            shutil.copyfile(source, target)


def _file(array: zarr.Array, place: tuple[int, ...]) -> Path:
    return array.store.root / array.path / array.metadata.encode_chunk_key(place)
