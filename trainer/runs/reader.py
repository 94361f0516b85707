"""Reading checkpoints of torch.distributed.checkpoint that somebody else may have written.

The index of such a checkpoint, `.metadata`, is a pickle, and a pickle runs what its writer wants.
Here it may name the dozen classes that an index of tensors consists of, and nothing else; entries
that are no tensors (bytes, which are pickles again) are refused. Tensors themselves are read with
torch's own `weights_only`.
"""

from __future__ import annotations

import collections
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata

_CLASSES = {
    (metadata.__name__, name): getattr(metadata, name)
    for name in (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "BytesStorageMetadata",  # it may be named, and is refused below, in words
        "_MEM_FORMAT_ENCODING",
    )
}
_CLASSES |= {
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
}
# where it was written, which nobody asks for
_CLASSES |= {(each, "PosixPath"): PurePosixPath for each in ("pathlib", "pathlib._local")}
_DTYPES = {name for name, each in vars(torch).items() if isinstance(each, torch.dtype)}


class Unsafe(Exception):
    """One line: what an index has that an index of tensors has not."""


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        raise Unsafe(f".metadata names {module}.{name}, which no index of tensors does")

    def persistent_load(self, pid: Any) -> Any:
        raise Unsafe(".metadata refers to something outside of it")


class SafeReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        found = read_index(Path(self.path))
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


def read_index(folder: Path) -> metadata.Metadata:
    try:
        with (folder / ".metadata").open("rb") as file:
            found = _Index(file).load()
    except (Unsafe, OSError):
        raise
    except Exception as error:  # a broken pickle raises what it likes
        raise Unsafe(f".metadata cannot be read ({type(error).__name__})") from None
    if not isinstance(found, metadata.Metadata):
        raise Unsafe(".metadata is no index")
    if not isinstance(found.state_dict_metadata, dict) or not isinstance(found.storage_data, dict):
        raise Unsafe(".metadata is no index")
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise Unsafe(
                f"{name} is no tensor but a pickle, as older versions wrote, and is not read"
            )
    for info in found.storage_data.values():
        place = getattr(info, "relative_path", None)
        if not isinstance(place, str) or Path(place).name != place:
            raise Unsafe(f".metadata points to {place!r}, outside of the checkpoint")
    return found
