"""Writes the weight files of a checkpoint: either shards of limited size, or one file for each layer, which checkpoints
share by hard links.

Pruned models of the same dense model differ in few layers. With shared files, each layer is in a separate file. If two
checkpoints contain the same layer under the same number, the files of this layer have the same bytes. The folders of
both checkpoints then link to one file on disk. Each folder stays an ordinary checkpoint: a copied, packed or uploaded
folder contains all its weights, and deleting a folder does not damage other checkpoints. The files are read-only, so
that no program changes a shared file by accident.

The folder POOL, which is next to the checkpoints, contains another link to each file. The name of this link is the
file's hash, by which later checkpoints find the file. A file that is in no checkpoint is deleted when the next
checkpoint is written.
"""
import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from kdp_core.base import store

POOL = ".shared"
INDEX = "model.safetensors.index.json"
HEAD = {"format": "pt"}
"""The metadata that transformers requires of a weight file."""
READ_ONLY = 0o444


def write(tensors: dict[str, Tensor], folder: Path, shard_size: str) -> None:
    """Write shards of at most `shard_size`, and an index if there are several shards."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_size)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / filename, metadata=HEAD)
    if split.is_sharded:
        _write_index(folder, split.metadata, split.tensor_to_filename)


def write_shared(tensors: dict[str, Tensor], folder: Path, pool: Path, prefix: str) -> None:
    """Write one file for each layer, one file for the stand-ins, and one file for all other tensors. If the pool
    already contains a file with the same content, the checkpoint gets a link to that file.

    prefix: the beginning of the names of the layers' tensors, such as `model.layers.`.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(tensors):
        groups.setdefault(_group(name, prefix), []).append(name)
    pool.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, group in enumerate(sorted(groups), start=1):
        filename = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        content = save({name: tensors[name].contiguous() for name in groups[group]}, metadata=HEAD)
        _place(content, folder / filename, pool)
        files |= dict.fromkeys(groups[group], filename)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_index(folder, {"total_size": size}, files)
    _sweep(pool)


def share(folder: Path, pool: Path, prefix: str) -> None:
    """Write the weights of a checkpoint again, as one file for each layer, so that other checkpoints can share these
    files."""
    old = sorted(folder.glob("*.safetensors"))
    tensors = {}
    for path in old:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    for path in old:
        path.unlink()
    write_shared(tensors, folder, pool, prefix)


def link_or_copy(source: str, target: str) -> None:
    """A copy function for `shutil.copytree`: shared weight files are linked, and all other files are copied."""
    if source.endswith(".safetensors") and not os.stat(source).st_mode & 0o222:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)


def _group(name: str, prefix: str) -> str:
    """The group of a tensor. Sorted by name, the groups are: tensors outside the layers, the layers by number, the
    stand-ins."""
    if not name.startswith(prefix):
        return "stand-ins" if ".stand_in" in name or "head_adapter" in name else "a"
    return "stand-ins" if ".stand_in" in name else f"layer {int(name[len(prefix):].split('.')[0]):05d}"


def _place(content: bytes, path: Path, pool: Path) -> None:
    """Create a file with this content at `path`. If the pool has a file with this content, the new file is a hard link
    to that file, where hard links are possible."""
    kept = pool / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    # another process may delete the pool's file, and some file systems do not support links
    with contextlib.suppress(OSError):
        os.link(kept, path)
        return
    path.write_bytes(content)
    path.chmod(READ_ONLY)
    try:
        os.link(path, kept)
    except FileExistsError:
        # another process has placed the same content in the meantime
        spare = path.with_suffix(".link")
        with contextlib.suppress(OSError):
            os.link(kept, spare)
            spare.replace(path)
    except OSError:
        pass


def _sweep(pool: Path) -> None:
    """Delete the files of the pool that are in no checkpoint."""
    for path in pool.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_nlink == 1:
                path.unlink()


def _write_index(folder: Path, metadata: Any, files: dict[str, str]) -> None:
    store.write_json(folder / INDEX, {"metadata": metadata, "weight_map": files})

