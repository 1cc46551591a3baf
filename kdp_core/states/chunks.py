"""The files of a Zarr array's chunks: the check that each file is complete, and files that two arrays share.

If the file of a chunk is missing, Zarr reads zeros (zarr-developers/zarr-python#486). A file can be missing after a
quota was exceeded or a copy was interrupted. Therefore every chunk of an array is written, even if all its values are
zero, and without compression. So all files of an array have the same size. Before an array is read, the sizes of its
files are checked.

An uncompressed file contains the bytes of its chunk and nothing else. Therefore the large arrays are written and read
directly as files. For a chunk of 1 MB, Zarr needs 1 to 2 ms, and the file system needs only a small part of this time.
"""
import itertools
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

PLAIN: dict[str, Any] = {"compressors": None, "config": {"write_empty_chunks": True}}
"""Arguments with which Zarr creates an array in this form."""


class LostChunk(RuntimeError):
    """The file of a chunk is missing or too short."""


def whole(array: zarr.Array) -> np.ndarray:
    """All values of an array. Raises LostChunk if a chunk is lost."""
    check(array, range(array.cdata_shape[0]))
    return array[:]


def write(array: zarr.Array, place: tuple[int, ...], values: np.ndarray) -> None:
    """Write the chunk at index `place` as Zarr would write it. Values beyond the end of the array are written as
    zeros."""
    if values.shape != array.chunks:
        padded = np.zeros(array.chunks, values.dtype)
        padded[tuple(map(slice, values.shape))] = values
        values = padded
    file = _file(array, place)
    file.parent.mkdir(parents=True, exist_ok=True)
    # the error of ndarray.tofile would not say why the disk refused to write
    file.write_bytes(np.ascontiguousarray(values, array.dtype.newbyteorder("<")).data)


def floats(array: zarr.Array, place: int) -> Tensor:
    """The values at index `place` of the first axis as float32, read chunk by chunk. Raises LostChunk."""
    first, inside = divmod(place, array.chunks[0])
    check(array, [first])
    # unlike torch, NumPy requests large pages from the system; a warm read spends most of its time on new pages
    found = torch.from_numpy(np.empty(array.shape[1:], np.float32))
    chunk = np.empty(array.chunks, array.dtype.newbyteorder("<"))
    # the system starts to read all files at once; one file after the other takes a quarter longer from a cold disk
    announce(_file(array, (first, *later)) for later in np.ndindex(array.cdata_shape[1:]))
    for later in np.ndindex(array.cdata_shape[1:]):
        with _file(array, (first, *later)).open("rb", buffering=0) as file:
            file.readinto(chunk)
        target = found[tuple(slice(number * size, (number + 1) * size)
                             for number, size in zip(later, array.chunks[1:], strict=True))]
        target.copy_(torch.from_numpy(chunk[inside])[tuple(map(slice, target.shape))])
    return found


def rows(array: zarr.Array, place: int, which: Tensor) -> Tensor:
    """The values at index `place` of the first axis and the indices `which` of the second axis, as float32. Only the
    chunks that contain these indices are read. The chunks must be whole on all other axes. Raises LostChunk."""
    first, inside = divmod(place, array.chunks[0])
    size = array.chunks[1]
    found = torch.from_numpy(np.empty((len(which), *array.shape[2:]), np.float32))
    chunk = np.empty(array.chunks, array.dtype.newbyteorder("<"))
    beyond = (0,) * (array.ndim - 2)
    places = [(first, number, *beyond) for number in (which // size).unique().tolist()]
    check_files(array, places)
    announce(_file(array, at) for at in places)
    for at in places:
        with _file(array, at).open("rb", buffering=0) as file:
            file.readinto(chunk)
        mine = which // size == at[1]
        found[mine] = torch.from_numpy(chunk[inside])[which[mine] % size].float()
    return found


def pieces(array: zarr.Array, place: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The values at index `place` of the first axis, chunk by chunk: pairs of indices of the second axis, and their
    values as float32. The chunks must be whole on all other axes. Raises LostChunk."""
    beyond = (0,) * (array.ndim - 2)
    announce(_file(array, (place // array.chunks[0], number, *beyond)) for number in range(array.cdata_shape[1]))
    for which in torch.arange(array.shape[1]).split(array.chunks[1]):
        yield which, rows(array, place, which)


def announce(files: Iterable[Path]) -> None:
    """Tell the operating system that these files are read soon, if it has such a call."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        with file.open("rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def check(array: zarr.Array, places: Iterable[int]) -> None:
    """Raise LostChunk if a chunk at one of these indices of the first axis is missing or too short."""
    check_files(array, itertools.product(places, *map(range, array.cdata_shape[1:])))


def check_files(array: zarr.Array, places: Iterable[tuple[int, ...]]) -> None:
    """Raise LostChunk if one of these chunks is missing or too short."""
    size = math.prod(array.chunks) * array.dtype.itemsize
    for place in places:
        file = _file(array, place)
        if (found := file.stat().st_size if file.is_file() else 0) != size:
            raise LostChunk(f"{file} holds {found} bytes of {size}, so values are lost; delete {array.store.root} and "
                            "make it again")


def link(part: zarr.Array, whole: zarr.Array, before: int) -> None:
    """Link every chunk file of `part` into the array `whole`. A chunk of `part` with number i on the second axis has
    the number i + `before` in `whole`."""
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
