"""The parts of every study: networks, the laboratory that trains each once, verdicts, output files."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fused_resnet.planner.sizes import chains_always
from fused_resnet.studies import paper
from fused_resnet.studies.pool import Advance, side_by_side
from fused_resnet.studies.trainings import Network, Run, Training, train
from fused_resnet.training import ImageData, Recipe

Figures = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """The size of an experiment.

    Attributes:
        name: the name in reports. data: reads the images, from a folder or None.
        recipe: the recipe of every network; ``deep_recipe`` that of networks with ``warm_up_from`` layers or more.
        depths: depths of the plain and residual networks that are compared, shallowest first. deepest: residual only.
        shortcut_depth: depth of the networks with options A, B and C. bottleneck_depth: of the one with bottlenecks.
        response_depths: depths of the plain and of the residual networks whose responses are compared.
            response_recipe: their recipe, if it is not ``recipe``.
        all_seeds_up_to: deeper networks are trained with the first seed only.
        keep: each training writes checkpoints and logs to continue from, because trainings take hours.
        extreme: depth of the network that takes only a few steps. extreme_batch: images per step.
        train_extreme: also train that network whole.
    """

    name: str
    data: Callable[[Path | None], ImageData]
    recipe: Recipe
    deep_recipe: Recipe
    depths: tuple[int, ...]
    deepest: int
    shortcut_depth: int
    bottleneck_depth: int
    response_depths: tuple[tuple[int, ...], tuple[int, ...]]
    all_seeds_up_to: int
    response_recipe: Recipe | None = None
    keep: bool = False
    extreme: int = 1202
    extreme_batch: int = 16
    train_extreme: bool = False
    warm_up_from: int = 110

    def recipe_of(self, network: Network) -> Recipe:
        """The network's own recipe, or the preset's. The paper warms up networks of 110 layers and more (4.2)."""
        return network.recipe or (self.deep_recipe if network.depth >= self.warm_up_from else self.recipe)


class Laboratory:
    """Trains each network once per recipe and seed, however many studies ask for it.

    On a CPU every training runs with one thread, and several run side by side. The results are the same for any
    number of processes.

    Args:
        preset, data: the experiment's size and its images.
        seeds: one training per network, recipe and seed. device: the device of the trainings.
        advance: called with work done, in steps times layers, and the names of the running tasks.
        folder: holds the trainings of a preset that keeps them. resume: continue those in the folder.
        processes: trainings at a time; 1: in this process. See :func:`fused_resnet.studies.pool.side_by_side`.

    Attributes:
        training_s: seconds spent in training so far.
    """

    def __init__(
        self,
        preset: Preset,
        data: ImageData,
        seeds: Sequence[int],
        device: torch.device,
        advance: Advance = lambda work, what: None,
        folder: Path | None = None,
        resume: bool = False,
        processes: int = 1,
    ) -> None:
        self.preset, self.data, self.seeds, self.device, self.advance = preset, data, tuple(seeds), device, advance
        self.folder, self.resume, self.processes = folder if preset.keep else None, resume, processes
        self.training_s = 0.0
        self._runs: dict[Training, Run] = {}

    def seeds_of(self, network: Network) -> tuple[int, ...]:
        """The seeds with which the network is trained."""
        return self.seeds if network.depth <= self.preset.all_seeds_up_to else self.seeds[:1]

    def _training(self, network: Network, seed: int) -> Training:
        """The network's training, the same whether it names the preset's recipe or none; its folder names any other."""
        recipe, usual = self.preset.recipe_of(network), self.preset.recipe_of(replace(network, recipe=None))
        network = replace(network, recipe=None if recipe == usual else recipe)
        pairs = [(f.name, getattr(recipe, f.name), getattr(usual, f.name)) for f in fields(recipe)]
        own = "".join(f" {name}={here}" for name, here, there in pairs if here != there)
        folder = self.folder / f"{network.name} seed {seed}{own}".replace(" ", "-") if self.folder else None
        return Training(network, recipe, seed, folder)

    def _trainings(self, networks: Iterable[Network]) -> list[Training]:
        """Each training once, the longest first, so that none runs alone at the end."""
        found = dict.fromkeys(self._training(n, seed) for n in networks for seed in self.seeds_of(n))
        return sorted(found, key=lambda training: -training.work(len(self.data.train_x)))

    def work(self, networks: Iterable[Network]) -> float:
        """The total work that training the networks will report."""
        return sum(training.work(len(self.data.train_x)) for training in self._trainings(networks))

    def _train(self, trainings: Iterable[Training]) -> None:
        """Runs the trainings that have not run yet."""
        waiting, begun = [t for t in trainings if t not in self._runs], time.perf_counter()
        one = partial(train, data=self.data, device=self.device, resume=self.resume)
        self._runs |= zip(waiting, side_by_side(one, waiting, self.processes, self.advance), strict=True)
        self.training_s += time.perf_counter() - begun

    def prepare(self, networks: Iterable[Network]) -> None:
        """Trains the networks with every seed in advance, ``processes`` at a time."""
        self._train(self._trainings(networks))

    def train(self, network: Network, seed: int) -> Run:
        """The network trained by its recipe. A second call returns the same run."""
        training = self._training(network, seed)
        self._train([training])
        return self._runs[training]

    def runs(self, network: Network) -> list[Run]:
        """One run per seed."""
        self.prepare([network])
        return [self.train(network, seed) for seed in self.seeds_of(network)]

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` training images as a network sees them, not augmented, and their labels."""
        assert isinstance(self.data.train_x, Tensor)
        return self.data.normalise(self.data.train_x[:count].to(self.device)), self.data.train_y[:count].to(self.device)


CURVES = ("train_loss", "train_error", "test_loss", "test_error")


def summary(runs: Sequence[Run]) -> Figures:
    """The curves of one network, one list per seed."""
    curves = {key: [run.curve(key) for run in runs] for key in CURVES}
    return {"network": asdict(runs[0].network), "seeds": [run.seed for run in runs], **curves}


def finals(network: Figures, key: str) -> list[float]:
    """The last epoch's value of each seed."""
    return [curve[-1] for curve in network[key]]


# ---------------------------------------------------------------------------------------------------- telling apart
@dataclass(frozen=True)
class Difference:
    """The difference of the means of two samples, and the standard error of the difference."""

    value: float
    error: float

    @staticmethod
    def of(a: Sequence[float], b: Sequence[float]) -> Difference:
        """mean(a) - mean(b); NaN counts as larger than anything."""
        a, b = ([math.inf if math.isnan(v) else v for v in sample] for sample in (a, b))
        several = [s for s in (a, b) if len(s) > 1 and all(map(math.isfinite, s))]
        variances = [statistics.variance(s) / len(s) for s in several]
        value = statistics.fmean(a) - statistics.fmean(b)
        return Difference(0.0 if math.isnan(value) else value, math.sqrt(sum(variances)))

    @property
    def positive(self) -> bool:
        """Whether it exceeds two standard errors. Single runs have no known error: whether it exceeds 0."""
        return self.value > 2 * self.error

    @property
    def points(self) -> str:
        """As text, in percentage points."""
        return f"{100 * self.value:+.2g} ± {100 * self.error:.1g} points"

    def __str__(self) -> str:
        return f"{self.value:+.3g} ± {self.error:.2g}"


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """Mean and standard deviation as text; if a training diverged, the mean alone."""
    mean = f"{scale * statistics.fmean(values):.{digits}g}"
    several = len(values) > 1 and all(map(math.isfinite, values))
    return f"{mean} ± {scale * statistics.stdev(values):.1g}" if several else mean


PUBLISHED = "published_test_error_percent"


def published(lab: Laboratory) -> Figures:
    """The paper's test errors, where the images are the paper's."""
    errors = {f"ResNet-{d}": e for d, e in paper.CIFAR10_ERROR.items()} if lab.data.name == "cifar10" else {}
    return {PUBLISHED: errors}


def beside_published(networks: Mapping[str, Figures], figures: Figures) -> str:
    """ " Test error beside the paper's: ..." for networks whose error in per cent is published; otherwise ""."""
    errors = figures[PUBLISHED]
    found = [
        f"{name} {spread(finals(n, 'test_error'), 100)} % ({errors[name]} %)"
        for name, n in networks.items()
        if name in errors
    ]
    return f" Test error beside the paper's: {', '.join(found)}." if found else ""


# ---------------------------------------------------------------------------------------------------- studies
@dataclass(frozen=True)
class Verdict:
    """Whether one claim held, and a sentence with the numbers."""

    claim: str
    held: bool
    sentence: str


class Study:
    """One experiment of the paper. By default the curves of its networks are measured, and two of them drawn.

    Attributes:
        name: the name on the command line. title: the heading. claim: in the paper's words. source: its place there.
        size: the picture's. curves: what ``draw`` shows, side by side: key, label, factor.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    claim: ClassVar[str]
    source: ClassVar[str]
    size: ClassVar[tuple[float, float]] = (9, 3.8)
    curves: ClassVar[Sequence[tuple[str, str, float]]] = (
        ("train_loss", "training loss", 1),
        ("test_error", "test error, %", 100),
    )

    def networks(self, preset: Preset) -> list[Network]:
        """The networks that are trained."""
        raise NotImplementedError

    def work(self, preset: Preset) -> float:
        """Steps times layers that ``measure`` takes beyond training."""
        return 0.0

    def measure(self, lab: Laboratory) -> Figures:
        """All figures, as values that JSON can hold. ``judge`` and ``draw`` see only these."""
        return {"networks": {n.name: summary(lab.runs(n)) for n in self.networks(lab.preset)}}

    def judge(self, figures: Figures) -> list[Verdict]:
        """A verdict for each claim."""
        raise NotImplementedError

    def draw(self, figures: Figures, figure: Figure) -> None:
        """Draws the figures."""
        axes = figure.subplots(1, len(self.curves))
        for ax, (key, label, scale) in zip(axes, self.curves, strict=True):
            draw_curves(ax, figures["networks"], key, label, scale)

    def run(self, lab: Laboratory) -> Result:
        """Measures and judges.

        Args:
            lab: shared by studies that use the same networks.
        """
        with chains_always():
            found = as_read_back(self.measure(lab))
        return Result(self, found, self.judge(found))


@dataclass(frozen=True)
class Result:
    """The results of a study."""

    study: Study
    figures: Figures
    verdicts: list[Verdict]

    @property
    def held(self) -> bool:
        """Every claim of the study."""
        return all(v.held for v in self.verdicts)

    def to_json(self) -> Figures:
        """Claim, verdicts, figures; infinities and NaN as text."""
        study = {"study": self.study.name, "claim": self.study.claim, "source": self.study.source}
        verdicts = [asdict(v) for v in self.verdicts]
        return study | {"held": self.held, "verdicts": verdicts, "figures": _spelled(self.figures)}

    def save(self, folder: Path, environment: Mapping[str, Any]) -> list[Path]:
        """Writes NAME.json and NAME.png to ``folder``.

        Args:
            environment: the machine, versions and settings; the JSON file begins with it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text, picture = folder / f"{self.study.name}.json", folder / f"{self.study.name}.png"
        text.write_text(json.dumps({**environment, **self.to_json()}, indent=1) + "\n")
        figure = Figure(figsize=self.study.size, layout="constrained")
        self.study.draw(self.figures, figure)
        figure.suptitle(f"{self.study.title} ({environment['preset']} preset)", fontsize=11)
        figure.savefig(picture, dpi=110)
        return [text, picture]


def as_read_back(value: Any) -> Any:
    """The value as a JSON file returns it: keys as text, tuples as lists; floats with six digits."""
    return json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.6g}"))


def _spelled(value: Any) -> Any:
    """The value with infinities and NaN, which JSON lacks, as text."""
    spelled = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}
    return json.loads(json.dumps(value), parse_constant=spelled.__getitem__)


# ---------------------------------------------------------------------------------------------------- drawing
COLOURS = ("#4c78a8", "#e4572e", "#54a24b", "#b279a2", "#9aa0a6")
GREY = COLOURS[-1]


def draw_curves(ax: Any, networks: Mapping[str, Figures], key: str, label: str, scale: float = 1.0) -> None:
    """Draws the mean over the seeds as a line, and minimum to maximum as a band; plain networks are dashed."""
    for (name, network), colour in zip(networks.items(), cycle(COLOURS), strict=False):
        columns = [[scale * v for v in column] for column in zip(*network[key], strict=True)]
        epochs = range(1, len(columns) + 1)
        style = "--" if network["network"]["shortcut"] is None else "-"
        ax.plot(epochs, [statistics.fmean(c) for c in columns], color=colour, linestyle=style, label=name)
        ax.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15)
    tidy(ax, "epoch", label)


def tidy(ax: Any, x: str = "", y: str = "", legend: bool = True) -> None:
    """Labels the axes, removes the box and adds a small legend."""
    ax.set(xlabel=x, ylabel=y)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(frameon=False, fontsize=8)
