"""The verdicts of the paper's experiments: each can go both ways."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fused_resnet.studies import STUDIES, gradients, paper
from fused_resnet.studies import curves as training_curves
from fused_resnet.studies.study import as_read_back


def curves(depth: int, shortcut: str | None, loss: float, error: float = 0.1, **more: Any) -> dict[str, Any]:
    """Three seeds that end at about ``loss``, and at about ``error`` on both sets."""
    network = {"depth": depth, "shortcut": shortcut, "bottleneck": False}
    losses = [[2.3, loss * (1 + 0.01 * i)] for i in range(3)]
    errors = [[0.9, error * (1 + 0.01 * i)] for i in range(3)]
    found = {"network": network, "seeds": [0, 1, 2], "train_loss": losses, "test_loss": losses}
    return found | {"train_error": errors, "test_error": errors} | more


def held(study: str, figures: dict[str, Any]) -> list[bool]:
    return [v.held for v in STUDIES[study].judge(as_read_back(figures))]


@pytest.mark.parametrize(
    ("plain", "residual", "expected"),
    [((0.2, 0.4), (0.2, 0.1), [True, True]), ((0.4, 0.2), (0.2, 0.1), [False, True]),
     ((0.2, 0.4), (0.1, 0.2), [True, False]), ((0.2, 0.2), (0.2, 0.2), [False, True]),
     ((0.2, math.nan), (0.1, math.nan), [True, False])],
)  # fmt: skip
def test_degradation_verdict(plain: tuple[float, float], residual: tuple[float, float], expected: list[bool]) -> None:
    networks = {f"plain-{d}": curves(d, None, loss) for d, loss in zip((20, 56), plain, strict=True)}
    networks |= {f"ResNet-{d}": curves(d, "A", loss) for d, loss in zip((20, 56), residual, strict=True)}
    assert held("degradation", {"networks": networks, "published_test_error_percent": {}}) == expected


def test_published_numbers_stand_beside_ours() -> None:
    networks = {"plain-20": curves(20, None, 0.2), "plain-56": curves(56, None, 0.4), "ResNet-20": curves(20, "A", 0.2)}
    figures = {"networks": networks | {"ResNet-56": curves(56, "A", 0.1, 0.07)}}
    figures["published_test_error_percent"] = {f"ResNet-{d}": error for d, error in paper.CIFAR10_ERROR.items()}
    sentence = STUDIES["degradation"].judge(as_read_back(figures))[1].sentence
    assert "ResNet-20 10.1 ± 0.1 % (8.75 %), ResNet-56 7.07 ± 0.07 % (6.97 %)." in sentence


@pytest.mark.parametrize(
    ("plain", "options", "expected"),
    [(0.5, (0.2, 0.19, 0.18), [True, True]), (0.2, (0.2, 0.19, 0.1), [False, False]),
     (0.5, (0.5, 0.1, 0.3), [False, False]), (0.5, (0.45, 0.2, 0.1), [True, False])],
)  # fmt: skip
def test_shortcuts_verdict(plain: float, options: tuple[float, ...], expected: list[bool]) -> None:
    networks = {"plain-20": curves(20, None, plain)}
    networks |= {f"ResNet-20 {o}": curves(20, o, loss) for o, loss in zip("ABC", options, strict=True)}
    assert held("shortcuts", {"networks": networks}) == expected


@pytest.mark.parametrize(("a", "b", "expected"), [(0.1, 0.05, True), (0.1, 0.1, False), (0.05, 0.1, False)])
def test_projection_verdict(a: float, b: float, expected: bool) -> None:
    cost = {"parameters": 10, "multiply_adds": 20}
    networks = {"A": curves(20, "A", 0.1, a, **cost), "B": curves(20, "B", 0.1, b, **cost)}
    assert held("projection", {"networks": networks}) == [expected]


@pytest.mark.parametrize(
    ("cost", "error", "expected"),
    [(1.05, 0.05, [True, True]), (1.5, 0.05, [False, True]), (0.6, 0.2, [False, False]), (1.0, 0.1, [True, False])],
)
def test_bottleneck_verdict(cost: float, error: float, expected: list[bool]) -> None:
    networks = {"basic": curves(20, "A", 0.1, 0.1, multiply_adds=100)}
    networks["bottleneck"] = curves(29, "A", 0.1, error, multiply_adds=100 * cost)
    imagenet = {"ResNet-34": {"multiply_adds": 3.6e9}, "ResNet-50": {"multiply_adds": 3.8e9}}
    assert held("bottleneck", {"networks": networks, "imagenet": imagenet}) == expected
    imagenet["ResNet-50"]["multiply_adds"] = 7e9
    assert held("bottleneck", {"networks": networks, "imagenet": imagenet}) == [False, expected[1]]


@pytest.mark.parametrize(
    ("means", "noise", "expected"),
    [((0.9, 0.8, 0.5, 0.4, 0.3), 0.0, [True, True]), ((0.9, 0.8, 0.5, 0.85, 0.3), 0.0, [False, False]),
     ((0.9, 0.8, 0.5, 0.4, 0.45), 0.0, [True, False]), ((0.3, 0.8, 0.5, 0.4, 0.3), 0.0, [False, True]),
     ((0.9, 0.8, 0.5, 0.48, 0.3), 0.1, [True, True]), ((0.9, 0.8, 0.5, 0.45, 0.4), 0.1, [True, False])],
)  # fmt: skip
def test_responses_verdict(means: tuple[float, ...], noise: float, expected: list[bool]) -> None:
    """In order, and the ends further apart than ``noise`` between seeds explains."""
    kinds = [(20, True), (56, True), (20, False), (56, False), (110, False)]
    networks = {
        f"{'plain' if plain else 'ResNet'}-{depth}": {
            "depth": depth, "plain": plain, "std": [[m - 0.1 + e, m + 0.1 + e] for e in (-noise, 0, noise)]
        }
        for (depth, plain), m in zip(kinds, means, strict=True)
    }  # fmt: skip
    assert held("responses", {"networks": networks}) == expected


def test_gradients_verdict() -> None:
    def figures(vanished: float, open_path: float, swing: float, swing_bn: float, healthy: float) -> dict[str, Any]:
        initial = {gradients.case_name(*case): [1.0, 1.0] for case in gradients._cases()}
        initial[gradients.case_name("plain", False, "sigmoid")] = [vanished, 1.0]
        initial[gradients.case_name("residual, open path", False, "sigmoid")] = [open_path, 1.0]
        initial[gradients.case_name("plain", False, "relu", 2.0)] = [swing, 1.0]
        initial[gradients.case_name("plain", True, "relu", 2.0)] = [swing_bn, 1.0]
        records = [{"step": i, "norms": [ratio, 1.0]} for i, ratio in enumerate((1e9, 1.0, healthy))]
        return {"depth": 56, "initial": initial, "training": {"plain-56": records, "ResNet-56": records}}

    good = (1e-20, 0.5, 1e9, 4.0, 10.0)
    assert held("gradients", figures(*good)) == [True, True, True]
    for i, bad in enumerate((0.1, 1e-9, 4.0, 1e9, 1e-5)):
        spoilt = [*good[:i], bad, *good[i + 1 :]]
        assert held("gradients", figures(*spoilt)) == [i > 1, i not in (2, 3), i != 4], spoilt
    # a gradient that is not there at all has vanished; one that is infinite is not healthy
    assert held("gradients", figures(0.0, *good[1:])) == [True, True, True]
    assert held("gradients", figures(*good[:4], math.inf)) == [True, True, False]


@pytest.mark.parametrize(("plain", "residual", "expected"), [((30, 33, 31), (20, 21, 19), True),
                                                             ((30, 33, 31), (30, 32, 34), False),
                                                             ((20, 21, 19), (30, 33, 31), False)])  # fmt: skip
def test_convergence_verdict(plain: tuple[int, ...], residual: tuple[int, ...], expected: bool) -> None:
    steps = {name: {str(s): found for s in training_curves.SHARES} for name, found in (("p", plain), ("r", residual))}
    assert held("convergence", {"steps_to_reach": steps}) == [expected]


@pytest.mark.parametrize(
    ("losses", "test", "augmented", "expected"),
    [([1.0, 0.8, 0.7, 0.65, 0.3, 0.3], 0.5, True, [True, True]),
     ([1.0, 0.8, 0.7, 0.65, 0.3, 0.3], 0.5, False, [True, False]),
     ([1.0, 0.8, 0.7, 0.65, 0.6, 0.6], 2.0, True, [False, False]),
     ([4.0, 4.0, 1.0, 1.0, 0.5, 0.5], 0.1, True, [False, True])],
)  # fmt: skip
def test_lr_drop_verdict(losses: list[float], test: float, augmented: bool, expected: list[bool]) -> None:
    network = curves(20, "A", 1.0) | {"train_loss": [losses] * 3, "test_loss": [[test] * 6] * 3}
    network |= {"test_error": [[0.3, 0.3, 0.3, 0.3, 0.1, 0.1]] * 3}
    figures = {"networks": {"ResNet-20": network}, "lr": [0.1] * 4 + [0.01] * 2, "augmented": augmented}
    assert held("lr-drop", figures) == expected
    assert held("lr-drop", figures | {"lr": [0.1] * 6}) == [False, False]


def test_deep_verdict() -> None:
    def figures(error: float, gradient: float, last: float, saved: float) -> dict[str, Any]:
        memory = {v: {"saved_bytes_per_image": s, "peak_bytes": None} for v, s in (("plain", 100.0), ("fused", saved))}
        entry = {
            "batch": 4,
            "parameters": 10,
            "losses": [2.0, last],
            "gradients": [[1.0, gradient]] * 2,
            "memory": memory,
        }
        trained = {"ResNet-110": curves(110, "A", 0.1, error)}
        return {
            "few_steps": {"ResNet-110": entry, "ResNet-1202": entry},
            "trained": trained,
            "published_test_error_percent": {},
        }

    assert held("deep", figures(0.02, 1.0, 1.0, 60.0)) == [True, True, True]
    assert held("deep", figures(0.5, 1.0, 1.0, 60.0)) == [False, True, True]
    for gradient in (0.0, math.nan, math.inf):
        assert held("deep", figures(0.02, gradient, 1.0, 60.0)) == [True, False, True]
    for last in (3.0, math.nan):
        assert held("deep", figures(0.02, 1.0, last, 60.0)) == [True, False, True]
    assert held("deep", figures(0.02, 1.0, 1.0, 100.0)) == [True, True, False]
    for error, fine in ((0.02, True), (0.9, False)):  # the paper preset trains both
        both = figures(0.02, 1.0, 1.0, 60.0)
        both["trained"]["ResNet-1202"] = curves(1202, "A", 0.1, error)
        assert held("deep", both) == [True, fine, True]
