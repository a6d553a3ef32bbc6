"""``fused-resnet train``: what it writes and says, its exit codes, resumption, and several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from source_tree import ROOT

import fused_resnet as fr
from fused_resnet.cli import main, options
from fused_resnet.cli import train as command
from fused_resnet.training import RECIPES, data
from fused_resnet.training.images import ImageData

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> ImageData:
    """In the place of all of them."""
    from dataclasses import replace

    found = data.digits()
    few = replace(
        found,
        train_x=found.train_x[:48],
        train_y=found.train_y[:48],
        test_x=found.test_x[:20],
        test_y=found.test_y[:20],
    )
    monkeypatch.setattr(data, "digits", lambda: few)
    return few


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten small images, one of which is broken."""
    from PIL import Image

    for label, name in enumerate(("dark", "light")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            noise = numpy.random.default_rng([label, i]).integers(0, 60, (36, 40, 3)) + 150 * label
            Image.fromarray(noise.astype(numpy.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "light" / "4.png").write_text("broken")
    return tmp_path / "images"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


WORDS = ["train", "--recipe", "quick", "--epochs", "2", "--batch-size", "16", "--device", "cpu"]


def test_training_on_digits(tmp_path: Path, few_digits: ImageData, capsys: pytest.CaptureFixture[str]) -> None:
    output, file = tmp_path / "run", tmp_path / "found.json"
    words = [*WORDS, "--output", str(output)]
    assert main([*words, "--json", str(file), "--checkpoint-every", "2"]) == 0
    found, printed = read(file), capsys.readouterr().out
    assert read(output / "results.json") == found
    assert found["ok"] and found["model"] == "resnet20" and found["recipe"]["epochs"] == 2 and not found["plain"]
    assert len(found["history"]["steps"]) == 6 and len(found["history"]["epochs"]) == 2
    assert "epochs is 2 here and 164 in the paper's recipe" in found["not_as_in_the_paper"]
    assert "checkpoint after step 2\n" in printed and "epoch 2/2: loss" in printed and "lowest test error" in printed
    for name in ("checkpoint.pt", "model.pt", "steps.csv", "epochs.csv", "curves.png", "train.log"):
        assert (output / name).stat().st_size
    model = fr.models.resnet20(weights=output / "model.pt", in_channels=1).eval()
    with torch.no_grad():
        answers = model(few_digits.normalise(few_digits.test_x)).argmax(1)  # type: ignore[arg-type]
    assert float((answers != few_digits.test_y).double().mean()) == found["history"]["epochs"][-1]["test_error"]

    assert main(words) == 2
    assert "holds a checkpoint: --resume goes on with it" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert read(output / "results.json")["history"] == found["history"]
    assert main([*words, "--resume", "--lr", "0.05"]) == 2
    assert "recipe.lr is 0.1 in the checkpoint and 0.05 now" in capsys.readouterr().err


def test_plain_is_plain_and_starts_from_the_same_weights(
    tmp_path: Path, few_digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Stop(Exception):
        pass

    def stop(model: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(model)
        raise Stop

    monkeypatch.setattr(command, "Trainer", stop)
    for extra in ([], ["--plain"]):
        with pytest.raises(Stop):
            main([*WORDS, "--output", str(tmp_path), "--seed", "3", *extra])
    fused, plain = seen
    assert type(plain) is fr.models.CifarResNet and type(fused) is not fr.models.CifarResNet
    for a, b in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_training_that_diverges_fails(
    tmp_path: Path, few_digits: ImageData, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--lr", "1e30", "--output", str(tmp_path / "run")]) == 1
    assert "the loss is not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "nowhere"], "--data nowhere: there is no folder nowhere"),
        (["--data", "cifar10:nowhere"], "--data cifar10:nowhere: cifar10: there is no folder nowhere"),
        (["--model", "resnet19"], "resnet19"),
        (["--model", "resnet18"], "--model resnet18: takes images of 3 channels, digits has 1"),
        (["--lr", "-1"], "the recipe: lr must be above 0, got -1.0"),
        (["--batch-size", "49"], "batch_size must be at most the number of training images, 48 in digits, got 49"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_what_can_not_be_is_said(
    words: list[str], expected: str, tmp_path: Path, few_digits: ImageData, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *words, "--output", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


def test_two_processes_on_a_folder_with_a_broken_image(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fused_resnet"]
    words = ["train", "--data", str(folder), "--epochs", "2", "--batch-size", "8", "--lr", "0.01", "--workers", "0"]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environ["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *torchrun, *words, "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = read(output / "results.json")
    assert found["processes"] == 2 and found["data"] == {
        "name": "images",
        "train": 16,
        "test": 4,
        "classes": ["dark", "light"],
    }
    assert list(found["broken_images"]) == ["light/4.png"]
    assert (output / "broken_images.txt").read_text().startswith("light/4.png\tcannot identify")
    assert len(found["history"]["steps"]) == 4 and done.stdout.count("epoch 2/2") == 1
    assert done.stdout.count("1 images can't be read and are left out: light/4.png") == 1


def test_the_options_recipes_are_those_of_the_package() -> None:
    actions = {a.dest: a for a in options.parser()._subparsers._group_actions[0].choices["train"]._actions}  # type: ignore
    assert tuple(actions["recipe"].choices) == RECIPES
