"""Training: it learns, it says what is wrong, and an interrupted run ends where an uninterrupted one does."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import unchecked
from small_runs import SMALL

from regolite import RunConfig, UserError, build, evaluate, load, train
from regolite.data import Scenes, collate, cut_outs, make_transform
from regolite.training import NonFiniteLoss, loop, setup
from regolite.training.batches import EpochBatches, SeededItems, loader
from regolite.training.folder import RunFolder
from regolite.training.metrics import MEASURED
from regolite.training.schedule import MOMENTUM, lr_factor, make_optimizer, parameter_groups
from regolite.training.state import State

# Five images in batches of two: three steps an epoch, the last of one image. Dropout and augmentation draw lots.
CONFIG = RunConfig(
    data="scenes:5:val=2:size=64",
    model="rego_deformable_detr_scenes",
    overrides=SMALL,
    image_size=64,
    batch_size=2,
    epochs=3,
    lr=1e-3,
    schedule="one_cycle",
    evaluate_every=0,
    log_every=1,
    device="cpu",
    ema=0.5,
)


@pytest.fixture(autouse=True)
def without_images(monkeypatch):
    """The figures of a run have tests of their own, and take longer than these runs."""
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])


@pytest.fixture
def config(tmp_path):
    def make(name="run", **changes):
        return replace(CONFIG, output=str(tmp_path / name), **changes)

    return make


def lines(folder):
    """The metrics without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in found]


def losses(folder):
    return [line["loss"] for line in lines(folder) if line["kind"] == "train"]


class Interrupted(Exception):
    """What stands for a power failure."""


def interrupt_at(step):
    """A watcher that ends the run at the first line of metrics of this step or a later one."""

    def watch(line):
        if line["step"] >= step:
            raise Interrupted

    return watch


def save_only_at(monkeypatch, *steps):
    """Checkpoints after these steps alone, and at the end; for runs with ``checkpoint_minutes=0.0``."""
    save = State.save

    def chosen(state):
        return save(state) if state.progress.step in (*steps, 9) else ""

    monkeypatch.setattr(State, "save", chosen)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A finished run of one epoch, three steps, that tests may read or copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])
        return train(replace(CONFIG, output=str(tmp_path_factory.mktemp("once")), epochs=1))


@pytest.fixture
def done(config, once):
    """A copy of it, in the folder of :func:`config`."""
    return shutil.copytree(once, Path(config().output))


# ------------------------------------------------------------------------------------------------- a run as a whole


def test_loss_falls_and_the_run_leaves_what_it_should(config):
    folder = train(
        config(
            data="scenes:3:val=1:size=64", batch_size=3, epochs=25, augment="none", ema=0.0, clip=1.0, lr=3e-3,
            evaluate_train=True, overrides=(*SMALL[:-2], "rego.dropout=0.0"),
        )
    )  # fmt: skip
    course = losses(folder)
    assert len(course) == 25 and sum(course[-3:]) < 0.7 * sum(course[:3])
    *steps, val, last = lines(folder)
    assert {line["kind"] for line in steps} == {"train"}
    assert steps[4]["step"] == 5 and steps[4]["gradient_norm"] > 0
    assert [line["images_seen"] for line in steps[:3]] == [3, 6, 9]
    assert val["images_seen"] == last["images_seen"] == 75
    assert steps[4]["loss"] == pytest.approx(sum(steps[4]["terms"].values()), rel=1e-4)
    assert {"base/label", "stage1.1/l1", "stage2/giou"} < set(steps[4]["terms"])
    assert (val["kind"], val["split"], last["split"]) == ("evaluation", "val", "train")
    assert [stage["stage"] for stage in last["stages"]] == [0, 1, 2]

    stored = json.loads((folder / "config.json").read_text())
    assert RunConfig.of(stored["run"]).epochs == 25
    assert "training rego_deformable_detr_scenes" in (folder / "train.log").read_text()
    model = load(folder / "model.safetensors")
    assert model.model_config.classes == Scenes(1, size=64).classes and len(model.stages) == 2
    left = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors")]
    assert sorted(left) == [
        "best.safetensors", "checkpoints/best.pt", "checkpoints/step_00000025.pt", "model.safetensors",
    ]  # fmt: skip


def test_the_weights_that_a_run_starts_from_are_evaluated_once(config, once):
    start = {"checkpoint": str(once / "model.safetensors"), "evaluate_start": True}
    folder = train(config("tuned", epochs=1, **start))
    first, *_, last = lines(folder)
    [measured] = [line for line in lines(once) if line["kind"] == "evaluation"]
    assert (first["step"], first["split"], last["kind"]) == (0, "val", "evaluation")
    assert first["stages"] == measured["stages"], "the same weights, and the same images"
    train(config("tuned", epochs=2, resume=True, **start))
    assert [line["step"] for line in lines(folder) if line["kind"] == "evaluation"].count(0) == 1


def test_same_run_twice_gives_the_same_bytes(config):
    first, second, other = (train(config(name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert lines(first) == lines(second)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_run_is_not_overwritten(config, done):
    with pytest.raises(UserError, match="holds a run already; go on with it .resume. or give another output folder"):
        train(config(epochs=1))
    (file := config("file").output) and open(file, "w").close()
    with pytest.raises(UserError, match="file is a file; give a folder"):
        train(config("file"))


def test_validation_and_training_leave_the_callers_generator_to_the_seed_alone(config, once):
    """What was drawn before a run does not change it."""
    torch.manual_seed(1)
    assert losses(once) == losses(train(config(epochs=1)))


def test_average_of_the_weights(config):
    folder = train(config(data="scenes:2:val=1:size=64", epochs=2, checkpoint_minutes=0.0))
    states = [torch.load(folder / "checkpoints" / f"step_0000000{n}.pt", weights_only=True) for n in (1, 2)]
    stored = load_file(folder / "model.safetensors")
    moved = 0
    for name, value in stored.items():
        first, second = (state["model"][name] for state in states)
        torch.testing.assert_close(value, 0.5 * first + 0.5 * second if value.is_floating_point() else second)
        moved += int(not torch.equal(first, second))
    assert moved > 50


def test_without_clipping_no_norm_is_logged(config):
    assert {line["gradient_norm"] for line in lines(train(config(epochs=1, clip=0.0)))[:3]} == {None}


def test_starting_from_another_runs_weights(config, once):
    start = once / "model.safetensors"
    tuned = train(config("b", epochs=1, lr=1e-12, checkpoint=str(start))) / "model.safetensors"
    for name, value in load_file(tuned).items():
        torch.testing.assert_close(value, load_file(start)[name], rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="no checkpoint at nowhere.safetensors"):
        train(config("c", checkpoint="nowhere.safetensors"))


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_mixed_precision_may_change_from_run_to_run(config, precision):
    folder = train(config(epochs=1, precision=precision))
    assert all(math.isfinite(loss) for loss in losses(folder))
    assert {v.dtype for v in load_file(folder / "model.safetensors").values()} <= {torch.float32, torch.int64}


# ------------------------------------------------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three epochs, nine steps, that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])
        return train(replace(CONFIG, output=str(tmp_path_factory.mktemp("whole")), evaluate_every=1, log_every=2))


# The checkpoint after step 3 is older than the evaluation of epoch 1, which is written after it and before the end of
# the interrupted session; steps 2 and 5 lie within an epoch, and step 5 between two lines of metrics.
@pytest.mark.parametrize("saved", [2, 3, 5])
def test_interrupted_run_ends_like_an_uninterrupted_one(config, monkeypatch, whole, saved):
    plan = config(evaluate_every=1, log_every=2, checkpoint_minutes=0.0)
    save_only_at(monkeypatch, saved)
    with pytest.raises(Interrupted):
        train(plan, interrupt_at(6))
    torch.rand(5)
    folder = train(replace(plan, resume=True))
    assert lines(folder) == lines(whole)
    for name in ("model.safetensors", "best.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    log = (folder / "train.log").read_text()
    assert re.search(rf"going on after step {saved} \(\d images seen\) with rego_deformable_detr_scenes", log)
    assert "step 9 images 15 AP on val" in log


def test_interrupted_before_the_first_checkpoint(config, whole):
    plan = config(evaluate_every=1, log_every=2)
    with pytest.raises(Interrupted):
        train(plan, interrupt_at(4))
    folder = train(replace(plan, resume=True))
    assert lines(folder) == lines(whole)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_damaged_checkpoint_is_passed_over(config, monkeypatch, whole):
    plan = config(evaluate_every=1, log_every=2, checkpoint_minutes=0.0)
    save_only_at(monkeypatch, 2, 5)
    with pytest.raises(Interrupted):
        train(plan, interrupt_at(6))
    last = config().output + "/checkpoints/step_00000005.pt"
    with open(last, "r+b") as file:
        file.truncate(1000)
    folder = train(replace(plan, resume=True))
    assert "step_00000005.pt is damaged" in (folder / "train.log").read_text()
    assert lines(folder) == lines(whole)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_when_every_checkpoint_is_damaged(config, done):
    for file in (done / "checkpoints").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .*checkpoints can be read; delete .* to start anew"):
        train(config(epochs=1, resume=True))


def test_resuming_where_there_is_no_run_starts_one(config):
    assert len(losses(train(config(epochs=1, resume=True)))) == 3


def test_a_finished_run_has_counted_its_last_epoch(config):
    measured = [line for line in lines(train(config(epochs=2, evaluate_every=1))) if line["kind"] == "evaluation"]
    assert [line["epoch"] for line in measured] == [1, 2]


def test_resuming_a_finished_run_changes_nothing(config):
    plan = config(epochs=1, evaluate_train=True)
    folder = train(plan)
    before = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors")}
    train(replace(plan, resume=True))
    assert {name: (folder / name).read_bytes() for name in before} == before
    train(replace(plan, resume=True, epochs=2))  # but it can be made longer
    assert len(losses(folder)) == 6


def test_resuming_with_another_learning_rate_means_it(config):
    plan = config(schedule="constant", epochs=1)
    folder = train(plan)
    train(replace(plan, lr=2e-4, epochs=2, resume=True))
    assert [line["lr"] for line in lines(folder) if line["kind"] == "train"] == [1e-3] * 3 + [2e-4] * 3


def test_resuming_with_another_model_is_refused(config, done):
    with pytest.raises(UserError, match="holds a run of another model"):
        train(config(epochs=1, overrides=(*SMALL[:5], "queries=9", *SMALL[6:]), resume=True))


# -------------------------------------------------------------------------------------------- losses that explode


def spoil(monkeypatch, step, term=None):
    """From this step on: a term of the loss that is not a number, or a learning rate that ruins the weights."""
    if term is None:
        factor = loop.lr_factor
        count = iter(range(1000))
        monkeypatch.setattr(loop, "lr_factor", lambda *args: factor(*args) if next(count) < step else float("inf"))
        return
    plain, count = loop.SetLoss.__call__, iter(range(1000))

    def spoilt(self, *args):
        loss, terms = plain(self, *args)
        if next(count) < step:
            return loss, terms
        return loss * float("nan"), terms | {name: terms[name] * float("nan") for name in term}

    monkeypatch.setattr(loop.SetLoss, "__call__", spoilt)


@pytest.mark.parametrize("cause", ["terms", "weights"])
def test_loss_that_is_not_finite_stops_the_run(config, monkeypatch, cause):
    save_only_at(monkeypatch, 2)
    spoil(monkeypatch, 3, ("stage1/giou", "base/l1") if cause == "terms" else None)
    named = "terms of the loss are not finite: base/l1, stage1/giou" if cause == "terms" else "not finite: base/logits"
    # Ruined weights show in the step after.
    with pytest.raises(NonFiniteLoss, match=rf"stopped at step {3 + (cause == 'weights')}: .*{named}") as error:
        train(config(checkpoint_minutes=0.0))
    assert isinstance(error.value, UserError) and "Lower the learning rate" in str(error.value)
    folder = RunFolder(config().output, resume=True)
    assert "not finite" in (folder.path / "train.log").read_text()
    state = folder.load_state()
    folder.close()
    assert state["step"] == 2
    assert all(v.isfinite().all() for v in state["model"].values())
    assert all(v.isfinite().all() for v in load_file(folder.path / "model.safetensors").values())
    monkeypatch.undo()
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])
    assert len(losses(train(config(resume=True)))) == 9


def test_ruined_weights_are_never_saved(config, monkeypatch):
    spoil(monkeypatch, 4)
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 5: \d+ weights are not finite"):
        train(config(checkpoint_minutes=0.0))
    folder = RunFolder(config().output, resume=True)
    state = folder.load_state()
    folder.close()
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.parametrize("lr", [1e38, 1001.0])
def test_a_learning_rate_beyond_all_reason(config, lr):
    with pytest.raises(UserError, match="lr=.* must be at most 1000"):
        config(lr=lr)


def test_the_largest_learning_rate_ends_in_one_clear_error(config):
    with pytest.raises(NonFiniteLoss, match="Lower the learning rate"):
        train(config(lr=1000.0, clip=0.0, weight_decay=1000.0, epochs=20))


def test_what_is_done_is_saved_when_a_step_fails(config, monkeypatch):
    """Memory that runs out, say, long after the last checkpoint."""
    whole = train(config("whole"))
    plain, count = loop.SetLoss.__call__, iter(range(1000))

    def fail(self, *args):
        if next(count) == 5:
            raise RuntimeError("CUDA out of memory")
        return plain(self, *args)

    monkeypatch.setattr(loop.SetLoss, "__call__", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config())
    monkeypatch.setattr(loop.SetLoss, "__call__", plain)
    folder = RunFolder(config().output, resume=True)
    assert folder.load_state()["step"] == 5
    folder.close()
    assert lines(train(config(resume=True))) == lines(whole)


def test_figures_that_cannot_be_drawn_are_no_failure(config, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ValueError("Expected \\frac, found '$'\nmore of it")

    monkeypatch.setattr("regolite.plots.run.draw_run", fail)
    folder = train(config(epochs=1))
    said = "warning: the run is done, and its figures cannot be drawn (Expected \\frac, found '$')"
    assert said in capsys.readouterr().out
    assert (folder / "model.safetensors").exists() and lines(folder)[-1]["kind"] == "evaluation"


# -------------------------------------------------------------------------------------------------- early stopping


def score(monkeypatch, *values):
    """Let the next evaluations find these APs."""
    left = iter(values)
    monkeypatch.setattr(loop, "evaluate", lambda *args, **kwargs: evaluate(*args, **kwargs) | {"AP": next(left)})


def evaluations(folder):
    return [(line["step"], line["AP"]) for line in lines(folder) if line["kind"] == "evaluation"]


def test_a_run_stops_when_it_gets_no_better(config, monkeypatch, capsys):
    plan = config(epochs=6, evaluate_every=1, patience=2)
    score(monkeypatch, 10.0, 20.0, 15.0, 20.0)
    folder = train(plan)
    assert evaluations(folder) == [(3, 10.0), (6, 20.0), (9, 15.0), (12, 20.0)], "as good is no better"
    assert "stopped early after step 12: no better AP on val in 2 evaluations" in capsys.readouterr().out
    best, last = (RunFolder(folder, resume=True), load_file(folder / "model.safetensors"))
    assert best.last_step() == 12 and last.keys() == load_file(folder / "best.safetensors").keys()
    best.close()

    train(replace(plan, resume=True))  # it has ended, and is not trained on
    assert len(evaluations(folder)) == 4
    score(monkeypatch, 30.0, 25.0)
    train(replace(plan, patience=3, resume=True))  # with more patience it is
    assert evaluations(folder)[4:] == [(15, 30.0), (18, 25.0)]


def test_early_stopping_can_be_resumed(config, monkeypatch):
    plan = config("whole", epochs=6, evaluate_every=1, patience=2)
    score(monkeypatch, 10.0, 5.0, 4.0)
    whole = train(plan)
    parts = replace(plan, output=config("parts").output)
    score(monkeypatch, 10.0, 5.0)
    with pytest.raises(Interrupted):  # at the evaluation itself, which is done again
        train(parts, watch=lambda line: interrupt_at(6)(line) if line["kind"] == "evaluation" else None)
    score(monkeypatch, 5.0, 4.0)
    folder = train(replace(parts, resume=True))
    assert lines(folder) == lines(whole) and evaluations(whole)[-1] == (9, 4.0)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_patience_needs_evaluations(config):
    with pytest.raises(UserError, match="patience=3 counts evaluations: give evaluate_every"):
        config(patience=3)
    with pytest.raises(UserError, match="patience=-1 must not be negative"):
        config(patience=-1)


# --------------------------------------------------------------------------------------- schedules and parameters


def test_step_schedule():
    plan = RunConfig(schedule="step", drop_epochs=(30, 40), epochs=50)
    factors = [lr_factor(plan, epoch, epoch / 50) for epoch in (0, 29, 30, 39, 40, 49)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_sgd_by_hand():
    """The step is a running sum of gradients, each with its share of the weight."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(model, RunConfig(optimizer="sgd", lr=0.1, weight_decay=0.01))
    weight, step = model.weight.item(), 0.0
    for gradient in (1.0, -2.0, 0.5):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        step = MOMENTUM * step + gradient + 0.01 * weight
        weight -= 0.1 * step
        assert model.weight.item() == pytest.approx(weight, rel=1e-5)
    assert isinstance(make_optimizer(model, RunConfig()), torch.optim.AdamW)


@pytest.mark.parametrize("schedule", ["step", "constant"])
def test_warm_up(schedule):
    """Linear, and from a first step that is more than nothing, as that of one_cycle."""
    plan = RunConfig(schedule=schedule, warmup=0.2)
    assert [lr_factor(plan, 0, p) for p in (0.0, 0.05, 0.1, 0.2, 0.5)] == pytest.approx([0.04, 0.28, 0.52, 1, 1])
    assert lr_factor(RunConfig(schedule=schedule), 0, 0.0) == 1


@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_one_cycle(warmup):
    plan = RunConfig(schedule="one_cycle", warmup=warmup)
    peak = warmup or 0.1
    factors = [lr_factor(plan, 0, n / 1000) for n in range(1001)]
    top = round(1000 * peak)
    assert factors[0] == pytest.approx(0.04) and factors[top] == pytest.approx(1) and factors[-1] == pytest.approx(0)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert max(abs(a - b) for a, b in zip(factors, factors[1:])) < 0.02  # no jump anywhere


def test_rates_of_a_run_follow_the_schedule(config):
    folder = train(config(epochs=4, schedule="step", drop_epochs=(1, 3)))
    rates = [line["lr"] for line in lines(folder) if line["kind"] == "train"]
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 6 + [1e-5] * 3)


def test_run_that_is_limited_by_time(config, monkeypatch):
    """The schedule ends with the time, however many epochs were asked for."""

    class Ticking(loop._Clock):
        """Every look at the clock takes a second."""

        looks = 0

        @property
        def seconds(self):
            Ticking.looks += 1
            return float(Ticking.looks)

    monkeypatch.setattr(loop, "_Clock", Ticking)
    folder = train(config(epochs=10_000, max_minutes=1.0))
    rates = [line["lr"] for line in lines(folder) if line["kind"] == "train"]
    assert 8 < len(rates) <= 60
    assert max(rates) > 0.9e-3 and rates[-1] < 0.05e-3


@pytest.fixture
def cpu(monkeypatch):
    """CPU time, in which a step takes a second and an evaluation an hour; a list of one number, for tests to change."""
    spent, backward, evaluate = [12345.0], loop._backward, loop._evaluate

    def step(*args):
        spent[0] += 1
        return backward(*args)

    def evaluation(*args):
        spent[0] += 3600
        evaluate(*args)

    monkeypatch.setattr(loop.time, "process_time", lambda: spent[0])
    monkeypatch.setattr(loop, "_backward", step)
    monkeypatch.setattr(loop, "_evaluate", evaluation)
    return spent


def test_run_that_is_limited_by_cpu_time(config, cpu):
    """CPU time of training decides when a run and its schedule end, whatever evaluations take."""
    found = lines(train(config(epochs=10_000, max_cpu_minutes=0.2, evaluate_every=1)))
    rates = [line["lr"] for line in found if line["kind"] == "train"]
    assert len(rates) == 12 and rates[-1] < 0.05e-3 < 0.9e-3 < max(rates)
    assert [line["step"] for line in found if line["kind"] == "evaluation"] == [3, 6, 9, 12]


def test_cpu_time_of_earlier_sessions_counts(config, cpu):
    limited = {"epochs": 10_000, "max_cpu_minutes": 0.2, "checkpoint_minutes": 0.0}
    whole = train(config("whole", **limited))
    with pytest.raises(Interrupted):
        train(config("two", **limited), interrupt_at(8))
    cpu[0] = 0.5  # the clock of another process
    resumed = train(config("two", **limited, resume=True))
    assert lines(resumed) == lines(whole)
    last = RunFolder(resumed, resume=True).read_metrics()[-1]
    assert (last["kind"], last["step"], last["cpu_seconds"]) == ("evaluation", 12, 12.0)


def test_parameter_groups():
    overrides = {"weights": None, "dim": 32, "heads": 4, "detector.ffn_dim": 32, "rego.ffn_dim": 32}
    model = build("rego_deformable_detr_tiny", 3, **overrides)
    plan = RunConfig(lr=1e-3, backbone_lr_mult=0.2, sampling_lr_mult=0.5)
    groups = {group["name"]: group for group in parameter_groups(model, plan)}
    assert {name: group["lr"] for name, group in groups.items()} == {"backbone": 2e-4, "sampling": 5e-4, "rest": 1e-3}
    assert all(group["base_lr"] == group["lr"] for group in groups.values())

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {name: [names[id(p)] for p in group["params"]] for name, group in groups.items()}
    assert all("backbone." in name for name in members["backbone"])
    assert all("sampling_offsets" in name or "reference_points" in name for name in members["sampling"])
    assert len(members["sampling"]) == 2 * (2 + 3 + 1)  # weights and biases: encoder layers, decoder layers, the points
    assert not any(word in name for name in members["rest"] for word in ("backbone.", "sampling_off", "reference_po"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(sum(members.values(), [])) == sorted(trained)  # each one once, frozen ones nowhere
    assert len(trained) < len(names)


def test_images_of_rare_classes_are_shown_more_often(config):
    small = {"epochs": 2, "repeat_rare": 1.0}
    often, again = train(config("often", **small)), train(config("again", **small))
    assert losses(often) == losses(again)
    assert len(losses(often)) > len(losses(train(config("once", epochs=2)))), "an epoch has more steps"


class TestCopyPaste:
    @pytest.fixture
    def photographs(self, config):
        tiny = {"data": "data/coco_tiny", "limit_images": 6, "epochs": 1, "evaluate_every": 0}

        def make(name, **changes):
            return config(name, **tiny, **changes)

        return make

    @pytest.fixture(autouse=True)
    def without_evaluation(self, monkeypatch):
        monkeypatch.setattr(loop, "_evaluate", lambda *args: None)

    def test_changes_what_is_learnt_and_can_be_repeated(self, photographs):
        pasted, again = (losses(train(photographs(name, copy_paste=1.0))) for name in ("a", "b"))
        assert pasted == again != losses(train(photographs("c")))

    def test_measures_images_as_they_are(self, photographs, monkeypatch):
        measured = {}
        monkeypatch.setattr(
            loop, "_evaluate", lambda state, dataset, split, workers, on_broken: measured.update({split: dataset})
        )
        train(photographs("a", copy_paste=1.0, evaluate_train=True))
        [pixels, target], [same, _] = measured["train"][0], measured["train"][0]
        assert torch.equal(pixels, same) and len(target) == len(measured["train"].objects(0).targets(1000, 1000))

    def test_scenes_have_no_masks(self, config):
        with pytest.raises(UserError, match="scenes have none: use copy_paste=0"):
            train(config(copy_paste=0.5))

    def test_only_images_that_are_trained_on_lend_objects(self, photographs, monkeypatch):
        asked = {}

        def watched(folder, **options):
            asked.update(options, folder=folder)
            return cut_outs(folder, **options)

        monkeypatch.setattr(setup, "cut_outs", watched)
        train(photographs("a", copy_paste=1.0))
        assert asked == {"folder": "data/coco_tiny", "limit": 6}


# ----------------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epohcs": 3}, "unknown parameter 'epohcs'; did you mean 'epochs'?"),
        (
            {"zzz": 3},
            "unknown parameter 'zzz'; choose from accumulate, activation_checkpointing, augment, backbone_lr_mult",
        ),
        ({"epochs": "3"}, "epochs='3' is not a whole number"),
        ({"epochs": 2.5}, "epochs=2.5 is not a whole number"),
        ({"epochs": True}, "epochs=True is not a whole number"),
        ({"epochs": 0}, "epochs=0 must be greater than 0"),
        ({"lr": "fast"}, "lr='fast' is not a number"),
        ({"lr": float("nan")}, "lr=nan is not a number"),
        ({"lr": -1e-4}, "must be greater than 0"),
        ({"weight_decay": -1.0}, "must not be negative"),
        ({"checkpoint_minutes": -1.0}, "must not be negative"),
        ({"max_minutes": 0}, "max_minutes=0 must be greater than 0, or left out"),
        ({"max_cpu_minutes": -1.0}, "max_cpu_minutes=-1.0 must be greater than 0, or left out"),
        ({"limit_images": -5}, "must be greater than 0, or left out"),
        ({"copy_paste": 1.5}, "copy_paste=1.5 is a probability: give a number from 0 to 1"),
        ({"repeat_rare": -0.1}, "repeat_rare=-0.1 is a share of the images: give a number from 0 to 1"),
        ({"warmup": 1.0}, "warmup=1.0 must be at least 0 and less than 1"),
        ({"ema": 1.5}, "ema=1.5 must be at least 0 and less than 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 2**32}, "less than 2"),
        ({"schedule": "cosine"}, "schedule='cosine' is not one of 'step', 'one_cycle', 'constant'"),
        ({"optimizer": "adam"}, "optimizer='adam' is not one of 'adamw', 'sgd'"),
        ({"drop_epochs": [1, "2"]}, "is not a list of whole numbers"),
        ({"resume": "yes"}, "resume='yes' is not true or false"),
        ({"overrides": "queries=3"}, "overrides='queries=3' is not a list of texts"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(UserError) as error, unchecked():
        RunConfig.of(values)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_right_values():
    with unchecked():
        plan = RunConfig.of({"lr": 1, "drop_epochs": [3, 5], "max_minutes": None, "overrides": ["queries=3"]})
        assert RunConfig.of(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.drop_epochs == (3, 5) and plan.overrides == ("queries=3",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": ("queries",)}, "override 'queries' has no value; write name=value"),
        ({"overrides": ("queriess=3",)}, "has no field 'queriess'; did you mean 'queries'?"),
        ({"model": "rego_deformable_detr_tyni"}, "did you mean"),
        ({"precision": "fp16"}, "precision='fp16' needs a GPU; use precision='bf16' or 'no'"),
        ({"device": "gpu"}, "unknown device 'gpu'; choose auto, cpu, cuda or mps"),
        ({"data": "nowhere"}, "data folder nowhere does not exist"),
    ],
)
def test_what_cannot_be_had_is_said_before_the_run_begins(config, tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        train(config(**changes))
    assert message in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


# ----------------------------------------------------------------------------------------- the order of the images


def test_every_image_once_an_epoch():
    shapes = torch.rand(23)
    epochs = [[key for batch in EpochBatches(shapes, 4, 0, epoch) for key in batch] for epoch in (0, 1)]
    for epoch, keys in enumerate(epochs):
        assert {e for e, _ in keys} == {epoch} and sorted(i for _, i in keys) == list(range(23))
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    assert list(EpochBatches(shapes, 4, 0, 1)) == list(EpochBatches(shapes, 4, 0, 1))
    assert list(EpochBatches(shapes, 4, 0, 1)) != list(EpochBatches(shapes, 4, 1, 1))
    batches = EpochBatches(shapes, 4, 0, 0)
    assert len(batches) == len(list(batches)) == 6 and max(map(len, batches)) == 4


def test_interrupted_epoch_goes_on_where_it_was():
    shapes = torch.rand(23)
    every = list(EpochBatches(shapes, 4, 0, 2))
    for skip in range(7):
        rest = EpochBatches(shapes, 4, 0, 2, skip)
        assert list(rest) == every[skip:] and len(rest) == 6 - skip


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_share_every_batch(processes):
    shapes = torch.rand(21)
    whole = list(EpochBatches(shapes, 8, 0, 0))
    shares = [list(EpochBatches(shapes, 8, 0, 0, rank=r, processes=processes)) for r in range(processes)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert all(parts)  # nobody is idle, or the others would wait for ever
        assert set(sum(parts, [])) == set(batch)


def test_a_image_looks_the_same_whoever_prepares_it():
    dataset = Scenes(4, size=64, transform=make_transform("laptop", 64, train=True))
    items = SeededItems(dataset, seed=3)
    batches = EpochBatches(torch.ones(4), 2, 3, 0)
    for workers in (0, 2):
        for (images, targets, broken), keys in zip(loader(dataset, 3, workers, batches, False), batches):
            wanted, others = collate([items[key][:2] for key in keys], multiple=32)
            assert torch.equal(images.pixels, wanted.pixels)
            assert [t.image_id for t in targets] == [t.image_id for t in others] and not broken
    before = torch.get_rng_state()
    assert not torch.equal(items[0, 1][0], items[1, 1][0])  # but another one in another epoch
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------ said, not silent


@pytest.fixture
def data(tmp_path):
    """Scenes as files, whose annotations a test may change."""
    for count, split in ((4, "train"), (2, "val")):
        Scenes(count, size=64, split=split).write(tmp_path / "data")

    def change(split, annotations):
        file = tmp_path / "data" / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["annotations"] = annotations(content["annotations"])
        file.write_text(json.dumps(content))
        return str(tmp_path / "data")

    return change


@pytest.mark.parametrize(("split", "said"), [("train", "nothing to learn"), ("val", "nothing to measure")])
def test_no_annotation_at_all_is_an_error(config, data, split, said):
    run = config(data=data(split, lambda annotations: []))
    with pytest.raises(UserError, match=rf"instances_{split}.json: \d images without a single annotation, {said}"):
        train(run)
    assert not Path(run.output).exists()


def test_what_cannot_be_measured_is_neither_0_nor_best(config, data):
    root = data("val", lambda annotations: [{**one, "iscrowd": 1} for one in annotations])
    folder = train(config(data=root, evaluate_every=1, epochs=2))
    log = (folder / "train.log").read_text()
    assert log.count("AP on val by stage: -, -, -") == 2 and "0.0" not in log.split("by stage: ")[1][:9]
    assert log.count("AP on val cannot be measured") == 1, "once, and not at every evaluation"
    assert not (folder / "best.safetensors").exists() and not (folder / "checkpoints" / "best.pt").exists()
    assert {line["AP"] for line in lines(folder) if line["kind"] == "evaluation"} == {None}


def test_more_objects_than_queries_is_said_once_with_counts(config, data):
    def crowd(annotations):
        copies = [{**annotations[0], "decided_by": None, "id": 9000 + n, "image_id": 2} for n in range(11)]
        crowds = [
            {**annotations[0], "decided_by": None, "id": 9100 + n, "image_id": 3, "iscrowd": 1} for n in range(11)
        ]
        return [one for one in annotations if one["image_id"] not in (2, 3)] + copies + crowds

    root = data("train", crowd)
    log = (train(config(data=root)) / "train.log").read_text()
    said = "1 of 4 training images have more objects than the detector has queries (8), up to 11 (train_000002.png)"
    assert log.count(said) == 1 and "set queries=11" in log
    enough = config("enough", data=root, overrides=("queries=11", *(s for s in SMALL if s[:7] != "queries")))
    assert "more objects" not in (train(enough) / "train.log").read_text()
