"""Datasets and batches: every form of CIFAR-10, class folders with broken images, order, crops; and recipes."""

from __future__ import annotations

import io
import math
import pickle
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from cifar_files import TEST, TRAIN, pictures, write_binary, write_python
from torch import Tensor

from fused_resnet.training import DataError, ImageData, Recipe, data, named
from fused_resnet.training.augment import pad_crop_flip, random_box
from fused_resnet.training.batches import Batches, Share, epoch_order
from fused_resnet.training.cifar10 import CLASSES
from fused_resnet.training.files import ImageFiles


def is_cifar(found: ImageData) -> bool:
    same = [
        torch.equal(found.train_x, torch.cat([x for x, _ in TRAIN])),  # type: ignore[arg-type]
        torch.equal(found.train_y, torch.cat([y for _, y in TRAIN])),
        torch.equal(found.test_x, TEST[0]) and torch.equal(found.test_y, TEST[1]),  # type: ignore[arg-type]
    ]
    return all(same) and found.classes == CLASSES


# ---------------------------------------------------------------------------------------------------- CIFAR-10
@pytest.mark.parametrize("write", [write_python, write_binary])
def test_cifar10_files(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    found = data.cifar10(tmp_path / "data")
    assert is_cifar(found)
    assert is_cifar(data.cifar10(next((tmp_path / "data").iterdir())))
    monkeypatch.chdir(tmp_path)
    assert is_cifar(data.cifar10())
    x = torch.cat([x for x, _ in TRAIN]).double() / 255
    assert found.mean == pytest.approx(x.mean((0, 2, 3)).tolist())
    assert found.std == pytest.approx(x.std((0, 2, 3), correction=0).tolist())
    normalised = found.normalise(torch.cat([x for x, _ in TRAIN]))
    assert normalised.is_contiguous(memory_format=torch.channels_last) and normalised.dtype == torch.float32
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_cifar10_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which would bring much with it: what is asked of it, and rows as it gives them."""
    from PIL import Image

    asked: list[Any] = []

    def rows(parts: list[tuple[Tensor, Tensor]], key: str) -> list[dict[str, Any]]:
        made = [(Image.fromarray(i.permute(1, 2, 0).numpy()), int(y)) for x, ys in parts for i, y in zip(x, ys)]
        return [{key: image, "label": y} for image, y in made]

    fake = ModuleType("datasets")
    splits = {"train": rows(TRAIN, "img"), "test": rows([TEST], "img")}
    fake.load_dataset = lambda *words, **options: asked.append((words, options)) or splits  # type: ignore[attr-defined]
    fake.load_from_disk = lambda root: {"train": rows(TRAIN, "image"), "test": rows([TEST], "image")}  # type: ignore
    fake.DownloadConfig = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (tmp_path / "plain_text").mkdir()
    files = {part: tmp_path / "plain_text" / f"{part}-00000-of-00001.parquet" for part in ("train", "test")}
    for file in files.values():
        file.touch()
    assert is_cifar(data.cifar10(tmp_path))
    assert asked == [(("parquet",), {"data_files": {part: [str(file)] for part, file in files.items()}})]
    for file in files.values():
        file.unlink()
    (tmp_path / "dataset_dict.json").touch()
    assert is_cifar(data.cifar10(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert is_cifar(data.cifar10())
    assert asked[-1][1]["download_config"] == {"local_files_only": True}
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="need the package datasets"):
        data.cifar10(tmp_path)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run!",)


def test_cifar10_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="there is no folder .*nowhere"):
        data.cifar10(tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected cifar-10-batches-py, .* nothing is downloaded"):
        data.cifar10(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="any of data, datasets"):
        data.cifar10()
    write_python(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(DataError, match="data_batch_3 is no batch .*print"):
        data.cifar10(tmp_path)
    assert "run!" not in capsys.readouterr().out
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(DataError, match="lacks data_batch_3"):
        data.cifar10(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_binary(other)
    with open(other / "cifar-10-batches-bin" / "test_batch.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="test_batch.bin must hold images of 3073 bytes, got 27658"):
        data.cifar10(other)


def test_labels_outside_the_classes_are_an_error() -> None:
    x, y = pictures(4, 0)
    with pytest.raises(DataError, match=r"train_y must lie in 0..1, got 0 to 5"):
        ImageData("odd", x, torch.tensor([0, 5, 1, 1]), x, y, ("a", "b"), (0.5,) * 3, (0.2,) * 3, 32)
    with pytest.raises(DataError, match="train_x must be uint8"):
        ImageData("odd", x.float(), y, x, y, CLASSES, (0.5,) * 3, (0.2,) * 3, 32)


def test_digits() -> None:
    found = data.digits()
    assert len(found.train_x) == len(found.train_y) == 1437 and len(found.test_x) == 360
    assert found.train_x.shape[1:] == (1, 16, 16) and set(found.train_y.tolist()) == set(range(10))
    x = found.normalise(found.train_x)  # type: ignore[arg-type]
    assert abs(float(x.mean())) < 1e-5 and abs(float(x.std()) - 1) < 1e-3
    assert found.identity() == data.digits().identity() != data.digits(1).identity()


# ---------------------------------------------------------------------------------------------------- folders
def save(path: Path, colour: int, size: tuple[int, int] = (40, 30)) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    noise = numpy.random.default_rng(colour).integers(0, 40, (size[1], size[0], 3)) + colour
    Image.fromarray(noise.astype(numpy.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten images; of the second, one is text and one is cut short."""
    for i in range(10):
        save(tmp_path / "cats" / f"{i}.png", 20 + i)
        save(tmp_path / "dogs" / "deep" / f"{i}.jpg", 150 + i, (24, 50))
    (tmp_path / "dogs" / "deep" / "3.jpg").write_text("not an image")
    whole = (tmp_path / "dogs" / "deep" / "7.jpg").read_bytes()
    (tmp_path / "dogs" / "deep" / "7.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dogs" / "notes.txt").write_text("no image, and not meant as one")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_left_out_and_named(folder: Path, workers: int) -> None:
    found = data.image_folder(folder, size=16)
    assert found.classes == ("cats", "dogs") and (len(found.train_x), len(found.test_x)) == (16, 4)
    batches = Batches(found, 4, seed=1, augment=True, workers=workers)
    before = torch.get_rng_state()
    broken: dict[str, str] = {}
    labels: list[int] = []
    for batch in batches.train(0):
        assert batch.x.shape == (4, 3, 16, 16) and batch.x.dtype == torch.uint8
        # the pixels are those of the label's class
        assert ((batch.x.float().mean((1, 2, 3)) > 100) == (batch.y == 1)).all()
        broken |= batch.broken
        labels += batch.y.tolist()
    tests = list(batches.test())
    for batch in tests:
        broken |= batch.broken
    assert set(broken) == {"dogs/deep/3.jpg", "dogs/deep/7.jpg"}
    assert "cannot identify" in broken["dogs/deep/3.jpg"] and "runcated" in broken["dogs/deep/7.jpg"]
    lost = {"dogs/deep/3.jpg", "dogs/deep/7.jpg"} & set(found.test_x.names)  # type: ignore[union-attr]
    assert len(labels) == 16 and sum(len(batch.y) for batch in tests) == 4 - len(lost)
    assert torch.equal(before, torch.get_rng_state())


def test_decoded_batches_do_not_depend_on_workers_or_the_start(folder: Path) -> None:
    found = data.image_folder(folder, size=16)
    whole = list(Batches(found, 4, seed=1, augment=True).train(3))
    late = list(Batches(found, 4, seed=1, augment=True, workers=2).train(3, start=2))
    assert len(whole) == 4 and len(late) == 2
    for a, b in zip(whole[2:], late, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    other = list(Batches(found, 4, seed=1, augment=True).train(4))
    assert not torch.equal(whole[0].x, other[0].x)


def test_given_test_folders_and_what_is_wrong_with_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder .*nowhere"):
        data.image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected .*CLASS/image.jpg with two classes at least, got 0"):
        data.image_folder(tmp_path)
    for i in range(2):
        save(tmp_path / "train" / "a" / f"{i}.png", i)
        save(tmp_path / "train" / "b" / f"{i}.png", 100 + i)
    save(tmp_path / "val" / "b" / "0.png", 200)
    found = data.image_folder(tmp_path)
    assert (len(found.train_x), len(found.test_x)) == (4, 1) and found.test_y.tolist() == [1]
    assert found.train_x.names[0] == "train/a/0.png"  # type: ignore[union-attr]
    save(tmp_path / "val" / "c" / "0.png", 200)
    with pytest.raises(DataError, match="val has classes that .*train lacks: c"):
        data.image_folder(tmp_path)
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(DataError, match="train/c holds no image"):
        data.image_folder(tmp_path)


def test_a_folder_of_nothing_but_broken_images_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            (tmp_path / name / f"{i}.png").write_text("broken")
    found = data.image_folder(tmp_path, size=16)
    with pytest.raises(DataError, match="8 images in a row can't be read, the first .*cannot identify"):
        list(Batches(found, 2, 0, True).train(0))
    assert [len(batch.y) for batch in Batches(found, 2, 0, True).test()] == [0]


def test_reading_an_image(tmp_path: Path) -> None:
    """The middle of a gradient has the gradient's middle; a crop keeps inside; a mirrored crop runs the other way."""
    from PIL import Image

    ramp = numpy.broadcast_to(numpy.linspace(0, 255, 64).astype(numpy.uint8)[None, :, None], (32, 64, 3))
    Image.fromarray(ramp.copy()).save(tmp_path / "ramp.png")
    files = ImageFiles(tmp_path, ["ramp.png"], 8)
    middle = files.read(0, None).float()
    assert middle.shape == (3, 8, 8) and abs(float(middle.mean()) - 127.5) < 3
    # 28 of 64 columns: a slope of 255 / 64 * 28 / 8 per pixel
    assert float(middle[0, 0].diff().mean()) == pytest.approx(255 / 63 * 28 / 8, rel=0.05)
    slopes = [float(files.read(0, torch.Generator().manual_seed(i))[0, 0].float().diff().mean()) for i in range(20)]
    assert min(slopes) < 0 < max(slopes)


# ---------------------------------------------------------------------------------------------------- order and crops
def test_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): epoch_order(50, seed, epoch) for seed in range(3) for epoch in range(3)}
    torch.manual_seed(123)
    for (seed, epoch), order in orders.items():
        assert torch.equal(order, epoch_order(50, seed, epoch)) and sorted(order.tolist()) == list(range(50))
    assert len({tuple(order.tolist()) for order in orders.values()}) == 9


def test_shares_make_up_the_batch() -> None:
    """Crops too: what two processes get is what one would have got."""
    found = data.digits()
    whole = next(Batches(found, 12, 3, True).train(2, start=5))
    for rank in range(2):
        share = next(Batches(found, 12, 3, True, Share(rank, 2)).train(2, start=5))
        assert torch.equal(share.x, whole.x[rank::2]) and torch.equal(share.y, whole.y[rank::2])
    apart = [batch for rank in range(2) for batch in Batches(found, 100, 3, True, Share(rank, 2)).test()]
    assert sum(len(batch.y) for batch in apart) == 360
    assert not torch.equal(whole.x, next(Batches(found, 12, 3, False).train(2, start=5)).x)


def test_pad_crop_flip_is_that_of_one_image_at_a_time() -> None:
    generator = torch.Generator().manual_seed(11)
    x = torch.randint(1, 256, (40, 3, 6, 5), generator=generator, dtype=torch.uint8)
    offsets = torch.randint(5, (40, 2), generator=generator)
    flipped = torch.rand(40, generator=generator) < 0.5
    out = pad_crop_flip(x, 2, offsets, flipped)
    for i in range(40):
        row, column = offsets[i].tolist()
        crop = F.pad(x[i], (2, 2, 2, 2))[:, row : row + 6, column : column + 5]
        assert torch.equal(out[i], crop.flip(2) if flipped[i] else crop)
    assert torch.equal(pad_crop_flip(x, 2, torch.full((40, 2), 2), torch.zeros(40, dtype=torch.bool)), x)


def test_digits_are_not_mirrored() -> None:
    found = data.digits()
    assert not found.flip
    batches = Batches(found, 64, 0, True)
    x = found.train_x[epoch_order(1437, 0, 0)[:64]]  # type: ignore[index]
    out = next(batches.train(0)).x
    shifts = [F.pad(x, (2, 2, 2, 2))[:, :, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    assert torch.stack([(out == s).flatten(1).all(1) for s in shifts]).any(0).all()


def test_random_boxes_lie_inside_and_differ() -> None:
    generator = torch.Generator().manual_seed(5)
    boxes = [random_box(30, 50, 0.08, generator) for _ in range(300)]
    for top, left, h, w, _ in boxes:
        assert 0 <= top <= top + h <= 30 and 0 <= left <= left + w <= 50 and h >= 1 and w >= 1
    areas = [h * w / 1500 for _, _, h, w, _ in boxes]
    assert min(areas) < 0.15 and max(areas) > 0.75 and 100 < sum(flip for *_, flip in boxes) < 200
    assert random_box(1, 1, 0.08, generator)[:4] == (0, 0, 1, 1)


# ---------------------------------------------------------------------------------------------------- recipes
def test_recipes_are_the_papers() -> None:
    """Section 4.2: 0.1, divided by 10 at 32k and 48k updates, 64k in all, 128 images each, momentum 0.9, decay 1e-4."""
    paper = named("paper")
    assert (paper.lr, paper.batch_size, paper.momentum, paper.weight_decay) == (0.1, 128, 0.9, 1e-4)
    assert math.isclose(paper.epochs * 50_000 / 128, 64_000, rel_tol=0.002)
    assert paper.steps("milestones", 391) == pytest.approx([32_000, 48_000], rel=0.003)
    assert not paper.nesterov and paper.augment and paper.schedule == "steps" and paper.factor == 0.1
    assert named("paper", imagenet=True).batch_size == 256
    modern = named("modern")
    assert modern.schedule == "cosine" and modern.label_smoothing and modern.ema_decay and modern.dtype == "bf16"
    assert named("quick", epochs=3).differences(named("quick"), mine="now", theirs="before") == [
        "epochs is 3 now and 8 before"
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an int, got 1.5"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True"),
        ({"lr": 0}, ValueError, "lr must be above 0, got 0"),
        ({"lr": math.nan}, ValueError, "lr must be above 0, got nan"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got 'fast'"),
        ({"momentum": 1.5}, ValueError, "momentum must be at least 0 and at most 1, got 1.5"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0, got -1"),
        ({"nesterov": 1}, TypeError, "nesterov must be a bool, got 1"),
        ({"nesterov": True, "momentum": 0}, ValueError, "nesterov=True needs a momentum above 0"),
        ({"schedule": "stairs"}, ValueError, "schedule must be one of steps, cosine, constant, got 'stairs'"),
        ({"milestones": 5}, TypeError, "milestones must be a sequence of numbers, got 5"),
        ({"milestones": (0.75, 0.5)}, ValueError, "milestones must increase"),
        ({"milestones": (0.5, 300)}, ValueError, r"milestones\[1\] must be an int below epochs = 164"),
        ({"factor": 0}, ValueError, "factor must be above 0 and at most 1, got 0"),
        ({"warmup": "hot"}, ValueError, "warmup must be one of none, error, linear, got 'hot'"),
        ({"warmup_lr": 0.5, "warmup": "linear"}, ValueError, "warmup_lr must be at most lr = 0.1"),
        ({"warmup_lr": 0}, ValueError, "warmup_lr must be above 0"),
        ({"warmup_error": 2}, ValueError, "warmup_error must be above 0 and at most 1, got 2"),
        ({"warmup_end": 0.6, "warmup": "linear"}, ValueError, "warmup_end must come before all milestones"),
        ({"warmup_end": 164, "warmup": "linear"}, ValueError, "warmup_end must be an int below epochs = 164"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing must be at least 0 and at most 1"),
        ({"ema_decay": 1.1}, ValueError, "ema_decay must be at least 0 and at most 1"),
        ({"dtype": "fp16"}, ValueError, "dtype must be one of fp32, bf16, got 'fp16'"),
        ({"augment": None}, TypeError, "augment must be a bool, got None"),
        ({"speed": 1}, TypeError, "a recipe has no field speed"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        named("paper", **changes)


def test_every_field_is_checked() -> None:
    """A value that no field can have is refused by each of them."""
    for f in fields(Recipe):
        with pytest.raises((TypeError, ValueError), match=f.name):
            Recipe(**{f.name: io.BytesIO()})  # type: ignore[arg-type]


def test_unknown_recipes_are_named() -> None:
    with pytest.raises(ValueError, match="recipe must be one of paper, modern, quick, got 'fast'"):
        named("fast")
