"""Two networks that people write themselves: one of faces, one of signals."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class FaceBlock(nn.Module):
    """The block of face recognition (Deng et al., *ArcFace*, arXiv 1801.07698): a norm first, no activation last."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1, self.bn2 = nn.Conv2d(cin, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.prelu = nn.PReLU(cout)
        self.conv2, self.bn3 = nn.Conv2d(cout, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.downsample: nn.Module | None = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(out)) + (x if self.downsample is None else self.downsample(x))


def iresnet50(
    depths: Sequence[int] = (3, 4, 14, 3), width: int = 64, side: int = 112, features: int = 512
) -> nn.Module:
    """IResNet-50: [N, 3, side, side] -> [N, features]."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)]
    cin = width
    for stage, depth in enumerate(depths):
        for i in range(depth):
            layers.append(FaceBlock(cin, width << stage, 2 if i == 0 else 1))
            cin = width << stage
        side = (side + 1) // 2
    head = nn.Linear(cin * side * side, features), nn.BatchNorm1d(features)
    return nn.Sequential(*layers, nn.BatchNorm2d(cin), nn.Flatten(), *head)


class SignalBlock(nn.Module):
    """A residual block of signals, with dropout between its convolutions, as ResNets of ECGs have it."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(cin, cout, 15, stride, 7, bias=False), nn.BatchNorm1d(cout)
        self.conv2, self.bn2 = nn.Conv1d(cout, cout, 15, 1, 7, bias=False), nn.BatchNorm1d(cout)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.2)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv1d(cin, cout, 1, stride, bias=False), nn.BatchNorm1d(cout))

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def ecg_resnet(depths: Sequence[int] = (2, 2, 2, 2), width: int = 64, classes: int = 9) -> nn.Module:
    """A ResNet of electrocardiograms: [N, 12, L] -> [N, classes]."""
    layers = [nn.Conv1d(12, width, 15, 2, 7, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(3, 2, 1)]
    cin = width
    for stage, depth in enumerate(depths):
        for i in range(depth):
            layers.append(SignalBlock(cin, width << stage, 2 if i == 0 and stage else 1))
            cin = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(cin, classes))
