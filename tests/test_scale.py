"""Many processes, parts of batches, mixed precision, recomputing: the same training, done in another way."""

from __future__ import annotations

import json
import mmap
import sys
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small_models import CLASSES, DETECTORS, batch, unchecked
from small_runs import TRAIN, WITHOUT_FIGURES, fork_two
from torch.utils._pytree import tree_leaves

from regolite import Rego, RunConfig, UserError, build, evaluate, train
from regolite.data import DetectionDataset, open_data
from regolite.evaluation import detect_all
from regolite.losses import LossConfig, SetLoss
from regolite.training import launch, loop
from regolite.training.activation_checkpointing import checkpoint_activations, keep_all_activations
from regolite.training.batches import EpochBatches, loader, steps
from regolite.training.environment import from_slurm
from regolite.training.metrics import MEASURED, Meter, peak_memory, timed
from regolite.types import DetectorOutput, Prediction, Target
from regolite.utils import distributed

SMALL = (
    "dim=32", "heads=4", "detector.ffn_dim=32", "detector.encoder_layers=1", "detector.decoder_layers=1", "queries=8",
    "rego.ffn_dim=32", "stages=1", "detector.dropout=0.0", "rego.dropout=0.0",
)  # fmt: skip
# 13 images in batches of four: four steps an epoch, the last of one image, too few for two processes or two parts.
# Three batches of validation images, the last one not full.
CONFIG = RunConfig(
    data="scenes:13:val=19:size=64",
    model="rego_deformable_detr_scenes",
    overrides=SMALL,
    image_size=64,
    batch_size=4,
    epochs=5,
    seed=2,
    schedule="constant",
    evaluate_every=0,
    log_every=1,
    device="cpu",
)


@pytest.fixture(autouse=True)
def without_images(monkeypatch):
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])


@pytest.fixture
def config(tmp_path):
    def make(name="run", **changes):
        return replace(CONFIG, output=str(tmp_path / name), **changes)

    return make


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of 20 steps in one process, each batch in one part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])
        return train(replace(CONFIG, output=str(tmp_path_factory.mktemp("alone"))))


def lines(folder, kind):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in found if line["kind"] == kind]


def same(folder, other, steps=20):
    """The same losses and weights within 1e-5; the file has five decimals, which may add another one."""
    ours, theirs = lines(folder, "train"), lines(other, "train")
    assert len(ours) == len(theirs) == steps
    for mine, wanted in zip(ours, theirs):
        assert mine["loss"] == pytest.approx(wanted["loss"], rel=0, abs=2.1e-5)
        assert mine["terms"] == pytest.approx(wanted["terms"], rel=0, abs=2.1e-5)
        assert mine["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-4)
    weights = load_file(other / "model.safetensors")
    for name, value in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-5)


def little_rego():
    sizes = {"dim": 32, "heads": 4, "detector.ffn_dim": 32, "queries": 8, "weights": None}
    return build("rego_deformable_detr_scenes", len(open_data("scenes:1").classes), **sizes)


# ------------------------------------------------------------------------------------------------ shares of a batch


class Numbers(DetectionDataset):
    """41 images of a pixel, whose targets hold nothing but their number."""

    image = objects = size = file_name = None  # unused here

    def __len__(self):
        return 41

    def __getitem__(self, i):
        return torch.zeros(3, 1, 1), Target(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), i, (1, 1))


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (2, 1), (1, 3), (2, 2), (3, 2)])
def test_every_image_counts_once(count, parts):
    shapes = torch.rand(41)
    whole = EpochBatches(shapes, 12, 0, 0).whole()
    seen = [[] for _ in whole]
    for rank in range(count):
        batches = EpochBatches(shapes, 12, 0, 0, rank=rank, processes=count, parts=parts)
        loaded = loader(Numbers(), 0, 0, batches, False)
        assert len(loaded) == len(list(batches)) == parts * len(whole)
        done = list(steps(loaded, batches))
        assert len(done) == len(whole)
        for step, own in enumerate(done):
            assert len(own) == parts and all(part.targets for part in own)  # nobody is idle, or all would wait for ever
            seen[step] += [target.image_id for part in own if part.counts for target in part.targets]
            if len(whole[step]) == 12:  # full batches are shared evenly
                assert [part.num_images for part in own] == [12 // count // parts] * parts
    assert [sorted(indices) for indices in seen] == [sorted(indices) for indices in whole]


def output_of(scoring, images):
    torch.manual_seed(1)
    logits = torch.randn(images, 6, CLASSES + (scoring == "softmax"), requires_grad=True)
    boxes = (torch.rand(images, 6, 4) * 0.5 + 0.2).requires_grad_()
    return DetectorOutput([Prediction(logits, boxes)], torch.zeros(images, 6, 1), [])


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("counts", [(2, 0, 3, 1), (1, 0, 0, 0), (0, 0, 0, 0)])
def test_losses_of_parts_sum_up_to_the_loss_of_the_batch(scoring, counts):
    """Also with fewer objects than parts, where a mean of objects over parts would be less than one."""
    targets = [Target(torch.arange(n), torch.rand(n, 4) * 0.4 + 0.1, 0, (9, 9)) for n in counts]
    output, set_loss = output_of(scoring, 4), SetLoss(LossConfig(label=1.0), scoring)
    prediction = output.layers[0]
    wanted, terms = set_loss(output, targets)
    gradient = torch.autograd.grad(wanted, [prediction.logits, prediction.boxes], retain_graph=True, allow_unused=True)
    total = 0.0
    for i in range(4):
        part = replace(output, layers=[Prediction(prediction.logits[i : i + 1], prediction.boxes[i : i + 1])])
        total = total + set_loss(part, targets[i : i + 1], float(sum(counts)), 4.0)[0]
    torch.testing.assert_close(total, wanted)
    ours = torch.autograd.grad(total, [prediction.logits, prediction.boxes], allow_unused=True)
    torch.testing.assert_close(ours, gradient)


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"batch_size": 6, "processes": 4}, {}, "is that of all processes together, and cannot be shared by 4"),
        ({"batch_size": 6, "accumulate": 4}, {}, "shared by 1 with accumulate=4; choose a multiple of 4"),
        ({"batch_size": 6}, {"RANK": "0", "WORLD_SIZE": "4"}, "cannot be shared by 4"),
        ({"processes": 2}, {"RANK": "0", "WORLD_SIZE": "4"}, "processes=2, but 4 have been started; leave it out"),
        ({"processes": 0}, {}, "processes=0 must be greater than 0"),
    ],
)  # fmt: skip
def test_shares_that_cannot_be(config, monkeypatch, changes, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        train(config(**changes))
    assert message in str(error.value)


def test_what_lives_here_cannot_be_used_there(config):
    with pytest.raises(UserError, match="know no watch and no model of this one"):
        train(config(processes=2), watch=print)


# --------------------------------------------------------------------------------------------- parts of a batch


def test_accumulated_parts_are_the_larger_batch(config, alone):
    folder = train(config(accumulate=4))
    same(folder, alone)
    assert lines(folder, "evaluation") == lines(alone, "evaluation")
    assert "each with 4 parts of 1 images" in (folder / "train.log").read_text()


def test_accumulated_parts_are_the_larger_batch_for_a_softmax_too(config):
    """Its cross-entropy is divided by the weight of all queries, and not by the number of objects."""
    changes = {
        "model": "detr_r50",
        "overrides": ("backbone=tiny", "weights=none", *SMALL[:6], "detector.dropout=0.0"),
        "epochs": 1,
        "seed": 4,  # queries are nearly equal before training: with some seeds, rounding decides a match
    }
    whole, parts = train(config("whole", **changes)), train(config("parts", accumulate=2, **changes))
    same(parts, whole, steps=4)


# ------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("images", [1, 8, 19])
@pytest.mark.parametrize("count", [2, 3])
def test_shared_evaluation_loses_and_doubles_nothing(monkeypatch, images, count):
    data = open_data(f"scenes:1:val={images}:size=64", "val")
    model = little_rego()
    wanted = detect_all(model, data, progress=False)
    assert {line["image_id"] for line in wanted[0]} == set(data.image_ids)

    shares = []
    monkeypatch.setattr(distributed, "world_size", lambda: count)
    for rank in reversed(range(count)):  # the first process last, when the others have told what they have
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            distributed, "gather", lambda own, rank=rank: shares.insert(0, own) or (shares if not rank else [])
        )
        found = detect_all(model, data, progress=False)
        assert rank == 0 or found == []
    assert found == wanted  # to the bit, and in the same order


# ------------------------------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_predictions_stay_in_float32_under_autocast(name, kind):
    model = Rego(DETECTORS[name](), stages=2, ffn_dim=32).eval()
    with torch.no_grad(), torch.autocast("cpu", kind):
        output = model(batch((64, 96), (64, 64)))
    predictions = [*output.layers, *(p for stage in output.stages for p in stage), *filter(None, [output.proposals])]
    assert len(predictions) >= 6
    for prediction in predictions:
        assert prediction.logits.dtype == prediction.boxes.dtype == torch.float32
        assert not torch.equal(prediction.boxes, prediction.boxes.to(kind).float()), "they lie on the grid of 16 bits"
        assert not torch.equal(prediction.logits, prediction.logits.to(kind).float())


def test_a_given_model_is_given_back_as_it_was(config):
    model = little_rego()
    model.model_config = replace(model.model_config, classes=open_data("scenes:1").classes)
    layer = model.detector.encoder.layers[0]
    train(config(overrides=(), epochs=1, precision="bf16", activation_checkpointing=True), model=model)
    assert "forward" not in vars(layer)
    with torch.no_grad():
        assert model(batch((64, 64))).queries.dtype == torch.float32


def test_the_scaler_of_float16_goes_on_where_it_was(config, monkeypatch):
    """A CPU has no use for it, but can multiply and divide all the same."""
    make = loop.make_accelerator

    def with_scaler(plan, *more):
        accelerator = make(plan, *more)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", with_scaler)
    whole = train(config("whole", epochs=2))
    plan = config("parts", epochs=1)
    train(plan)
    states = []
    for folder in (train(replace(plan, epochs=2, resume=True)), whole):
        [last] = sorted((folder / "checkpoints").iterdir())[-1:]
        states.append(torch.load(last, weights_only=True)["scaler"])
    assert states[0] == states[1]
    assert states[0]["scale"] == 256.0 and states[0]["_growth_tracker"] == 2  # 8 steps: doubled twice, two steps ago


def test_steps_that_float16_skips_have_no_gradient():
    window = Meter()
    for norm, skipped in ((float("inf"), True), (2.0, False), (4.0, False)):
        window.add({"loss": 1.0}, torch.tensor(norm), skipped, 4.0, 0.25, 0.75)
    line = window.line(3, 0, 1.0, 1e-4, torch.device("cpu"))
    assert (line["gradient_norm"], line["skipped_steps"]) == (3.0, 1)


# ----------------------------------------------------------------------------------------------------- recomputing


def gradients(model, images):
    """All gradients, and the bytes kept until the backward pass."""
    kept = {}

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(5)  # of the dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
        loss = sum((p.logits.square().sum() + p.boxes.square().sum()) for p in (*output.by_stage, *output.layers))
    total = sum(kept.values())
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], total


@pytest.mark.parametrize("name", DETECTORS)
def test_recomputed_gradients_are_the_same(name):
    model = Rego(DETECTORS[name](dropout=0.2), stages=1, ffn_dim=32, dropout=0.2).train()
    images = batch((64, 96), (96, 64))
    wanted, memory = gradients(model, images)
    checkpoint_activations(model)
    ours, less = gradients(model, images)
    assert len(ours) == len(wanted) and all(torch.equal(a, b) for a, b in zip(ours, wanted))
    assert less < 0.95 * memory  # the backbone of these keeps far more than their few layers
    keep_all_activations(model)
    again, same_memory = gradients(model, images)
    assert torch.equal(again[0], wanted[0]) and same_memory > less


@pytest.mark.parametrize("name", DETECTORS)
def test_recomputing_is_told_the_device(name, monkeypatch):
    """PyTorch restores the random state of the devices of tensors among the arguments, and sees none in a dataclass."""
    seen = []

    def run(function, *args, use_reentrant, **kwargs):
        seen.append(any(isinstance(value, torch.Tensor) for value in tree_leaves(args)))
        return function(*args, **kwargs)

    monkeypatch.setattr("regolite.training.activation_checkpointing.checkpoint", run)
    model = Rego(DETECTORS[name](), stages=1, ffn_dim=32, encoder_layers=1)
    checkpoint_activations(model)
    model(batch((64, 96)))
    assert len(seen) >= len(model.transformer_layers()) >= 5  # SMCA calls a layer once for each level
    assert all(seen)


def test_recomputing_changes_no_bit_of_a_run(config):
    changes = {"overrides": (*SMALL[:-2], "detector.dropout=0.1", "rego.dropout=0.1"), "epochs": 1, "ema": 0.5}
    plain, recomputed = train(config("a", **changes)), train(config("b", activation_checkpointing=True, **changes))
    assert (plain / "model.safetensors").read_bytes() == (recomputed / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------- what a run measures


def test_lines_say_what_a_step_costs(alone):
    for line in map(json.loads, (alone / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "train":
            assert 0 < line["data_wait"] < 1 and line["step_seconds"] > 0 and 0.1 < line["memory_gb"] < 100
            images = 1 if line["step"] % 4 not in range(4) else line["images_per_second"] * line["step_seconds"]
            assert images == pytest.approx(4, rel=0.02) or images == pytest.approx(1, rel=0.02)


def test_waiting_is_told_from_working():
    assert [item for _, item in timed("abc")] == list("abc") and all(seconds >= 0 for seconds, _ in timed("abc"))
    window = Meter()
    window.add({"loss": 2.0}, None, False, 6.0, waited=1.0, worked=3.0)
    restored = Meter(**window.state())
    restored.add({"loss": 4.0}, None, False, 6.0, waited=1.0, worked=3.0)
    line = restored.line(2, 0, 8.0, 1e-4, torch.device("cpu"))
    assert (line["loss"], line["images_per_second"], line["step_seconds"], line["data_wait"]) == (3.0, 1.5, 4.0, 0.25)
    assert line["gradient_norm"] is None and "skipped_steps" not in line and "loss" not in line["terms"]


def test_peak_memory_grows_with_what_is_in_use():
    before, now = peak_memory(torch.device("cpu")), psutil.Process().memory_info().rss / 1e9
    # By pages, since freed memory that glibc has kept for itself would be used again.
    with mmap.mmap(-1, int(1e9 * (before - now + 0.3))) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert 0.25 < peak_memory(torch.device("cpu")) - before < 1.0


def test_tensorboard_gets_every_number(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []
    plan = config(epochs=1, tensorboard=True)
    folder = train(plan, watch=seen.append)
    train(replace(plan, epochs=2, resume=True))

    written = EventAccumulator(str(folder / "tensorboard")).Reload()
    steps, evaluations = lines(folder, "train"), lines(folder, "evaluation")
    for name, wanted in (
        ("train/loss", [(line["step"], line["loss"]) for line in steps]),
        ("train/terms/base/giou", [(line["step"], line["terms"]["base/giou"]) for line in steps]),
        ("evaluation/val/AR100", [(line["step"], line["AR100"]) for line in evaluations]),
        ("evaluation/val/stage 0/AR100", [(line["step"], line["stages"][0]["AR100"]) for line in evaluations]),
    ):
        found = [(event.step, event.value) for event in written.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted], name
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted]), name
    assert len(seen) == 5 and len(steps) == 8


def test_without_tensorboard_nothing_begins(config, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"tensorboard=True needs TensorBoard: pip install 'regolite\[tensorboard\]'"):
        train(config(tensorboard=True))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ several processes


SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-09,12].site", "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0",
}  # fmt: skip


def test_what_slurm_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = from_slurm(SLURM)
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu07.site",
    }  # fmt: skip
    assert 20000 <= port < 40000 and from_slurm(SLURM | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != str(port)
    assert from_slurm(SLURM | {"SLURM_STEP_NODELIST": "a1,b[2-3]"})["MASTER_ADDR"] == "a1"
    assert from_slurm(SLURM | {"MASTER_ADDR": "10.0.0.1"})["MASTER_ADDR"] == "10.0.0.1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each task sees its own GPU alone
    assert from_slurm(SLURM)["LOCAL_RANK"] == "0"
    for nothing in ({}, SLURM | {"RANK": "1", "WORLD_SIZE": "2"}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}):
        assert from_slurm(nothing) == {}


@pytest.mark.slow
def test_two_processes_train_as_one(config, alone, capfd, monkeypatch, tmp_path):
    """20 steps, some of them of one image, and the twelve figures of every stage on three batches of images."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    # By torch.distributed.run, as from a notebook. "auto" has to connect them on a machine without a GPU, too: once
    # each trained by itself there, and both wrote to one folder.
    is_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    folder = train(config(processes=2, device="cpu" if is_gpu else "auto"))
    assert not list(temporary.iterdir()), "what they wrote there is nobody's now"
    same(folder, alone)
    assert lines(folder, "evaluation") == lines(alone, "evaluation")
    log = (folder / "train.log").read_text()
    assert "2 processes on cpu, each with 1 parts of 2 images" in log and log.count("4 images a step") == 1
    assert "AP on val by stage" in capfd.readouterr().out
    # And go on, now in one process: the weights are everybody's.
    train(config(epochs=6, resume=True))
    assert len(lines(folder, "train")) == 24


@pytest.mark.slow
def test_two_tasks_of_slurm_in_parts_train_as_one(config, tmp_path):
    """As srun starts them; also with parts, and a softmax whose cross-entropy is divided by weights."""
    changes = {
        "model": "detr_r50",
        "overrides": ("backbone=tiny", "weights=none", *SMALL[:6], "detector.dropout=0.0"),
        "epochs": 1,
        "seed": 4,  # without ties in the matching, see above
    }
    whole = train(config("whole", **changes))
    plan, folder = config(accumulate=2, **changes), tmp_path / "run"
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))

    def told(rank, port):
        slurm = SLURM | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": "2"}
        return slurm | {"SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    fork_two(TRAIN, str(tmp_path / "plan.json"), told=told)
    same(folder, whole, steps=4)
    assert lines(folder, "evaluation") == lines(whole, "evaluation")


SPARE = f"""{WITHOUT_FIGURES}
import json, sys
import torch, regolite
from regolite.data import open_data

plan = regolite.RunConfig.of(json.load(open(sys.argv[1])))
sizes = dict(dim=32, heads=4, ffn_dim=32, queries=8, weights=None, encoder_layers=1, decoder_layers=1)
model = regolite.build("deformable_detr_scenes", len(open_data("scenes:1").classes), **sizes)
model.spare = torch.nn.Parameter(torch.zeros(1))  # as RT-DETR has, whose own training alone needs it
model.has_unused_parameters = True
try:
    regolite.train(plan, model=model)
finally:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_a_model_with_parameters_without_gradients(config, tmp_path):
    plan = config(overrides=(), epochs=1)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    errors = fork_two(SPARE, str(tmp_path / "plan.json"))
    assert len(lines(tmp_path / "run", "train")) == 4, errors
    assert float(load_file(tmp_path / "run" / "model.safetensors")["spare"]) == 0.0


@pytest.mark.slow
def test_processes_say_what_is_wrong(config):
    with pytest.raises(UserError, match="data folder nowhere does not exist") as error, unchecked():
        launch(config(data="nowhere", processes=2))
    assert "\n" not in str(error.value)


def test_evaluation_outside_of_a_run_is_that_of_one_process():
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert (
        distributed.total(1, 2.5) == [1.0, 2.5] and distributed.gather("a") == ["a"] and distributed.from_first(3) == 3
    )
    model = little_rego()
    assert evaluate(model, open_data("scenes:1:val=3:size=64", "val"), progress=False)["images"] == 3
