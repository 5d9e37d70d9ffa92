"""Private folders of cached features on disk: written once, complete or absent, checked before every use.

A cache is a folder with one subfolder per key. A subfolder holds one raw file per tensor and a manifest
with the sizes and SHA-256 checksums; it appears under its name by one rename after everything in it is
durable. Features are functions of private images, so folders have mode 0700 and files 0600.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dptaft.stored_features import StoredFeatures, StoredTensor
from dptaft.tangent.operator import Features

_FORMAT = 2
_GRAMS = "grams"
_MANIFEST = "manifest.json"
_BUILDING = ".building-"
_TAG = "CACHEDIR.TAG"
# the signature is fixed by the cache directory tagging specification (bford.info/cachedir)
_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# dptaft features: functions of private images\n"


class FeatureCacheError(ValueError):
    """A feature cache is missing, damaged, in the wrong place, or cannot be written."""


def write_features(root: Path, key: str, parts: Iterable[Features], count: int) -> None:
    """Stream the features of ``count`` examples to ``root/key`` with the memory of one part.

    After a crash at any point the key is either complete or absent; what a killed process left behind is
    removed by the next writer of the key. A second writer waits for the first and then leaves its result in
    place.

    Args:
        root: folder of the cache; created with mode 0700.
        key: name of the entry, hexadecimal, from :func:`dptaft.features.feature_key`.
        parts: consecutive examples.
        count: number of examples in all parts.

    Raises:
        FeatureCacheError: no space left, a folder that cannot be written, or parts that do not sum to
        ``count``.
    """
    _check_key(key)
    try:
        with _lock(root, key):
            if not (root / key).exists():
                _write_entry(root, key, parts, count)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(root) from error
        raise FeatureCacheError(
            f"cannot write the feature cache {root}: {error.strerror}; choose another folder"
        ) from error


def read_features(root: Path, key: str) -> StoredFeatures:
    """Open ``root/key`` on disk, after checking every byte against the manifest, a little at a time.

    Raises:
        FeatureCacheError: the entry is absent, incomplete or damaged; the message names the file.
    """
    _check_key(key)
    entry = root / key
    manifest = _read_manifest(entry, key)
    files = {}
    for name, record in manifest["tensors"].items():
        files[name] = _open_tensor(entry / f"{name}.bin", record)
    grams = files.pop(_GRAMS, None)
    return StoredFeatures(files, grams)


def has_features(root: Path, key: str) -> bool:
    """Whether an entry of that key exists (it may still be damaged)."""
    _check_key(key)
    return (root / key).is_dir()


def discard_features(root: Path, key: str) -> None:
    """Delete one entry, complete or damaged; nothing happens where there is none."""
    _check_key(key)
    if (root / key).exists():
        shutil.rmtree(root / key)


def remove_cache(root: Path) -> int:
    """Delete a whole cache folder, including what a killed process left; other files in it stay.

    Returns:
        The number of bytes freed.

    Raises:
        FeatureCacheError: the folder is not a feature cache; nothing is deleted.
    """
    tag = root / _TAG
    if not tag.is_file() or tag.read_text() != _TAG_TEXT:
        raise FeatureCacheError(
            f"{root} is not a feature cache (no {_TAG} of dptaft in it); nothing was deleted"
        )
    freed = 0
    for path in root.iterdir():
        if path.is_dir() and (_is_key(path.name) or path.name.startswith(_BUILDING)):
            freed += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            shutil.rmtree(path)
        elif path.suffix == ".lock" and _is_key(path.stem):
            path.unlink()
    tag.unlink()
    if not any(root.iterdir()):
        root.rmdir()
    return freed


# ---------------------------------------------------------------------- writing


def _write_entry(root: Path, key: str, parts: Iterable[Features], count: int) -> None:
    building = root / f"{_BUILDING}{key}"
    if building.exists():  # left by a killed process: nobody else holds the lock
        shutil.rmtree(building)
    building.mkdir(mode=0o700)
    try:
        _write_manifest(building, key, count, _write_tensors(building, parts, count))
        _sync_folder(building)
        building.rename(root / key)
        _sync_folder(root)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _write_tensors(folder: Path, parts: Iterable[Features], count: int) -> dict[str, Any]:
    files: dict[str, _TensorFile] = {}
    written = 0
    with ExitStack() as opened:
        for part in parts:
            tensors = dict(part.tensors) | ({} if part.grams is None else {_GRAMS: part.grams})
            if not files:
                _check_space(folder, part.nbytes / len(part) * count)
                for name, t in tensors.items():
                    files[name] = _TensorFile(opened.enter_context(_create(folder / f"{name}.bin")), t)
            for name, file in files.items():
                file.append(tensors[name])
            written += len(part)
        if written != count or count == 0:
            raise FeatureCacheError(
                f"{written} examples arrived where {count} were announced; nothing was kept"
            )
        return {name: file.finish(count) for name, file in files.items()}


class _TensorFile:
    """One tensor on its way to disk, example after example."""

    def __init__(self, file: BinaryIO, like: Tensor) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._dtype, self._shape = like.dtype, like.shape[1:]

    def append(self, tensor: Tensor) -> None:
        if tensor.dtype != self._dtype or tensor.shape[1:] != self._shape:
            raise FeatureCacheError(
                f"feature parts differ in type or shape: {tensor.dtype} {tensor.shape[1:]}"
            )
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self._digest.update(data)
        self._file.write(data)

    def finish(self, count: int) -> dict[str, Any]:
        _make_durable(self._file)
        name = str(self._dtype).removeprefix("torch.")
        return {"dtype": name, "shape": [count, *self._shape], "sha256": self._digest.hexdigest()}


def _write_manifest(folder: Path, key: str, count: int, tensors: dict[str, Any]) -> None:
    body = {"format": _FORMAT, "key": key, "count": count, "tensors": tensors}
    with _create(folder / _MANIFEST) as file:
        file.write(json.dumps(body | {"sha256": _body_digest(body)}, indent=1).encode())
        _make_durable(file)


def _make_durable(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _lock(root: Path, key: str) -> Iterator[None]:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (root / _TAG).exists():
        if any(root.iterdir()) and not (root / _TAG).exists():  # another process may have been quicker
            raise FeatureCacheError(
                f"{root} holds other files; choose an empty or new folder for the features"
            )
        (root / _TAG).write_text(_TAG_TEXT)
    _make_private(root)
    descriptor = os.open(root / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_private(root: Path) -> None:
    """Take an existing folder from everybody else: the names in it are digests of private images."""
    mode = stat.S_IMODE(root.stat().st_mode)
    if mode & 0o077:
        try:
            root.chmod(mode & 0o700)
        except OSError:
            raise FeatureCacheError(
                f"others can list {root}, whose names are digests of private images, and its mode {mode:o} "
                "cannot be changed; choose a folder of your own"
            ) from None


def _check_space(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FeatureCacheError(
            f"the features need {needed / 1e9:.3g} GB but {folder.parent} has {free / 1e9:.3g} GB free; "
            "free some space, choose another folder, or store half precision"
        )


def _no_space(root: Path) -> FeatureCacheError:
    return FeatureCacheError(
        f"no space left while writing features to {root}; nothing was kept. "
        "Free some space, choose another folder, or store half precision"
    )


# ---------------------------------------------------------------------- reading


def _read_manifest(entry: Path, key: str) -> dict[str, Any]:
    try:
        manifest = json.loads((entry / _MANIFEST).read_bytes())
        recorded = manifest.pop("sha256")
    except FileNotFoundError:
        raise FeatureCacheError(f"no features at {entry}; build them first") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(entry / _MANIFEST) from error
    if recorded != _body_digest(manifest) or manifest["key"] != key or manifest["format"] != _FORMAT:
        raise _damaged(entry / _MANIFEST)
    return manifest


def _open_tensor(path: Path, record: dict[str, Any]) -> StoredTensor:
    dtype, shape = getattr(torch, record["dtype"]), torch.Size(record["shape"])
    try:
        complete = path.stat().st_size == shape.numel() * dtype.itemsize
        intact = complete and _file_digest(path) == record["sha256"]
    except OSError as error:
        raise _damaged(path) from error
    if not intact:
        raise _damaged(path)
    return StoredTensor(path, dtype, shape)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path) -> FeatureCacheError:
    return FeatureCacheError(f"{path} is truncated or damaged; remove the cache and build the features again")


def _is_key(name: str) -> bool:
    return len(name) >= 16 and all(c in "0123456789abcdef" for c in name)


def _check_key(key: str) -> None:
    if not _is_key(key):
        raise FeatureCacheError(f"feature key {key!r} is not a hexadecimal digest; use feature_key(...)")
