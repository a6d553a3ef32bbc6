"""Any folder of class folders, decoded image by image while the network trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fused_resnet.training.files import ImageFiles
from fused_resnet.training.images import DataError, ImageData

EXTENSIONS = frozenset(".jpg .jpeg .png .bmp .webp .gif .tif .tiff .ppm .pgm".split())
TEST_FOLDERS = ("val", "valid", "validation", "test")
# Mean and standard deviation per channel of ImageNet's training images: torchvision's weights expect these.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Found = list[tuple[str, int]]


def _class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(root: Path, prefix: str, classes: Sequence[str]) -> Found:
    """(path below ``root``, class) of every image of ``root/prefix``.

    Raises:
        DataError: a class has no images.
    """
    found: Found = []
    for label, name in enumerate(classes):
        folder = root / prefix / name
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
        if not files:
            raise DataError(f"{folder} holds no image ({', '.join(sorted(EXTENSIONS))})")
        found += [(p.relative_to(root).as_posix(), label) for p in files]
    return found


def _held_out(found: Found, share: float) -> tuple[Found, Found]:
    """Splits off ``share`` of each class: chosen at random, the same every time, at least one of each class."""
    generator = torch.Generator().manual_seed(0)
    train: Found = []
    test: Found = []
    for label in sorted({label for _, label in found}):
        mine = [item for item in found if item[1] == label]
        held = max(1, round(share * len(mine)))
        if held >= len(mine):
            raise DataError(f"{mine[0][0]} is all that its class has: expected 2 images of each class at least")
        order = torch.randperm(len(mine), generator=generator).tolist()
        test += [mine[i] for i in sorted(order[:held])]
        train += [mine[i] for i in sorted(order[held:])]
    return train, test


def image_folder(root: str | Path, size: int = 224, test_share: float = 0.2) -> ImageData:
    """A folder of class folders, ``root/CLASS/.../image.jpg``.

    If ``root`` has a folder ``train`` and one of val, valid, validation and test, these hold the class folders.
    Otherwise a part of every class is held out to test on, chosen at random and the same every time.

    Args:
        size: H = W of the network's images. A training image is a random crop of 8 to 100 % of a file's, mirrored half
            of the time; a test image is the middle of it.
        test_share: the share of each class that is held out.

    Returns:
        Images as files, read when they are needed, normalised by ImageNet's mean and standard deviation.

    Raises:
        DataError: there is no such folder, it has no class folders, a class has no images, or a test class has no
            training images.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    if not 0 < test_share < 1:
        raise DataError(f"test_share must be between 0 and 1, got {test_share}")
    classes, *parts = _split(root, test_share)
    (train_x, train_y), (test_x, test_y) = (
        (ImageFiles(root, [name for name, _ in part], size), torch.tensor([label for _, label in part]))
        for part in parts
    )
    different = (
        "crops of 8 to 100 % of an image (Szegedy et al., arXiv 1409.4842); the paper's are of its size after scaling",
        "normalised by each channel's mean and standard deviation, without colour augmentation",
        "the rate falls at fixed times; the paper's on ImageNet when the error stops falling",
    )
    images = (train_x, train_y, test_x, test_y)
    return ImageData(root.resolve().name, *images, tuple(classes), MEAN, STD, size, deviations=different)


def _split(root: Path, test_share: float) -> tuple[list[str], Found, Found]:
    """The classes, the training images and the test images, each image with its label."""
    inside = _class_folders(root)
    test_folder = next((name for name in TEST_FOLDERS if name in inside), None)
    prefix = "train/" if "train" in inside and test_folder else ""
    classes = _class_folders(root / prefix)
    if len(classes) < 2:
        expected = f"{root}/{prefix}CLASS/image.jpg with two classes at least"
        raise DataError(f"expected {expected}, got {len(classes)} class folders")
    train = _images(root, prefix, classes)
    if prefix and test_folder:
        theirs = _class_folders(root / test_folder)
        if strangers := sorted(set(theirs) - set(classes)):
            raise DataError(f"{root / test_folder} has classes that {root / 'train'} lacks: {', '.join(strangers)}")
        labels = {name: i for i, name in enumerate(classes)}
        test = [(name, labels[theirs[label]]) for name, label in _images(root, test_folder, theirs)]
    else:
        train, test = _held_out(train, test_share)
    return classes, train, test
