"""The Triton convolutions' configurations, and the phases of a strided gradient: no kernel runs."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs Triton")

from fused_resnet.backends.triton import configs, geometry  # noqa: E402


@pytest.mark.parametrize("target", configs.TARGETS)
def test_configurations_fit_the_chip(target: str) -> None:
    chip = configs.TARGETS[target]
    for itemsize, ieee, formed, c, k, taps, size in [
        (2, False, True, 64, 64, 1, 56),
        (2, False, True, 2048, 512, 1, 7),
        (2, False, False, 512, 512, 9, 7),
        (4, False, True, 256, 256, 9, 14),
        (4, True, True, 128, 128, 9, 28),
        (2, False, True, 3, 64, 49, 112),
    ]:
        m = 256 * size * size
        for problem in (
            configs.Problem("fprop", m, k, taps * c, c, itemsize, ieee, formed),
            configs.Problem("dgrad", m, c, taps * k, k, itemsize, ieee, formed),
            configs.Problem("wgrad", k, taps * c, m, c, itemsize, ieee, formed),
        ):
            found = configs.candidates(problem, chip)
            assert 1 <= len(found) <= 4 and len(set(found)) == len(found)
            for config in found:
                assert configs._shared(config, problem) <= chip.shared
                assert min(config.block_m, config.block_n, config.block_k) >= 16 and config.num_stages >= 2
                assert 1 <= config.splits <= max(1, -(-problem.k // config.block_k))
            if target == "sm_90" and problem.kind != "wgrad" and problem.n <= 64:
                assert found[0].block_n <= 64


def test_phases_cover_every_tap_once() -> None:
    """The taps of one axis by their definition, h = p*stride - padding + r*dilation."""
    for size, kernel, stride, padding, dilation in [
        (7, 3, 1, 1, 1), (7, 3, 2, 1, 1), (8, 7, 2, 3, 1), (9, 3, 2, 2, 2), (9, 3, 3, 2, 2), (10, 5, 4, 3, 6),
        (5, 1, 2, 0, 1), (2, 1, 3, 1, 1), (8, 2, 2, 0, 1), (11, 4, 6, 4, 4),
    ]:  # fmt: skip
        out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        want = {
            (p * stride - padding + r * dilation, p, r) for p in range(out) for r in range(kernel)
            if 0 <= p * stride - padding + r * dilation < size
        }  # fmt: skip
        got = []
        rows = []
        for f in geometry.Phase.all(size, out, kernel, stride, padding, dilation):
            for i in range(f.size):
                rows.append(f.phase + i * stride)
                places = [(i + f.first - j * f.step, f.tap + j * f.tap_step) for j in range(f.taps)]
                assert f.masked or all(0 <= p < out for p, _ in places)
                got += [(rows[-1], p, r) for p, r in places if 0 <= p < out]
        assert sorted(rows) == list(range(size))
        assert len(got) == len(set(got)) and set(got) == want
