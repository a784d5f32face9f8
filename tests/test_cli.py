"""The command line, end to end on tiny runs."""

# ruff: noqa: E402 (what may be absent is looked for before the imports that need it)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic", reason="the command line needs metafast[cli]")
pytest.importorskip("rich", reason="training needs metafast[cli]")
pytest.importorskip("safetensors", reason="checkpoints need metafast[cli]")
PIL = pytest.importorskip("PIL.Image", reason="image folders need metafast[cli]")

from metafast.data import EpisodeSampler, ImageClasses, SineSampler
from metafast.methods import METHODS
from metafast.program.cli import main
from metafast.runs.checkpoint import Checkpoint, find_checkpoint

TINY = ["--image-size", "16", "--hidden", "4", "--ways", "2", "--queries", "2", "--steps", "1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ with six classes of five images: a patch in a place of its own, and noise."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in range(6):
            folder = root / split / str(name)
            folder.mkdir(parents=True)
            for example in range(5):
                picture = 60 * torch.rand(16, 16, generator=generator)
                row, column = divmod(name, 3)
                picture[8 * row : 8 * row + 6, 5 * column : 5 * column + 5] += 180
                PIL.fromarray(picture.to(torch.uint8).numpy()).save(folder / f"{example}.png")
    return root


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    sizes = "--image-size 16 --hidden 8 --ways 4 --queries 2 --steps 8 --checkpoint-every 3 --log-every 4"
    return ["train", "protonet", "--data", str(images), "--out", str(out), *sizes.split(), *more]


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "x"
    assert main(arguments(images, out)) == 0
    return out


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "images" in method.recipes])
def test_every_method_of_images_trains_and_is_evaluated(
    method: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "--image-size 16 --hidden 4 --ways 3 --shots 1 --queries 2 --tasks 2 --steps 2"
    assert main(["train", method, "--data", str(images), *few.split(), "--out", str(tmp_path / "x")]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "x"), *["--ways", "3", "--queries", "2", "--episodes", "4"]]) == 0
    assert "3-way 1-shot, 4 episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("matching", "--full-context --context-steps 2"),
        ("relation", "--head linear"),
        ("imaginary", "--learner matching --imagined 2"),
        ("imaginary", "--learner siamese"),
        ("protonet", "--backbone resnet12"),
        ("relation", "--backbone {own}:maps"),
        ("siamese", "--backbone {own}:vectors"),
    ],
)
def test_variants_train(method: str, options: str, images: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from torch import nn\n"
        "def maps(shape): return nn.Conv2d(shape[0], 3, 5, stride=2)\n"
        "def vectors(shape): return nn.Sequential(nn.Flatten(), nn.LazyLinear(6))\n"
    )
    few = "--image-size 16 --hidden 4 --ways 3 --shots 1 --queries 2 --tasks 2 --steps 1"
    words = [*options.format(own=own).split(), *few.split(), "--out", str(tmp_path / "x")]
    assert main(["train", method, "--data", str(images), *words]) == 0


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("conv5", "--backbone: expected conv4, conv4-strided, resnet12 or FILE.py:FUNCTION, got conv5"),
        ("absent.py:f", "there is no file absent.py"),
        ("{own}:g", "--backbone: expected a function of {own}, got g"),
        ("{own}:f", "--backbone: expected a result of shape [B, D], got [B, 1, 16, 16]"),
    ],
)
def test_a_backbone_that_does_not_fit_is_named(
    backbone: str, message: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.py"
    own.write_text("from torch import nn\ndef f(shape): return nn.Identity()\n")
    few = f"--image-size 16 --ways 3 --queries 2 --out {tmp_path / 'x'} --backbone"
    assert main(["train", "protonet", "--data", str(images), *few.split(), backbone.format(own=own)]) == 1
    assert message.format(own=own) in capsys.readouterr().err


def test_imaginary_data_is_compared_with_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"train imaginary --data gaussians --steps 2 --out {tmp_path / 'x'}".split()) == 0
    capsys.readouterr()
    assert main(f"eval {tmp_path / 'x'} --episodes 4".split()) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "of gaussians test:" in first
    assert ", without imagined data:" in second


@pytest.fixture(scope="module")
def runs(images: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind of evaluation."""
    folder = tmp_path_factory.mktemp("kinds")
    few = "--hidden 8 --tasks 1 --steps 1"
    commands = {
        "waves": f"train maml --data sine {few}",
        "adapting": f"train maml --data {images} --image-size 16 --ways 3 --queries 2 {few}",
        "optimizer": f"train l2l --inner-steps 2 --truncation 1 {few}",
    }
    for name, command in commands.items():
        assert main([*command.split(), "--out", str(folder / name)]) == 0
    return {"images": images, "run": trained, **{name: folder / name for name in commands}}


Refused = Callable[[str], str]


@pytest.fixture
def refused(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail before any work, and gives the one line that it says."""

    def run(command: str) -> str:
        out = tmp_path / "out"
        words = command.format(**runs).split()
        if words[0] == "train" and "--out" not in words:
            words += ["--out", str(out)]
        capsys.readouterr()
        try:
            status = main(words)
        except SystemExit as exit:  # of argparse
            status = exit.code
        printed = capsys.readouterr()
        assert status in (1, 2)
        assert printed.out == ""
        assert not out.exists()
        assert printed.err.startswith("metafast: error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return run


def test_train_writes_a_log_and_checkpoints(trained: Path) -> None:
    steps = [json.loads(line)["step"] for line in (trained / "log.jsonl").read_text().splitlines()]
    assert steps == [4, 8]
    assert find_checkpoint(trained).name == "step-00000008.safetensors"


def test_eval_prints_accuracy_interval_and_floor(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained), "--ways", "3", "--queries", "2", "--episodes", "20"]) == 0
    printed = capsys.readouterr().out
    assert "3-way 1-shot, 20 episodes" in printed
    accuracy = float(printed.split(": ")[1].split(" ±")[0])
    assert accuracy > 50  # chance is 33


def test_resume_continues_and_a_second_run_does_not_overwrite(
    images: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(images, trained)) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert main(arguments(images, tmp_path / "y", "--resume")) == 1
    assert "y does not exist, so there is nothing to resume" in capsys.readouterr().err
    (tmp_path / "y").mkdir()  # as if it had been killed before its first checkpoint
    assert main(arguments(images, tmp_path / "y", "--resume")) == 0
    assert "no checkpoint yet" in capsys.readouterr().out
    find_checkpoint(tmp_path / "y").unlink()  # as if it had been killed after step 6
    assert main(arguments(images, tmp_path / "y", "--resume")) == 0
    assert "resumes after step 6" in capsys.readouterr().out
    whole, resumed = (Checkpoint.read(find_checkpoint(path)).tensors for path in (trained, tmp_path / "y"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resume_refuses_another_run(images: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(images, trained, "--resume", "--lr", "1")) == 1
    assert "--lr: the run in" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["maml", "fomaml", "reptile", "metasgd", "pretrain"])
def test_waves_are_trained_on_resumed_and_evaluated(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--data sine --hidden 8 8 --steps 6 --tasks 3 --checkpoint-every 4 --log-every 2"
    small = sizes.split()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        assert main(["train", method, "--out", str(out), *small]) == 0
    find_checkpoint(parts).unlink()  # as if it had been killed after step 4
    assert main(["train", method, "--out", str(parts), "--resume", *small]) == 0
    first, second = (Checkpoint.read(find_checkpoint(path)).tensors for path in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)

    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [2, 4, 6]
    assert all(record["mse"] > 0 for record in log)
    capsys.readouterr()
    assert main(["eval", str(whole), "--episodes", "50", "--shots", "5", "7", "--inner-steps", "0", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"Mean squared error of {method} on 50 waves" in lines[0]
    assert lines[1].split() == ["points", "0", "3"]
    assert [line.split()[0] for line in lines[2:]] == ["5", "7"]
    errors = [[float(figure) for figure in line.split()[1::3]] for line in lines[2:]]
    assert all(0 < error < 100 for row in errors for error in row)


SIZES = "--task quadratic --hidden 4 --inner-steps 6 --truncation 3 --tasks 2 --steps 6"
OPTIMISE = SIZES.split()


def test_learned_optimizers_are_trained_resumed_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    every = ["--checkpoint-every", "4", "--log-every", "2", "--random-scaling", "1"]
    for out in (whole, parts):
        assert main(["train", "l2l", "--out", str(out), *OPTIMISE, *every]) == 0
    find_checkpoint(parts).unlink()  # as if it had been killed after step 4
    assert main(["train", "l2l", "--out", str(parts), "--resume", *OPTIMISE, *every]) == 0
    first, second = (Checkpoint.read(find_checkpoint(path)).tensors for path in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [2, 4, 6]
    assert all(record["final_loss"] > 0 for record in log)
    assert "l2l on quadratic train: 6 inner steps, 2 tasks a step" in capsys.readouterr().out

    picture = tmp_path / "new" / "curves.png"
    asked = ["--episodes", "5", "--inner-steps", "4", "--figure", str(picture)]
    assert main(["eval", str(whole), *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Loss after 4 steps on 5 new problems, quadratic test" in lines[0]
    assert [line.split()[0] for line in lines[1:6]] == ["l2l", "SGD", "RMSprop", "Adam", "NAG"]
    losses = [float(line.split(" ±")[0].split()[-1]) for line in lines[1:6]]
    assert losses[0] == max(losses) > 0  # six steps of training are not enough
    with PIL.open(picture) as drawn:
        assert drawn.width > 1000


@pytest.mark.parametrize("task", ["digits-mlp", "digits-cnn", "digits-rnn"])
def test_learned_optimizers_are_tried_on_other_tasks(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "l2l", "--out", str(tmp_path), *OPTIMISE]) == 0
    asked = ["--task", task, "--batch-size", "8", "--episodes", "2", "--inner-steps", "2", "3"]
    assert main(["eval", str(tmp_path), *asked]) == 0
    printed = capsys.readouterr().out
    assert f"Loss after 2 steps on 2 new problems, {task} test" in printed
    assert f"Loss after 3 steps on 2 new problems, {task} test" in printed


def test_learned_optimizers_learn_on_omniglot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ImageClasses(torch.rand(12, 5, 1, 14, 14), tuple("abcdefghijkl"))
    monkeypatch.setattr("metafast.data.sources.omniglot", lambda *_, **__: drawn)
    task = ["--task", "omniglot-mlp", "--batch-size", "8"]
    assert main(["train", "l2l", "--out", str(tmp_path), *OPTIMISE, *task]) == 0
    assert main(["eval", str(tmp_path), "--episodes", "2", "--inner-steps", "2"]) == 0
    assert "l2l (omniglot-mlp)" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["maml", "fomaml", "reptile", "metasgd"])
def test_networks_that_adapt_learn_images(
    method: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--image-size 16 --hidden 16 --ways 3 --queries 2 --tasks 4 --steps 60 --no-center"
    small = sizes.split()
    assert main(["train", method, "--data", str(images), "--out", str(tmp_path / "x"), *small]) == 0
    capsys.readouterr()
    evaluation = ["--ways", "3", "--queries", "2", "--episodes", "20", "--inner-steps", "0", "5"]
    assert main(["eval", str(tmp_path / "x"), *evaluation]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["0 inner steps" in line or "5 inner steps" in line for line in lines] == [True, True]
    before, after = (float(line.split(": ")[1].split(" ±")[0]) for line in lines)
    assert after > 60 > before  # chance is 33


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("maml", "--backbone conv4 --channels 4"),
        ("maml", "--backbone conv4-strided --channels 4 --learn-inner-lr"),
        ("fomaml", "--backbone conv4 --channels 4 --no-transductive"),
        ("metasgd", "--backbone {own}:vectors --no-transductive"),
        ("reptile", "--backbone resnet12 --channels 2 --inner-steps 1"),
        ("reptile", "--hidden 4 --inner-steps 2 --inner-batch 3"),
    ],
)
def test_backbones_adapt_and_resume(
    method: str, options: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from torch import nn\n"
        "def vectors(shape): return nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.BatchNorm1d(6))\n"
    )
    few = "--image-size 16 --ways 3 --shots 1 --queries 2 --tasks 2 --schedule constant --steps"
    command = ["train", method, "--data", str(images), *options.format(own=own).split(), *few.split()]
    assert main([*command, "2", "--out", str(tmp_path / "whole")]) == 0
    assert main([*command, "1", "--out", str(tmp_path / "parts")]) == 0
    assert main(["train", method, "--resume", "--steps", "2", "--out", str(tmp_path / "parts")]) == 0
    whole, parts = (Checkpoint.read(find_checkpoint(tmp_path / run)) for run in ("whole", "parts"))
    assert whole.step == parts.step == 2
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(tensor, parts.tensors[name]) for name, tensor in whole.tensors.items())
    capsys.readouterr()
    evaluation = "--queries 2 --episodes 4 --inner-steps 0 2 --sgd 0.1"
    assert main(["eval", str(tmp_path / "parts"), *evaluation.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["by SGD at 0.1: " in line for line in lines] == [False, True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--backbone conv5", "--backbone: expected mlp, conv4, conv4-strided, resnet12 or FILE.py:FUNCTION"),
        ("--channels 4", "--channels: expected only with backbone conv4, conv4-strided or resnet12, got 4"),
        ("--backbone conv4 --hidden 4", "--hidden: expected only with backbone mlp, got 4 with conv4"),
        ("--no-transductive", "--transductive: expected a network with batch norm"),
        ("--backbone conv4 --image-size 8", "--image-size: expected at least 16, which conv4 halves"),
    ],
)
def test_a_network_that_cannot_adapt_is_named(options: str, message: str, refused: Refused) -> None:
    assert message in refused("train maml --data {images} --ways 3 --queries 2 " + options)


def test_convolutions_are_for_images(refused: Refused) -> None:
    message = "--backbone: expected mlp or FILE.py:FUNCTION for examples that are no images, got conv4"
    assert message in refused("train maml --data sine --backbone conv4")


def test_defaults_follow_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "maml", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: omniglot 8000, images 4000, sine 70000)" in said
    assert "tasks per step (default: omniglot 32, images 16, sine 25)" in said
    assert "else --inner-steps (default: omniglot 3, images 5)" in said


def test_defaults_follow_the_backbone() -> None:
    from metafast.program.config import compose

    named = {backbone: compose("maml", {"backbone": backbone}) for backbone in ("mlp", "conv4", "resnet12")}
    named["default"] = compose("maml", {})
    found = {name: (c.settings.backbone, c.settings.inner_lr, c.training.steps) for name, c in named.items()}
    assert found == {
        "default": ("conv4-strided", 0.4, 8000),
        "conv4": ("conv4", 0.4, 8000),
        "mlp": ("mlp", 0.1, 4000),
        "resnet12": ("resnet12", 0.1, 4000),
    }
    assert compose("maml", {"data": "digits"}).settings.backbone == "mlp"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "train protonet --data sine",
            "--data: expected omniglot, digits or a folder, which protonet learns from, got sine",
        ),
        ("train pretrain --data omniglot", "--data: expected sine, which pretrain learns from, got omniglot"),
        (
            "train protonet --data nowhere",
            "--data: expected omniglot, digits or a folder, which protonet learns from, got nowhere",
        ),
        (
            "train protonet --data {images} --ways 2 --queries 2 --image-size 8",
            "--image-size: expected at least 16, which conv4 halves four times, got 8",
        ),
        ("train protonet --data {images} --ways 7", "--ways: expected at most 6"),
        ("train protonet --data {images} --ways 2 --queries 9", "--shots + --queries: expected at most 5"),
        ("train l2l --truncation 7", "--truncation: expected a divisor of the 100 steps, got 7"),
        (
            "train maml --data sine --device cpu --graph on",
            "--graph: expected auto or off on the CPU, got on",
        ),
        (
            "train maml --data digits --inner-steps 0",
            "--inner-steps: expected at least 1, whose rates are learned, got 0",
        ),
        ("eval {images}", "expected a checkpoint"),
        ("eval {run} --split val", "expected a folder of class folders"),
        ("eval {run} --shots 1 4 --queries 2", "--shots + --queries: expected at most 5"),
        ("eval {waves} --split x", "--split: expected one of ('train', 'val', 'test') for sine, got 'x'"),
        ("eval {adapting} --ways 4", "--ways: expected at most 3 classes, as maml was trained, got 4"),
        ("eval {adapting} --runs", "--runs: expected at most 3 classes, as maml was trained, got 20"),
        ("eval {optimizer} --inner-steps 2 0", "--inner-steps: expected a whole number of at least 1, got 0"),
        ("eval {optimizer} --inner-steps 2 3 --figure x.png", "--figure: expected one number of inner steps"),
    ],
)
def test_errors_are_one_helpful_line(command: str, message: str, refused: Refused) -> None:
    assert message in refused(command)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("maml --ways 0", "a whole number of at least 1, got 0"),
        ("maml --shots 1.5", "a whole number of at least 1, got 1.5"),
        ("maml --hidden 8 0", "a whole number of at least 1, got 0"),
        ("maml --inner-lr -0.1", "a finite number >= 0, got -0.1"),
        ("maml --inner-steps -1", "a whole number of at least 0, got -1"),
        ("maml --test-steps -3", "a whole number of at least 0, got -3"),
        ("maml --checkpoint-every 0", "a whole number of at least 1, got 0"),
        ("maml --log-every 0", "a whole number of at least 1, got 0"),
        ("maml --keep 0", "a whole number of at least 1, got 0"),
        ("maml --steps 0", "a whole number of at least 1, got 0"),
        ("maml --lr -1", "a finite number > 0, got -1"),
        ("maml --lr nan", "a finite number > 0, got nan"),
        ("maml --seed -1", "a whole number from 0 to 9223372036854775807, got -1"),
        ("protonet --hidden 0", "a whole number of at least 1, got 0"),
        ("meta-lstm --inner-lr 2", "a number between 0 and 1, got 2"),
        ("meta-lstm --cell-layers 4", "a whole number from 0 to 3, got 4"),
        ("l2l --layers 0", "a whole number from 1 to 3, got 0"),
        ("l2l --scale inf", "a finite number, got inf"),
        ("l2l --random-scaling -1", "a finite number >= 0, got -1"),
        ("l2l --p 0", "a finite number > 0, got 0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_option(
    option: str, message: str, refused: Refused
) -> None:
    assert f"{option.split()[1]}: expected {message}" in refused(f"train {option}")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train maml --inner-lrr 1", "--inner-lrr: unknown (did you mean --inner-lr?)"),
        ("train maml --inner 1", "--inner: unknown"),
        ("eval {run} --shotz 5", "--shotz: unknown (did you mean --shots?)"),
        ("train maml --data sine --optimizer adan", "--optimizer: expected adam or sgd, got adan"),
        ("train l2l --preprocess none --p 3", "--p: expected only with preprocess log_sign, got 3 with none"),
        (
            "train meta-lstm --cell-layers 0 --cell-hidden 3",
            "--cell-hidden: expected only with cell_layers 1, 2 or 3, got 3 with 0",
        ),
    ],
)
def test_what_is_misspelt_or_would_be_ignored_is_refused(
    command: str, message: str, refused: Refused
) -> None:
    assert message in refused(command)


def test_the_default_of_every_method_can_be_learned_from() -> None:
    from metafast.methods import METHODS
    from metafast.program.config import compose

    for name in METHODS:
        config = compose(name, {})
        assert config.data.kind in METHODS[name].recipes


def test_recipes_name_settings_that_there_are() -> None:
    from metafast.methods import METHODS
    from metafast.program.config import sources_of
    from metafast.program.settings import check_names, stated
    from metafast.program.train import Pace, TrainingSettings

    for method in METHODS.values():
        assert sources_of(method)
        for kind, recipe in method.recipes.items():
            sources = [source for source in sources_of(method).values() if source.kind == kind]
            check_names(recipe, stated(method.Settings, *sources, TrainingSettings, Pace))
            for backbone in method.by_backbone if kind == "images" else ():
                names = method.recipe(sources[0], backbone)
                check_names(names, stated(method.Settings, *sources, TrainingSettings, Pace))


def test_the_configuration_of_a_run_is_read_strictly(trained: Path, tmp_path: Path) -> None:
    from metafast.program.config import read_config, rebuild

    described = read_config(trained)
    config, problem = rebuild(described)
    assert config.described(problem, described["digest"]) == described
    training = described["training"]
    for change, message in (
        ({"setings": {}}, r"setings: unknown \(did you mean settings\?\)"),
        (
            {"training": {**training, "stepz": 3}},
            r"training.stepz: unknown \(did you mean steps",
        ),
        (
            {"training": {**training, "lr": -1}},
            "training.lr: expected a finite number > 0, got -1",
        ),
        ({"data": {**described["data"], "name": "x"}}, "data.name: expected one of omniglot, .* got 'x'"),
        ({"method": "mam"}, "method: expected one of .*, got 'mam'"),
        ({"problem": {"outputs": 2}}, "problem.input_shape: Field required"),
        ({"pace": []}, "pace: expected an object"),
    ):
        with pytest.raises(ValueError, match=message):
            rebuild({**described, **change})


@pytest.mark.parametrize("values", ["--episodes 1", "--inner-steps -1", "--shots 5 0", "--sgd -1"])
def test_evaluation_too_refuses_by_the_name_of_the_option(values: str, refused: Refused) -> None:
    assert f"{values.split()[0]}: expected" in refused("eval {run} " + values)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train maml --data sine --ways 5", "omniglot or digits or a folder, got 5 for sine"),
        ("train maml --data sine --center", "omniglot or digits or a folder, got True for sine"),
        ("train maml --data sine --image-size 28", "omniglot or digits or a folder, got 28 for sine"),
        ("train maml --data sine --protocol vinyals", "omniglot, got vinyals for sine"),
        ("train maml --data sine --data-root x", "omniglot or digits, got x for sine"),
        ("train maml --data digits --protocol vinyals", "omniglot, got vinyals for digits"),
        ("train protonet --data {images} --data-root x", "omniglot or digits, got x for a folder"),
        ("train l2l --batch-size 8", "digits-mlp or omniglot-mlp, got 8 for quadratic"),
        ("eval {run} --inner-steps 3", "or sine waves or problems of l2l, got 3 for images"),
        ("eval {run} --sgd 0.1 1", "images with an inner loop, got 0.1 1 for images"),
        ("eval {run} --task quadratic", "problems of l2l, got quadratic for images"),
        ("eval {run} --data-root x", "omniglot or digits, got x for a folder"),
        ("eval {waves} --runs", "images, got it for sine waves"),
        ("eval {waves} --ways 5", "--ways: expected only for images, got 5 for sine waves"),
        ("eval {waves} --sgd 0.1", "images with an inner loop, got 0.1 for sine waves"),
        ("eval {optimizer} --runs", "images, got it for problems of l2l"),
        ("eval {optimizer} --sgd 0.1", "images with an inner loop, got 0.1 for problems of l2l"),
        ("eval {optimizer} --ways 5", "--ways: expected only for images, got 5 for problems of l2l"),
        ("eval {optimizer} --shots 5", "or sine waves, got 5 for problems of l2l"),
        ("eval {optimizer} --queries 5", "or sine waves, got 5 for problems of l2l"),
        ("eval {optimizer} --precision float32", "or sine waves, got float32 for problems of l2l"),
        ("eval {optimizer} --batch-size 8", "or omniglot-mlp, got 8 for quadratic"),
        ("eval {run} --runs --episodes 5", "or problems of l2l, got 5 for the 20-run benchmark"),
        ("eval {run} --runs --split val", "or problems of l2l, got val for the 20-run benchmark"),
    ],
)
def test_an_option_that_does_not_apply_is_refused(command: str, message: str, refused: Refused) -> None:
    option = next(word for word in reversed(command.split()) if word.startswith("--"))
    said = refused(command)
    assert said.startswith(f"metafast: error: {option}: expected only for ")
    assert message in said


def test_out_is_a_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        for command in ("train maml", "demo"):
            said = refused(f"{command} --out {out}")
            assert f"--out: expected a folder to write to, there or to be made, got {out}" in said


@pytest.mark.parametrize(
    "written",
    [
        b'{"epoch": 1}\n',
        b'{"step": 1, "loss": 0.5}\n',
        b'{"step": 1, "diverged": 2}\nnotes\n',
        b"[1]\n",
        b"notes",
        b"\xff\n",
    ],
)
@pytest.mark.parametrize("resume", ["", "--resume"])
def test_a_log_of_others_is_left_alone(written: bytes, resume: str, refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    log = folder / "log.jsonl"
    log.write_bytes(written)
    said = refused(f"train maml --data sine --steps 1 --hidden 4 --out {folder} {resume}")
    assert f"--out: {log} was not written by metafast" in said
    assert log.read_bytes() == written
    assert list(folder.iterdir()) == [log]


@pytest.mark.parametrize(
    "written", [b"", b'{"ste', b'{"step": 1, "diverged": 2, "crc32": "b52b626d"}\n{"step": 2, "lo']
)
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    written: bytes, tmp_path: Path
) -> None:
    (tmp_path / "log.jsonl").write_bytes(written)
    sizes = "--data sine --hidden 4 --tasks 2 --steps 1 --log-every 1"
    assert main(["train", "maml", "--out", str(tmp_path), *sizes.split()]) == 0
    (record,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert record["step"] == 1
    assert record["mse"] > 0


@pytest.mark.parametrize(("limit", "file"), [(600, "step-00000004.safetensors"), (100, "log.jsonl")])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(
    limit: int, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system lets no file grow beyond a limit: a write breaks off, as on a full disk."""
    resource = pytest.importorskip("resource", reason="limits of files need POSIX")
    sizes = "--data sine --hidden 8 --tasks 2 --steps 4 --checkpoint-every 2 --log-every 4"
    whole, full = tmp_path / "whole", tmp_path / "full"
    for out in (whole, full):
        assert main(["train", "maml", "--out", str(out), *sizes.split()]) == 0
    resume = ["train", "maml", "--out", str(full), "--resume", *sizes.split()]
    find_checkpoint(full).unlink()  # as if it had been killed after step 2
    kept = find_checkpoint(full).read_bytes()
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert main(resume) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"metafast: error: {full / file}: cannot be written (")
    assert "File too large" in error
    assert find_checkpoint(full).name == "step-00000002.safetensors"
    assert find_checkpoint(full).read_bytes() == kept
    assert not list(full.glob("*.partial"))

    assert main(resume) == 0
    first, second = (Checkpoint.read(find_checkpoint(path)).tensors for path in (whole, full))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("command", [["train", "maml", "--data", "sine", "--steps", "1"], ["demo"]])
def test_an_empty_out_is_not_the_current_folder(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--out", ""]) == 1
    assert capsys.readouterr().err.endswith(
        "--out: expected a folder to write to, there or to be made, got ''\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_demo_begins_anew_and_deletes_nothing_but_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metafast.program import demo

    def train(*words: str) -> None:
        raise InterruptedError

    (tmp_path / "maml").mkdir()
    for name in ("step-00000002.safetensors", "paper.tex"):
        (tmp_path / "maml" / name).write_text("mine")
    monkeypatch.setattr(demo, "_command", train)
    with pytest.raises(InterruptedError):
        demo.demo(tmp_path)
    assert [path.name for path in (tmp_path / "maml").iterdir()] == ["paper.tex"]


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_a_broken_checkpoint_is_named(size: int, trained: Path, refused: Refused, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(find_checkpoint(trained).read_bytes()[:size])
    assert f"{broken}: expected a whole safetensors file, got a broken one" in refused(f"eval {broken}")


def test_a_broken_checkpoint_is_passed_over_by_resume(
    images: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(images, tmp_path / "y")) == 0
    newest = find_checkpoint(tmp_path / "y")
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=rf"{newest.name}: expected a whole .*; the one before it is taken"):
        assert main(arguments(images, tmp_path / "y", "--resume")) == 0
    assert "resumes after step 6" in capsys.readouterr().out
    whole, resumed = (Checkpoint.read(find_checkpoint(path)).tensors for path in (trained, tmp_path / "y"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_model_that_saw_the_benchmark_is_not_scored_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ImageClasses(torch.rand(6, 5, 1, 16, 16), tuple("abcdef"))
    monkeypatch.setattr("metafast.data.sources.omniglot", lambda *_, **__: drawn)
    assert main(["train", "protonet", "--out", str(tmp_path), *TINY]) == 0
    assert main(["eval", str(tmp_path), "--runs"]) == 1
    assert "train with --protocol background" in capsys.readouterr().err


def test_the_benchmark_of_a_model_trained_on_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ImageClasses(torch.rand(6, 5, 1, 16, 16), tuple("abcdef"))
    runs = EpisodeSampler(drawn, ways=2, shots=1, queries=2, tasks=3).batch(0)
    monkeypatch.setattr("metafast.data.sources.omniglot", lambda *_, **__: drawn)
    monkeypatch.setattr("metafast.program.evaluations.images.omniglot_runs", lambda *_, **__: runs)
    assert main(["train", "protonet", "--protocol", "background", "--out", str(tmp_path), *TINY]) == 0
    assert main(["eval", str(tmp_path), "--runs"]) == 0
    assert "20-run one-shot benchmark" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["--help"], ["train", "--help"], ["train", "protonet", "--help"], ["eval", "-h"]]
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(command)
    assert "usage: metafast" in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "CPU kernels" in capsys.readouterr().out


def test_figure_of_an_episode(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need metafast[cli]")
    from metafast.program.figures import draw_episode

    drawn = EpisodeSampler(
        ImageClasses(torch.rand(4, 3, 1, 16, 16), tuple("abcd")), ways=4, shots=1, queries=2, tasks=1
    ).batch(0)
    log_probs = torch.randn(1, 8, 4).log_softmax(-1)
    draw_episode(drawn, log_probs, tmp_path / "new" / "episode.png", title="An episode")
    with PIL.open(tmp_path / "new" / "episode.png") as picture:
        assert picture.width > 300
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 50


def test_figure_of_learning_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need metafast[cli]")
    from metafast.program.figures import draw_learning_curves

    curves = {"one": torch.rand(11, 4) + 0.1, "other": torch.rand(11, 4)}
    draw_learning_curves(curves, tmp_path / "new" / "curves.png", title="Curves")
    with PIL.open(tmp_path / "new" / "curves.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 50


def test_figure_of_a_wave(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need metafast[cli]")
    from metafast.program.figures import draw_waves

    drawn = SineSampler(shots=5, queries=60, tasks=2).batch(0)
    predictions = {"one": {0: drawn.query * 0, 5: drawn.query_labels}, "other": {1: drawn.query}}
    draw_waves(drawn, predictions, tmp_path / "new" / "waves.png", title="A wave")
    with PIL.open(tmp_path / "new" / "waves.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 50
