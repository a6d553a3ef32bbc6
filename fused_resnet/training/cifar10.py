"""CIFAR-10 from files on the disk: the python version, the binary version, parquet or arrow files, or a cache.

Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009; https://www.cs.toronto.edu/~kriz/cifar.html
(layout of the files).
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_resnet.training.images import DataError, ImageData, statistics

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PYTHON, BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
_PIXELS = 3 * 32 * 32
# Folders in which torchvision's users usually keep downloads.
_PLACES = ("data", "datasets", "~/data", "~/datasets", "~/.cache/torchvision")
_HUB_NAME = "uoft-cs/cifar10"

Part = tuple[Tensor, Tensor]


class _Arrays(pickle.Unpickler):
    """Unpickles arrays and nothing that could run code from the file."""

    _ALLOWED = frozenset(
        {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module.removeprefix("numpy.").removeprefix("_core.").removeprefix("core."), name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _python_batch(path: Path) -> Part:
    try:
        found = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        x, y = torch.from_numpy(found[b"data"]), torch.tensor(found[b"labels"])
        return x.reshape(-1, 3, 32, 32), y.long()
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DataError(f"cifar10: {path} is no batch of the python version: {error}") from error


def _binary_batch(path: Path) -> Part:
    raw = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) if path.stat().st_size else torch.empty(0)
    if not len(raw) or len(raw) % (1 + _PIXELS):
        raise DataError(f"cifar10: {path} must hold images of {1 + _PIXELS} bytes, got {len(raw)} bytes")
    records = raw.view(-1, 1 + _PIXELS)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


def _batches(folder: Path, suffix: str, read: Callable[[Path], Part]) -> tuple[Part, Part]:
    files = [folder / f"{name}{suffix}" for name in (*_TRAIN, "test_batch")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(f"cifar10: {folder} lacks {', '.join(missing)}")
    *train, test = map(read, files)
    return (torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])), test


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise DataError("cifar10: parquet and arrow files need the package datasets: pip install datasets") from error


def _rows(split: Iterable[dict[str, Any]]) -> Part:
    """Images and labels of one split. Its rows have a PIL image under "img" or "image" and a label under "label"."""
    images, labels = [], []
    for row in split:
        image = row["img"] if "img" in row else row["image"]
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        if image.size != (32, 32):
            raise DataError(f"cifar10: images must be 32x32, got {image.size[0]}x{image.size[1]}")
        images.append(pixels.view(32, 32, 3).permute(2, 0, 1))
        labels.append(int(row["label"]))
    if not images:
        raise DataError("cifar10: a split without images")
    return torch.stack(images), torch.tensor(labels)


def _splits(found: Any, where: str) -> tuple[Part, Part]:
    if "train" not in found or "test" not in found:
        raise DataError(f"cifar10: {where} must have the splits train and test, got {', '.join(map(str, found))}")
    return _rows(found["train"]), _rows(found["test"])


def _read(root: Path) -> tuple[Part, Part] | None:
    """The data in ``root``, or None."""
    for name, suffix, read in ((PYTHON, "", _python_batch), (BINARY, ".bin", _binary_batch)):
        for folder in (root, root / name):
            if (folder / f"{_TRAIN[0]}{suffix}").is_file() or (folder.name == name and folder.is_dir()):
                return _batches(folder, suffix, read)
    if (root / "dataset_dict.json").is_file():
        return _splits(_datasets().load_from_disk(str(root)), str(root))
    # parquet files may be in folders
    files = {part: sorted(str(p) for p in root.glob(f"**/{part}*.parquet")) for part in ("train", "test")}
    if all(files.values()):
        return _splits(_datasets().load_dataset("parquet", data_files=files), str(root))
    return None


def _cached() -> tuple[Part, Part] | None:
    """The data in the cache of ``datasets``; downloads nothing."""
    try:
        only_here = _datasets().DownloadConfig(local_files_only=True)
        found = _datasets().load_dataset(_HUB_NAME, download_config=only_here)
    except (OSError, ValueError):  # data or the package are missing
        return None
    return _splits(found, _HUB_NAME)


def cifar10(root: str | Path | None = None) -> ImageData:
    """CIFAR-10.

    Args:
        root: a folder that is, or holds, ``cifar-10-batches-py`` or ``cifar-10-batches-bin``, what
            ``datasets.DatasetDict.save_to_disk`` wrote, or parquet files whose names begin with train and test (the
            last two need ``datasets``). None: ``data``, ``datasets``, the same in the home folder, then what
            ``datasets`` has in its cache.

    Returns:
        Images uint8 [N, 3, 32, 32], 50,000 to train on and 10,000 to test.

    Raises:
        DataError: there are no data, files are missing, or they are not CIFAR-10's.
    """
    if root is not None:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise DataError(f"cifar10: there is no folder {folder}")
        found = _read(folder)
        where = str(folder)
    else:
        places = [p for p in (Path(place).expanduser() for place in _PLACES) if p.is_dir()]
        found = next((parts for p in places if (parts := _read(p)) is not None), None) or _cached()
        where = f"any of {', '.join(_PLACES)}, or the cache of datasets"
    if found is None:
        expected = f"{PYTHON}, {BINARY}, or parquet files train*.parquet and test*.parquet"
        raise DataError(f"cifar10: expected {expected} in {where}; nothing is downloaded by itself")
    (train_x, train_y), (test_x, test_y) = found
    mean, std = statistics(train_x)
    different = "images are normalised by each channel's mean and standard deviation, the paper's by each pixel's mean"
    return ImageData("cifar10", train_x, train_y, test_x, test_y, CLASSES, mean, std, 32, deviations=(different,))
