"""What every study is made of: networks, the laboratory that trains each once, verdicts, and the files they leave."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fused_resnet.models import Bottleneck, CifarResNet, cifar_resnet
from fused_resnet.models.cifar import Shortcut
from fused_resnet.training import Callback, EpochRecord, History, ImageData, Recipe, Trainer

Figures = dict[str, Any]
Advance = Callable[[float, str], object]


@dataclass(frozen=True)
class Network:
    """One of the CIFAR family: its depth, its shortcut (None: plain) and its kind of blocks; ``recipe``: how it is
    trained, where that is not as the preset has it."""

    depth: int
    shortcut: Shortcut | None = "A"
    bottleneck: bool = False
    recipe: Recipe | None = None

    @property
    def name(self) -> str:
        """ "plain-20", "ResNet-20", "ResNet-20 B", "ResNet-29 bottleneck"."""
        if self.shortcut is None:
            return f"plain-{self.depth}"
        option = "" if self.shortcut == "A" else f" {self.shortcut}"
        return f"ResNet-{self.depth}{option}{' bottleneck' if self.bottleneck else ''}"

    def build(self, in_channels: int, num_classes: int, **kwargs: Any) -> CifarResNet:
        """The network, initialised by the default generator; kwargs as of ``models.cifar_resnet``."""
        block = Bottleneck if self.bottleneck else None
        kwargs = {"in_channels": in_channels, "num_classes": num_classes, "block": block} | kwargs
        return cifar_resnet(self.depth, shortcut=self.shortcut, **kwargs)


@dataclass(frozen=True)
class Preset:
    """The size of an experiment.

    Attributes:
        name: for the reader. data: reads the images, from a folder or None.
        recipe: how every network is trained; networks of ``warm_up_from`` layers and more by ``deep_recipe``.
        depths: of the plain and residual networks that are compared, shallowest first. deepest: residual only.
        shortcut_depth: of the networks with options A, B and C. bottleneck_depth: of the one with bottlenecks.
        all_seeds_up_to: deeper networks are trained with the first seed only.
        keep: trainings take hours: each writes checkpoints and logs, to go on with.
        extreme: layers of the network of which a few steps are run; extreme_batch: images of these.
        train_extreme: train it whole, too.
    """

    name: str
    data: Callable[[Path | None], ImageData]
    recipe: Recipe
    deep_recipe: Recipe
    depths: tuple[int, ...]
    deepest: int
    shortcut_depth: int
    bottleneck_depth: int
    all_seeds_up_to: int
    keep: bool = False
    extreme: int = 1202
    extreme_batch: int = 16
    train_extreme: bool = False
    warm_up_from: int = 110

    def recipe_of(self, network: Network) -> Recipe:
        """The network's own, or the preset's: the paper warms its networks of 110 layers and more up (section 4.2)."""
        return network.recipe or (self.deep_recipe if network.depth >= self.warm_up_from else self.recipe)


@dataclass
class Run:
    """A network that was trained: the model after the last step, every step and epoch, and the gradients' norms of
    each convolution at the first step of every epoch."""

    network: Network
    seed: int
    model: nn.Module
    history: History
    gradients: list[dict[str, Any]]

    def curve(self, key: str) -> list[float]:
        """One value per epoch of what the history calls ``key``."""
        return [record[key] for record in self.history.epochs]  # type: ignore[literal-required]


class _Watch(Callback):
    """Reports progress, and reads the gradients' norms at the first step of every epoch; ``file``, where there is one,
    keeps them for a training that is resumed."""

    def __init__(self, network: Network, advance: Advance, file: Path | None, resume: bool) -> None:
        self.network, self.advance, self.file = network, advance, file
        found = json.loads(file.read_text()) if file and resume and file.exists() else []
        self.norms: dict[int, dict[str, Any]] = {record["step"]: record for record in found}

    def on_step(self, trainer: Trainer, step: int, loss: Tensor) -> None:
        if step % trainer.steps_per_epoch == 0:
            self.norms[step] = {"step": step, "norms": weight_gradients(trainer.model)}
        self.advance(self.network.depth, self.network.name)

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        if self.file:  # before the checkpoint of this epoch, and whole or not at all
            written = self.file.with_suffix(".tmp")
            written.write_text(json.dumps(list(self.norms.values())))
            written.replace(self.file)


def weight_gradients(model: nn.Module) -> list[float]:
    """The gradient's L2 norm of each 3x3 convolution, first to last layer."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    grads = [m.weight.grad for m in convs if m.weight.grad is not None]
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]).tolist()


class Laboratory:
    """Trains each network once per recipe and seed, however many studies ask for it.

    Args:
        preset, data: the experiment's size and its images.
        seeds: one training per network, recipe and seed. device: to run on.
        advance: told of work done, in steps times layers, and of what is being done.
        folder: where the trainings of a preset that keeps them go. resume: go on with those that are there.
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
    ) -> None:
        self.preset, self.data, self.seeds, self.device, self.advance = preset, data, tuple(seeds), device, advance
        self.folder, self.resume = folder if preset.keep else None, resume
        self._runs: dict[tuple[Network, int], Run] = {}

    def seeds_of(self, network: Network) -> tuple[int, ...]:
        """With which the network is trained."""
        return self.seeds if network.depth <= self.preset.all_seeds_up_to else self.seeds[:1]

    def _resolved(self, network: Network) -> Network:
        """The same for all that are built and trained alike, whether the recipe is the preset's or their own."""
        return replace(network, recipe=self.preset.recipe_of(network))

    def _folder_of(self, network: Network, seed: int) -> Path | None:
        """Where the training is kept; the name tells in what the recipe is not the preset's."""
        if self.folder is None:
            return None
        recipe, usual = self.preset.recipe_of(network), self.preset.recipe_of(replace(network, recipe=None))
        pairs = [(f.name, getattr(recipe, f.name), getattr(usual, f.name)) for f in fields(recipe)]
        own = "".join(f" {name}={here}" for name, here, there in pairs if here != there)
        return self.folder / f"{network.name} seed {seed}{own}".replace(" ", "-")

    def work(self, networks: Iterable[Network]) -> float:
        """What training them will tell ``advance`` in all."""
        total = 0.0
        for network in {self._resolved(network) for network in networks}:
            recipe = self.preset.recipe_of(network)
            steps = recipe.epochs * (len(self.data.train_x) // recipe.batch_size)
            total += network.depth * steps * len(self.seeds_of(network))
        return total

    def build(self, network: Network, seed: int, **kwargs: Any) -> CifarResNet:
        """The network with the weights that ``seed`` gives, on the device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return network.build(self.data.channels, len(self.data.classes), **kwargs).to(self.device)

    def train(self, network: Network, seed: int) -> Run:
        """The network trained by its recipe; the same run when it is asked for again."""
        key = (self._resolved(network), seed)
        if key not in self._runs:
            output = self._folder_of(network, seed)
            resume = self.resume and output is not None
            watch = _Watch(network, self.advance, output / "gradients.json" if output else None, resume)
            model, recipe = self.build(network, seed), self.preset.recipe_of(network)
            trainer = Trainer(
                model, self.data, recipe, device=self.device, seed=seed, output=output, callbacks=[watch], resume=resume
            )
            self.advance(network.depth * trainer.step, network.name)
            history = trainer.run()
            self._runs[key] = Run(network, seed, model, history, [watch.norms[s] for s in sorted(watch.norms)])
        return self._runs[key]

    def runs(self, network: Network) -> list[Run]:
        """One per seed."""
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
    """How much larger the mean of one sample is than another's, and the standard error of that."""

    value: float
    error: float

    @staticmethod
    def of(a: Sequence[float], b: Sequence[float]) -> Difference:
        """mean(a) - mean(b); NaN counts as larger than anything."""
        a, b = ([math.inf if math.isnan(v) else v for v in sample] for sample in (a, b))
        variances = [
            statistics.variance(s) / len(s) if len(s) > 1 and all(map(math.isfinite, s)) else 0 for s in (a, b)
        ]
        value = statistics.fmean(a) - statistics.fmean(b)
        return Difference(0.0 if math.isnan(value) else value, math.sqrt(sum(variances)))

    @property
    def positive(self) -> bool:
        """Beyond two standard errors; of single runs, whose error nobody knows, beyond nothing."""
        return self.value > 2 * self.error

    def __str__(self) -> str:
        return f"{self.value:+.3g} ± {self.error:.2g}"


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """Mean and standard deviation, as text; of a training that diverged, the mean."""
    mean = f"{scale * statistics.fmean(values):.{digits}g}"
    several = len(values) > 1 and all(map(math.isfinite, values))
    return f"{mean} ± {scale * statistics.stdev(values):.1g}" if several else mean


def beside_published(networks: Mapping[str, Figures], published: Mapping[str, float]) -> str:
    """ " Test error beside the paper's: ..." of the networks whose error in per cent is published; else nothing."""
    found = [
        f"{name} {spread(finals(n, 'test_error'), 100)} % ({published[name]} %)"
        for name, n in networks.items()
        if name in published
    ]
    return f" Test error beside the paper's: {', '.join(found)}." if found else ""


# ---------------------------------------------------------------------------------------------------- studies
@dataclass(frozen=True)
class Verdict:
    """Whether one claim held, and the numbers in a sentence."""

    claim: str
    held: bool
    sentence: str


@dataclass(frozen=True)
class Study:
    """One experiment of the paper.

    Attributes:
        name: on the command line. title: for the reader. claim: in the paper's words. source: where it stands.
        networks: those that are trained, by the preset.
        measure: everything that is found, as what JSON can hold. judge, draw: from that alone. size: of the picture.
        work: steps times layers that ``measure`` takes beyond training.
    """

    name: str
    title: str
    claim: str
    source: str
    networks: Callable[[Preset], list[Network]]
    measure: Callable[[Laboratory], Figures]
    judge: Callable[[Figures], list[Verdict]]
    draw: Callable[[Figures, Figure], None]
    work: Callable[[Preset], float] = lambda preset: 0.0
    size: tuple[float, float] = (9, 3.8)

    def run(self, lab: Laboratory) -> Result:
        """Measures and judges.

        Args:
            lab: shared among studies that ask for the same networks.
        """
        found = as_read_back(self.measure(lab))
        return Result(self, found, self.judge(found))


@dataclass(frozen=True)
class Result:
    """What came of a study."""

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
            environment: where and how it was measured; put before everything else in the JSON file.
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
    """What comes back from a JSON file: keys as text, tuples as lists; floats at six digits."""
    if isinstance(value, Mapping):
        return {str(k): as_read_back(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_read_back(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _spelled(value: Any) -> Any:
    """Infinities and NaN, of which JSON knows nothing, as text."""
    if isinstance(value, dict):
        return {k: _spelled(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_spelled(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------- drawing
COLOURS = ("#4c78a8", "#e4572e", "#54a24b", "#b279a2", "#9aa0a6")


def draw_curves(ax: Any, networks: Mapping[str, Figures], key: str, label: str, scale: float = 1.0) -> None:
    """The mean over the seeds as a line, the least and the largest as a band; plain networks dashed."""
    for (name, network), colour in zip(networks.items(), cycle(COLOURS), strict=False):
        curves = network[key]
        epochs = range(1, len(curves[0]) + 1)
        columns = [[scale * v for v in column] for column in zip(*curves, strict=True)]
        style = "--" if network["network"]["shortcut"] is None else "-"
        ax.plot(epochs, [statistics.fmean(c) for c in columns], color=colour, linestyle=style, label=name)
        ax.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15)
    ax.set_xlabel("epoch")
    ax.set_ylabel(label)
    tidy(ax)


def tidy(ax: Any, legend: bool = True) -> None:
    """No box, a small legend."""
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(frameon=False, fontsize=8)
