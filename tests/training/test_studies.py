"""The paper's experiments: counts equal its tables, and every study runs end to end."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cifar_files import write_binary
from source_tree import ROOT
from torch import nn

from fused_resnet import models, studies
from fused_resnet.cli import main
from fused_resnet.cli import study as command
from fused_resnet.models import Bottleneck
from fused_resnet.studies import (
    STUDIES,
    Laboratory,
    Network,
    comparisons,
    costs,
    curves,
    gradients,
    responses,
)
from fused_resnet.studies.study import Difference, as_read_back, summary
from fused_resnet.studies.trainings import weight_gradients
from fused_resnet.training import Recipe, Trainer

# Table 6: parameters in millions.
CIFAR10_PARAMETERS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}
# In 10^6. The paper gives no parameters of its ImageNet networks; every implementation has these.
IMAGENET_PARAMETERS = {"resnet18": 11.69, "resnet50": 25.56}
CPU = torch.device("cpu")
DIGITS = studies.PRESETS["quick"].data


pytestmark = pytest.mark.usefixtures("one_thread")


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return getattr(models, name)(fused=False)


# ---------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize(("depth", "millions"), list(CIFAR10_PARAMETERS.items()))
def test_parameters_are_table_6s(depth: int, millions: float) -> None:
    digits = len(str(millions).split(".")[1])
    assert round(costs.parameters(meta(f"resnet{depth}")) / 1e6, digits) == millions


@pytest.mark.parametrize(("name", "millions"), list(IMAGENET_PARAMETERS.items()))
def test_parameters_of_imagenet_networks(name: str, millions: float) -> None:
    assert round(costs.parameters(meta(name)) / 1e6, 2) == millions


def test_multiply_adds_are_table_1s() -> None:
    """Within 2 %: the paper gives two digits, some of them cut, not rounded (ResNet-50's 3.86 is its 3.8)."""
    found = comparisons.imagenet_costs()
    assert list(found) == [f"ResNet-{depth}" for depth in (18, 34, 50, 101, 152)]
    for name, entry in found.items():
        assert entry["multiply_adds"] == pytest.approx(entry["published_multiply_adds"], rel=0.02), name
    # with the stride in the 3x3, as torchvision has it and states it: 4.09, 7.80, 11.51
    for depth, here in ((50, 4.09), (101, 7.80), (152, 11.51)):
        assert found[f"ResNet-{depth}"]["multiply_adds_here"] / 1e9 == pytest.approx(here, abs=0.006)


def test_stride_first_moves_the_stride_and_nothing_else() -> None:
    here, moved = meta("resnet50"), costs.stride_first(meta("resnet50"))
    assert [(k, v.shape) for k, v in moved.state_dict().items()] == [(k, v.shape) for k, v in here.state_dict().items()]
    blocks = [m for m in moved.modules() if isinstance(m, Bottleneck)]
    assert {b.conv2.stride for b in blocks} == {(1, 1)} and sum(b.conv1.stride == (2, 2) for b in blocks) == 3


def test_multiply_adds_by_hand() -> None:
    with torch.device("meta"):
        model = Network(8).build(1, 7)
    stem, same = 64 * 9 * 16, 9 * 16 * 16 * 64
    stages = 2 * same + (same // 2 + same) + (same // 2 + same)  # half the size and twice the channels: as much again
    assert costs.multiply_adds(model, 1, 8) == stem + stages + 64 * 7


@pytest.mark.parametrize(("network", "name"), [
    (Network(20, None), "plain-20"), (Network(20), "ResNet-20"), (Network(20, "B"), "ResNet-20 B"),
    (Network(29, "A", True), "ResNet-29 bottleneck"),
])  # fmt: skip
def test_networks_are_what_they_are_called(network: Network, name: str) -> None:
    model = network.build(1, 10, fused=False)
    assert network.name == name
    weighted = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]
    assert len(weighted) == network.depth
    assert any(isinstance(m, Bottleneck) for m in model.modules()) is network.bottleneck


# ---------------------------------------------------------------------------------------------------- end to end
def toy_preset() -> studies.Preset:
    recipe = Recipe(epochs=4, batch_size=32)
    sizes = {"depths": (8, 14), "deepest": 20, "shortcut_depth": 8, "bottleneck_depth": 11, "all_seeds_up_to": 14}
    sizes |= {"extreme": 26, "extreme_batch": 4, "warm_up_from": 20, "response_depths": ((8,), (8, 14))}
    sizes |= {"response_recipe": replace(recipe, epochs=1, weight_decay=1e-3)}
    deep_recipe = replace(recipe, warmup="error")
    return replace(studies.PRESETS["quick"], name="toy", recipe=recipe, deep_recipe=deep_recipe, data=toy_data, **sizes)


def toy_data(folder: Path | None) -> Any:
    data = DIGITS(folder)
    few = {"train_x": data.train_x[:64], "train_y": data.train_y[:64]}
    return replace(data, **few, test_x=data.test_x[:32], test_y=data.test_y[:32])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All studies once, as the command runs them; and which trainings that took."""
    folder, trained = tmp_path_factory.mktemp("studies"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(studies.PRESETS, "quick", toy_preset())
        patch.setattr(
            Trainer,
            "run",
            lambda self, run=Trainer.run: trained.append((repr(self.model), self.recipe, self.seed)) or run(self),
        )
        advanced: list[float] = []
        patch.setattr(command, "Laboratory", lambda *args, **kw: _counting(Laboratory(*args, **kw), advanced))
        # in this process, where patches are seen
        words = ["study", "all", "--seeds", "3,5", "--device", "cpu", "--processes", "1", "--output", str(folder)]
        code = main([*words, "--json", str(folder / "everything.json")])
    return {"folder": folder, "trained": trained, "code": code, "advanced": sum(advanced)}


def _counting(lab: Laboratory, advanced: list[float]) -> Laboratory:
    advance = lab.advance
    lab.advance = lambda work, what: (advanced.append(work), advance(work, what))
    return lab


@pytest.mark.parametrize("name", list(STUDIES))
def test_study_runs_end_to_end(name: str, ran: dict[str, Any]) -> None:
    found = json.loads((ran["folder"] / f"{name}.json").read_text())
    assert {"date", "device", "machine", "versions", "seeds", "preset", "recipe", "claim", "figures"} <= set(found)
    assert found["processes"] == 1
    assert found["study"] == name and found["seeds"] == [3, 5] and found["preset"] == "toy"
    assert found["held"] == all(v["held"] for v in found["verdicts"]) and found["verdicts"]
    for verdict in found["verdicts"]:
        assert re.search(r"\d", verdict["sentence"]) and verdict["sentence"].endswith((".", ".)"))
    assert (ran["folder"] / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # the verdict comes from the figures that are written, and from nothing else
    again = STUDIES[name].judge(found["figures"])
    assert [(v.held, v.sentence) for v in again] == [(v["held"], v["sentence"]) for v in found["verdicts"]]


def test_all_trains_each_network_once_and_says_how_far_it_is(ran: dict[str, Any]) -> None:
    assert ran["code"] == 0  # although at this size hardly a claim holds
    everything = json.loads((ran["folder"] / "everything.json").read_text())
    assert [s["study"] for s in everything["studies"]] == list(STUDIES) and not all(
        s["held"] for s in everything["studies"]
    )
    # a study's time is its own: trainings are counted once, by themselves
    files = [json.loads((ran["folder"] / f"{name}.json").read_text()) for name in STUDIES]
    assert max(f["training_s"] for f in files) == everything["training_s"] > 0
    measured = sum(f["elapsed_s"] for f in files)
    assert 0 < measured < everything["elapsed_s"] - everything["training_s"] + 0.05 * len(files)
    # plain-8, plain-14, ResNet-8, -14, B, C and bottleneck for both seeds, ResNet-20 for the first; and those whose
    # responses are compared, plain-8, ResNet-8 and -14, by another recipe
    assert len(ran["trained"]) == len(set(ran["trained"])) == (7 + 3) * 2 + 1
    preset = toy_preset()
    lab = Laboratory(preset, toy_data(None), [3, 5], CPU)
    networks = [n for s in STUDIES.values() for n in s.networks(preset)]
    assert ran["advanced"] == lab.work(networks) + sum(s.work(preset) for s in STUDIES.values())


def test_runs_are_the_same_in_any_number_of_processes() -> None:
    """Bit for bit, whatever the number of threads here."""
    networks, told = [Network(8), Network(8, None), Network(11, "A", True)], []
    torch.set_num_threads(2)
    try:
        labs = [
            Laboratory(toy_preset(), toy_data(None), [3, 5], CPU, lambda *words: told.append(words), processes=n)
            for n in (1, 2)
        ]
        for lab in labs:
            told.clear()
            lab.prepare(networks)
            assert sum(work for work, _ in told) == lab.work(networks) and torch.get_num_threads() == 2
            lab.processes = 0  # all are there: nobody is asked to train
        x = labs[0].images(16)[0]
        for network in networks:
            for here, there in zip(*(lab.runs(network) for lab in labs), strict=True):
                assert (here.network, here.seed, here.gradients) == (there.network, there.seed, there.gradients)
                assert here.history.steps == there.history.steps and len(here.history.steps) == 8
                for key in ("train_loss", "train_error", "test_loss", "test_error"):
                    assert here.curve(key) == there.curve(key)
                pairs = zip(here.model.state_dict().values(), there.model.state_dict().values(), strict=True)
                assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs)
                assert responses.responses(here.model, x) == responses.responses(there.model, x)
    finally:
        torch.set_num_threads(1)


def test_trainings_that_are_kept_are_not_done_again(tmp_path: Path) -> None:
    preset, data = replace(toy_preset(), keep=True), toy_data(None)
    first = Laboratory(preset, data, [0], CPU, folder=tmp_path).train(Network(8), 0)
    steps: list[float] = []
    again = Laboratory(preset, data, [0], CPU, lambda work, what: steps.append(work), tmp_path, True).train(
        Network(8), 0
    )
    assert steps == [8 * 8]  # told at once: 4 epochs of 2 steps
    assert again.history == first.history and again.gradients == first.gradients and len(first.gradients) == 4
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    fresh = Laboratory(preset, data, [0], CPU, folder=tmp_path).train(Network(8), 0)
    assert fresh.curve("train_loss") == first.curve("train_loss")  # from the start: the seed decides


def test_a_network_may_have_a_recipe_of_its_own(tmp_path: Path) -> None:
    preset = replace(toy_preset(), keep=True)
    usual, short = Network(8), Network(8, recipe=replace(preset.recipe, epochs=2, lr=0.01))
    lab = Laboratory(preset, toy_data(None), [4], CPU, folder=tmp_path)
    first, second = lab.train(usual, 4), lab.train(short, 4)
    assert first.network == usual and second.network == short
    rates = [[s["lr"] for s in run.history.steps] for run in (first, second)]
    assert rates[0] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    assert rates[1] == pytest.approx([0.01] * 2 + [0.001, 0.0001])
    assert first.history.steps[0]["loss"] == second.history.steps[0]["loss"]  # the same weights, the same batch
    # the preset's recipe is the same training, whether a network names it or not
    named = Network(8, recipe=preset.recipe)
    assert lab.train(named, 4) is first and lab.work([usual, named]) == lab.work([usual]) == 8 * 8
    assert lab.work([usual, short]) == 8 * 8 + 8 * 4
    folders = {folder.name for folder in tmp_path.iterdir()}
    assert folders == {"ResNet-8-seed-4", "ResNet-8-seed-4-epochs=2-lr=0.01"}
    assert summary([second])["network"]["recipe"]["epochs"] == 2


@pytest.mark.full
@pytest.mark.slow
def test_paper_preset_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On made-up files of CIFAR-10's form, at toy size: the paper's numbers beside ours, and nothing trained twice."""
    preset = studies.PRESETS["paper"]
    assert preset.recipe == Recipe() and preset.deep_recipe == replace(Recipe(), warmup="error")
    assert {network.depth for network in STUDIES["degradation"].networks(preset)} == {20, 32, 44, 56}
    recipe = Recipe(epochs=2, batch_size=16)
    monkeypatch.setitem(studies.PRESETS, "paper", replace(preset, recipe=recipe, depths=(8, 20)))
    write_binary(tmp_path)
    words = ["study", "degradation", "convergence", "--preset", "paper", "--data", str(tmp_path), "--seeds", "1"]
    words += ["--device", "cpu", "--output", str(tmp_path / "out")]
    assert main([*words, "--processes", "2"]) == 0
    first = json.loads((tmp_path / "out" / "degradation.json").read_text())
    assert re.search(r"ResNet-20 \d.* % \(8.75 %\)", first["verdicts"][1]["sentence"])
    assert len(list((tmp_path / "out" / "runs").glob("*/checkpoint.pt"))) == 4
    capsys.readouterr()
    assert main(words) == 2
    assert "--resume continues them" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "_update", None)
    assert main([*words, "--processes", "1", "--resume"]) == 0
    again = json.loads((tmp_path / "out" / "degradation.json").read_text())
    assert again["figures"] == first["figures"]
    monkeypatch.setitem(studies.PRESETS, "paper", replace(preset, recipe=replace(recipe, lr=0.2), depths=(8, 20)))
    for processes in ("1", "2"):
        assert main([*words, "--processes", processes, "--resume"]) == 2
        assert re.match(r"fused-resnet study: --resume: recipe\.lr is .*\n$", capsys.readouterr().err)


def test_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "alchemy"]) == 2
    assert "expected all or some of degradation" in (error := capsys.readouterr().err) and "alchemy" in error
    assert main(["study", "deep", "--preset", "paper", "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["study", "deep", "--data", str(tmp_path)]) == 2
    assert "digits come with scikit-learn" in capsys.readouterr().err
    for seeds in ("", "1,1", "-1", "a"):
        with pytest.raises(SystemExit):
            main(["study", "deep", "--seeds", seeds])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    assert " ".join(STUDIES) in " ".join(capsys.readouterr().out.split())  # options.py imports no study


# ---------------------------------------------------------------------------------------------------- what is measured
def test_weight_gradients_and_their_order() -> None:
    model = Network(8, "B").build(1, 10, fused=False)
    convs = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    for i, m in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d)):
        m.weight.grad = torch.zeros_like(m.weight)
        m.weight.grad.view(-1)[0] = 100.0 + i if m not in convs else 3.0 * (1 + convs.index(m))
    assert weight_gradients(model) == pytest.approx([3.0 * (i + 1) for i in range(7)])


@pytest.mark.parametrize("network", [Network(8, None), Network(8, "B"), Network(11, "A", True)])
def test_responses_by_hand(network: Network) -> None:
    fused = network.build(1, 10)
    plain = network.build(1, 10, fused=False)
    for m in fused.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, -0.5)
            nn.init.normal_(m.bias, 0.3)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.3, 3)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(3, 1, 8, 8) * 2 + 1
    before = {k: v.clone() for k, v in fused.state_dict().items()}
    got = responses.responses(fused, x)
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items()) and fused.training
    expected, block = [], plain.eval().layer1[0]
    with torch.no_grad():
        expected.append(float(plain.bn1(plain.conv1(x)).std()))
        a = plain.relu(plain.bn1(plain.conv1(x)))
        if network.bottleneck:
            expected.append(float(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(a))))).std()))
        else:
            expected.append(float(block.bn1(block.conv1(a)).std()))
            expected.append(float(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(a))))).std()))
    assert got[: len(expected)] == pytest.approx(expected, rel=1e-4)
    assert len(got) == (4 if network.bottleneck else 7)


def test_open_block_leaves_the_shortcut_alone() -> None:
    block = gradients.OpenBlock(4, 4, act_layer=nn.Sigmoid).eval()
    x = torch.randn(2, 4, 3, 3) - 1
    with torch.no_grad():
        branch = block.bn2(block.conv2(torch.sigmoid(block.bn1(block.conv1(x)))))
        torch.testing.assert_close(block(x), branch + x)
        assert (block(x) < 0).any()


def test_small_tools() -> None:
    assert curves.smooth([4.0, 2.0, 0.0], 2) == [4, 3, 1]
    assert curves.reached([2.0] * 10 + [0.0] * 10, 1.0) == 16 and curves.reached([2.0] * 5, 1.0) == 5
    assert curves.divisions([0.01, 0.1, 0.1, 0.01, 0.01, 0.001]) == [3, 5]
    assert curves.falls([4.0, 4.0, 2.0, 2.0, 0.5, 0.5], 4) == (4, 2)
    assert gradients.ratio([1.0, 5.0, 2.0]) == 0.5 and gradients.ratio([0.0, 0.0]) == 0
    assert gradients.ratio([math.nan, 1.0]) == math.inf
    assert as_read_back({1: (1.23456789, 2)}) == {"1": [1.23457, 2]}


def test_difference() -> None:
    clear, noise = Difference.of([3.0, 3.1, 2.9], [1.0, 1.1, 0.9]), Difference.of([3.0, 1.0, 2.0], [1.9, 2.1, 1.9])
    assert clear.value == pytest.approx(2) and clear.error == pytest.approx(math.sqrt(2 * 0.01 / 3)) and clear.positive
    assert not noise.positive and not Difference.of([1.0], [2.0]).positive and Difference.of([2.0], [1.0]).positive
    assert (
        Difference.of([math.nan, 1.0], [1.0, 1.0]).positive and not Difference.of([1.0, 1.0], [math.nan, 1.0]).positive
    )


# ---------------------------------------------------------------------------------------------------- docs/paper.md
def test_the_papers_page_says_what_was_measured() -> None:
    """Its figures are what benchmarks/paper_table.py makes of the newest committed run."""
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "paper_table.py", "--check"], check=False)
    assert done.returncode == 0, "run python benchmarks/paper_table.py"


def test_the_papers_page_points_at_what_is_there() -> None:
    page = ROOT / "docs" / "paper.md"
    text = page.read_text()
    named = set(re.findall(r"`((?:fused_resnet|csrc|tests|benchmarks)/[\w/.\-]+)`", text))
    assert len(named) > 15
    linked = set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert sum(link.endswith(".png") for link in linked) == len(STUDIES)
    missing = [n for n in named if not (ROOT / n).exists()] + [x for x in linked if not (page.parent / x).exists()]
    assert not missing
    for name in STUDIES:
        assert f"`{name}`" in text
