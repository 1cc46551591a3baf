"""Chunk files that are written and read without Zarr hold what Zarr writes and reads."""
import numpy as np
import pytest
import torch
import zarr

from kdp_core.states import chunks

SHAPE, PARTS = (3, 7, 4, 5), {"layer": (1, 2, 4, 5), "several": (2, 3, 4, 2)}


def made(folder, name, parts, dtype):
    group = zarr.open_group(folder, mode="a", zarr_format=3)
    return group.create_array(name, shape=SHAPE, chunks=parts, dtype=dtype, **chunks.PLAIN)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_read_and_written_as_by_zarr(tmp_path, parts, dtype):
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(dtype)
    theirs, ours = (made(tmp_path, name, parts, dtype) for name in ("theirs", "ours"))
    theirs[:] = values
    for place in np.ndindex(ours.cdata_shape):
        here = tuple(slice(at * size, (at + 1) * size) for at, size in zip(place, parts, strict=True))
        chunks.write(ours, place, values[here])
    for file in (tmp_path / "theirs/c").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "ours" / file.relative_to(tmp_path / "theirs")).read_bytes()
    for place in range(SHAPE[0]):
        found = chunks.floats(theirs, place)
        assert found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(values[place]).float())


@pytest.mark.parametrize("parts", [(1, 2, 4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("which", [[0], [6, 0, 3], [5, 5, 4], list(range(7)), []])
def test_some_rows_are_those_of_the_whole_array(tmp_path, parts, which):
    values = np.random.default_rng(0).standard_normal(SHAPE).astype("float16")
    array, wanted = made(tmp_path, "states", parts, "float16"), torch.tensor(which, dtype=torch.int64)
    array[:] = values
    for place in range(SHAPE[0]):
        found = chunks.rows(array, place, wanted)
        assert found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(values[place]).float()[wanted])


def test_only_the_chunks_of_the_rows_are_read_and_a_lost_one_is_named(tmp_path):
    array = made(tmp_path, "states", PARTS["layer"], "float32")
    array[:, :4] = 1.0
    assert chunks.rows(array, 0, torch.tensor([3, 1])).eq(1).all()
    with pytest.raises(chunks.LostChunk, match="states/c/0/2/0/0 holds 0 bytes"):
        chunks.rows(array, 0, torch.tensor([3, 4]))


def test_a_lost_chunk_is_not_read(tmp_path):
    array = made(tmp_path, "states", PARTS["layer"], "float32")
    array[:2] = 1.0
    assert chunks.floats(array, 1).eq(1).all()
    with pytest.raises(chunks.LostChunk):
        chunks.floats(array, 2)
