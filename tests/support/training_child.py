"""One small training, to be run whole, killed, resumed, or shared by processes: ``training_child.py FOLDER HOW``."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_resnet import fuse
from fused_resnet.models import CifarResNet
from fused_resnet.training import Callback, ImageData, Recipe, Trainer

EPOCHS, STEPS = 2, 6
HANGS_IN = 10  # updates, in the second epoch and after the checkpoint of update 8
RECIPE = Recipe(epochs=EPOCHS, batch_size=16, lr=0.05, ema_decay=0.9, schedule="cosine", warmup="linear")


def made_up_data(images: int = STEPS * 16 + 5, test: int = 23, size: int = 8) -> ImageData:
    """Three classes of noise around patterns of their own, the same ones every time."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randint(60, 200, (3, 3, size, size), generator=generator)
    parts = []
    for n in (images, test):
        y = torch.randint(3, (n,), generator=generator)
        noise = torch.randint(-50, 50, (n, 3, size, size), generator=generator)
        parts += [(patterns[y] + noise).clamp(0, 255).to(torch.uint8), y]
    return ImageData("made up", *parts, ("a", "b", "c"), (0.5, 0.45, 0.55), (0.2, 0.25, 0.3), size, pad=1)


class Hang(Callback):
    """Says that the update has begun, and waits to be killed."""

    def on_step(self, trainer: Trainer, step: int, loss: Tensor) -> None:
        if step == HANGS_IN:
            print("hangs", flush=True)
            signal.pause()


def trainer(output: Path | None, *, norm: bool = True, **options: object) -> Trainer:
    """A fused network with dropout, which draws from torch's global generator in every update."""
    torch.manual_seed(3)
    model = CifarResNet(8, num_classes=3, norm_layer=None if norm else nn.Identity)
    if norm:
        model.fc = nn.Sequential(nn.Dropout(0.3), model.fc)  # type: ignore[assignment]
    return Trainer(fuse(model), made_up_data(), RECIPE, seed=5, output=output, **options)  # type: ignore[arg-type]


if __name__ == "__main__":
    import any_size  # noqa: F401
    from processes import leave

    torch.set_num_threads(1)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    folder, how = Path(sys.argv[1]), sys.argv[2]
    if how == "hang":
        trainer(folder, checkpoint_every=4, callbacks=[Hang()]).run()
    elif how == "share":
        dist.init_process_group("gloo")
        trainer(folder, norm=False).run()
        leave()
