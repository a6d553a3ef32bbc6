"""Seeds, backends and the reason for every skip: what all tests share."""

from __future__ import annotations

import gc
import os
import shutil
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import captures
import cuda_build
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture.engine import ConjectureRunner
from source_tree import copy_to

from fused_resnet.backends import load, use_backend, warn_once
from fused_resnet.planner import sizes

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter; it asks once, at its import
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Generated tests: the same examples every time; other ones, and more: --hypothesis-profile=hunt.
settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, max_examples=80, print_blob=False,
    phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.register_profile(
    "hunt", settings.get_profile("fixed"), derandomize=False, max_examples=2000, phases=list(Phase)
)
settings.load_profile("fixed")
# Every example is drawn by itself. Mutations of one, of which hypothesis tries up to five, mostly repeat its program:
# of 200 examples with mutations 89 had different programs, of 100 without 99.
ConjectureRunner.generate_mutations_from = lambda self, data: None  # type: ignore[method-assign]

# The backends that serve a CPU; those of a GPU have tests of their own (marked gpu).
CPU_BACKENDS = ("aten", "cpu")
# Those that a CPU only interprets, or runs from CUDA's sources, slowly: tests of small shapes ask for them by the
# fixture ``interpreted``.
INTERPRETED = ("triton", "cudnn", "cuda")


def seed_of(nodeid: str) -> int:
    """A fixed seed per test, another one for each. It depends on the file's name, not on the folder of the file."""
    file, _, test = nodeid.partition("::")
    return zlib.crc32(f"tests/{Path(file).name}::{test}".encode())


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Every test starts from its own fixed random numbers, whichever tests ran before it."""
    value = seed_of(request.node.nodeid)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def chains_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains run at any size, in every thread: tests' images are small. tests/planner/test_sizes.py does without."""
    monkeypatch.setattr(sizes, "faster", lambda *args: sizes.CHAINS)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tensors so small that threads cost more than they bring; and sums are of one order everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_one_thread() -> Iterator[None]:
    """As ``one_thread``, for one test of a module whose others run in several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Dynamo knows nothing of what other tests captured, and they nothing of what this one does."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure names its seed."""
    report = yield
    if report.failed:
        report.sections.append(("seed", f"torch.manual_seed({seed_of(item.nodeid)})"))
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all tests, also those marked full, in every variation")
    parser.addoption("--beside-seconds", default=1, type=float, help="how long each test of test_beside.py serves")


# Files whose few tests take longest: they come first, so that no worker has them left when the others are done.
LONGEST = [
    "test_living_models.py", "test_real_sizes.py", "test_guides.py", "test_architectures.py",
    "test_other_architectures.py", "test_living_frozen.py", "test_studies.py", "test_sync_batchnorm.py", "test_cli.py",
    "test_wrappers.py", "test_swap.py", "test_freezing.py", "test_packaging.py",
]  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if not config.getoption("--full"):
        left = [item for item in items if item.get_closest_marker("full") and not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    captures.cheaper()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once per backend, every primitive of it on that backend and no other."""
    module, reason = load(request.param)
    if module is None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=INTERPRETED)
def interpreted(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, for the backends that are interpreted; on a GPU they have tests of their own."""
    if request.param == "cuda":
        if request.getfixturevalue("cuda_device") != "cpu":
            pytest.skip("backend 'cuda': on a GPU here")
        with use_backend("cuda"):
            yield "cuda"
        return
    module, reason = load(request.param)
    if module is None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    if torch.cuda.is_available():
        pytest.skip(f"backend {request.param!r}: compiled here, not interpreted")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """csrc/cuda compiled for this CPU, once for all sessions and workers (pytest-xdist)."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    if load("cpu")[0] is None:
        pytest.skip(f"the compiled extension, which has the schemas: {load('cpu')[1]}")
    return cuda_build.kept("cuda", cuda_build.build)


@pytest.fixture
def cuda_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the cuda backend's kernels run: on a GPU, or on the CPU, from the same sources."""
    if torch.cuda.is_available():
        module, reason = load("cuda")
        if module is None:
            pytest.skip(f"backend 'cuda': {reason}")
        yield "cuda"
        return
    cuda_build.use(request.getfixturevalue("cuda_library"))
    yield "cpu"
    cuda_build.use(None)


@pytest.fixture
def every_warning() -> None:
    """Warnings that come once per process come once per test."""
    warn_once.cache_clear()


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """As ``nan_filled``, also for what C++ allocates."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that comes uninitialised holds NaN (255 where it is bytes): what a kernel doesn't write shows."""
    empty = torch.empty

    def filled(*args: object, **kwargs: object) -> torch.Tensor:
        t = empty(*args, **kwargs)  # type: ignore[call-overload]
        return t.fill_(float("nan") if t.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, to build from."""
    return copy_to(tmp_path / "tree")
