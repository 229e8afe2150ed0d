"""The baselines: torchvision's own answers, through this package's harness."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torchvision
from PIL import Image
from small_models import batch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import regolite
from regolite.checkpoint import save_model
from regolite.cli import main
from regolite.data import batch_images, collate, make_transform, open_data
from regolite.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from regolite.errors import UserError
from regolite.evaluation import evaluate
from regolite.inference import detect_by_stage
from regolite.loading import load
from regolite.losses import OwnLoss
from regolite.models.baselines import COCO_CLASSES, COCO_IDS, COCO_WEIGHTS, Baseline, BaselineConfig
from regolite.models.presets import build, configure, presets
from regolite.training.config import RunConfig
from regolite.training.schedule import parameter_groups
from regolite.types import Target

KINDS = ("fcos", "faster_rcnn", "mask_rcnn")
TABLE_1 = {"fcos_r50": 32, "faster_rcnn_r50": 42, "faster_rcnn_r101": 61, "mask_rcnn_x101": 102}
TABLE_1 |= {"cascade_mask_rcnn_x101": 135, "tsp_rcnn_r50": 57}  # the last is not in the paper
COCO_TINY = "data/coco_tiny"


def small(kind="faster_rcnn", num_classes=4, **fields):
    """A network of 20 million weights, which finds something although it has learned nothing."""
    model = Baseline(BaselineConfig(kind, "resnet18", None, **fields), num_classes).eval()
    return talkative(model)


def talkative(model):
    if model.config.kind == "fcos":
        model.net.score_thresh = 0.0
        nn.init.normal_(model.net.head.classification_head.cls_logits.weight, std=1.0)
    else:
        model.net.roi_heads.score_thresh = 0.0
        nn.init.normal_(model.net.roi_heads.box_predictor.cls_score.weight, std=1.0)
        nn.init.normal_(model.net.roi_heads.box_predictor.bbox_pred.weight, std=0.1)
    return model


def torchvisions_own(model):
    """The same weights in a network that torchvision alone has made; images whose shorter side is 64 keep it."""
    kind, columns = model.config.kind, model.num_classes + 1
    options = {"backbone_name": "resnet18", "weights": None}
    if kind == "fcos":
        backbone = resnet_fpn_backbone(**options, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
        net = FCOS(backbone, columns, min_size=64, score_thresh=0.0, detections_per_img=20)
    else:
        make = FasterRCNN if kind == "faster_rcnn" else MaskRCNN
        choices = {"box_score_thresh": 0.0, "box_detections_per_img": 20}
        net = make(resnet_fpn_backbone(**options), columns, min_size=64, **choices)
    net.load_state_dict(model.net.state_dict())
    return net.eval()


def normalized(image):
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


# Parity


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_torchvision_gives_the_same(kind):
    """Two images of different size in one batch, of which torchvision gets the raw pixels."""
    model = small(kind)
    raw = [torch.rand(3, 64, 150), torch.rand(3, 90, 64)]
    theirs = torchvisions_own(model)(raw)
    images = batch_images([normalized(image) for image in raw], multiple=50)  # torchvision pads to 32
    for mine, wanted in zip(model.detections(images, images.sizes, top_k=20), theirs, strict=True):
        assert len(mine) == len(wanted["scores"]) == 20
        torch.testing.assert_close(mine.scores, wanted["scores"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.boxes_xyxy, wanted["boxes"], atol=1e-3, rtol=1e-4)
        assert torch.equal(mine.labels, wanted["labels"] - 1)
        assert mine.queries.tolist() == list(range(20))
        assert (mine.scores.diff() <= 0).all()


@torch.inference_mode()
def test_boxes_are_pixels_of_the_original_images():
    model, images = small(), batch((64, 96), (80, 50))
    plain = model(images)
    sizes = torch.tensor([[128, 288], [20, 200]])  # twice as high, three times as wide; a quarter, four times
    for found, wanted, scale in zip(model.detections(images, sizes), plain, ([3.0, 2.0], [4.0, 0.25])):
        torch.testing.assert_close(found.boxes_xyxy, wanted.boxes_xyxy * torch.tensor(scale * 2))
        assert torch.equal(found.scores, wanted.scores)
    for found, (height, width) in zip(plain, images.sizes.tolist()):  # nothing lies on padding
        assert found.boxes_xyxy.min() >= 0
        assert found.boxes_xyxy[:, 2].max() <= width and found.boxes_xyxy[:, 3].max() <= height
    [best, _] = model.detections(images, sizes, top_k=3)
    assert torch.equal(best.scores, plain[0].scores[:3])


@torch.inference_mode()
def test_masks_are_not_computed():
    model = small("mask_rcnn")
    model.net.roi_heads.mask_head.forward = None  # calling it would fail
    assert len(model(batch((64, 64)))[0]) > 0


# The harness


class Truth(nn.Module):
    """Stands in for torchvision's network: knows the objects of each image, in torchvision's labels and pixels."""

    def __init__(self, dataset):
        super().__init__()
        self.targets = iter([target for _, target in dataset])

    def forward(self, images):
        found = []
        for image in images:
            target, (height, width) = next(self.targets), image.shape[1:]
            x, y, w, h = (target.boxes * torch.tensor([width, height, width, height])).unbind(1)
            boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
            found.append({"boxes": boxes, "labels": target.labels + 1, "scores": torch.linspace(1, 0.5, len(target))})
        return found


@pytest.mark.parametrize("ids", ["the data's", "torchvision's"])
@pytest.mark.parametrize("backend", ["pycocotools", "faster-coco-eval"])
def test_the_truth_gets_full_marks(ids, backend):
    transform = make_transform("laptop", 64, train=False)
    data = open_data(COCO_TINY, "val", transform, limit=6)
    assert any(target.labels.numel() for _, target in data)
    with torch.device("meta"):
        model = Baseline(BaselineConfig("fcos", "resnet18", None), 1)
    model.net, model.weight = Truth(data), nn.Parameter(torch.zeros(1))
    if ids == "torchvision's":  # 90 classes, whose labels are the ids less one, and a false detection of class "N/A"
        model.model_config = configure("fcos_r50", classes=COCO_CLASSES, category_ids=COCO_IDS)
        for target in (targets := list(model.net.targets)):
            wrong = torch.tensor([COCO_CLASSES.index("N/A")])
            target.labels = torch.cat([wrong, torch.tensor(data.category_ids)[target.labels] - 1])
            target.boxes = torch.cat([torch.tensor([[0.5, 0.5, 1.0, 1.0]]), target.boxes])
        model.net.targets = iter(targets)
    figures = evaluate(model, data, batch_size=4, backend=backend, progress=False)
    assert figures["AP"] == figures["AR100"] == 100.0
    assert len(figures["stages"]) == 1 and figures["images"] == 6


@pytest.mark.parametrize("kind", ["fcos", "mask_rcnn"])
def test_evaluate_and_detect(kind):
    preset = {"fcos": "fcos_r50", "mask_rcnn": "mask_rcnn_x101"}[kind]
    model = talkative(build(preset, weights=None, backbone="resnet18", image_size=96)).train()
    data = open_data(COCO_TINY, "val", limit=3)  # without a transform: as the model's configuration says
    figures = evaluate(model, data, batch_size=2, progress=False)
    assert figures["images"] == 3 and 0 <= figures["AP"] < 5
    assert model.training and data.transform is None
    image = data.image(0)
    [found] = regolite.detect(model, image, threshold=0.0)
    assert len(found) > 10 and found.labels.max() < 90
    width, height = image.size
    assert found.boxes_xyxy[:, 2].max() <= width + 0.01 and found.boxes_xyxy[:, 3].max() <= height + 0.01
    assert found.boxes_xyxy[:, 2].max() > width / 2  # not in the 96 pixels of the network
    [alone] = detect_by_stage(model, image, threshold=0.0)
    assert torch.equal(alone.scores, found.scores)


def test_checkpoint(tmp_path, capsys):
    model = talkative(build("fcos_r50", weights=None, backbone="resnet18", norm_eps=0.5, image_size=64)).eval()
    save_model(model, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    again = load(tmp_path / "model.safetensors")
    assert again.model_config == model.model_config and again.config.norm_eps == 0.5
    again.net.score_thresh = 0.0
    images = batch((64, 96))
    with torch.inference_mode():
        [one], [other] = model(images), again(images)
    assert len(one) > 10 and torch.equal(one.scores, other.scores) and torch.equal(one.boxes_xyxy, other.boxes_xyxy)

    words = ["--checkpoint", str(tmp_path / "model.safetensors"), "--device", "cpu"]
    file = tmp_path / "figures.json"
    evaluation = ["--data", COCO_TINY, "--limit-images", "2", "--json", str(file)]
    assert main(["evaluate", *words, *evaluation]) == 0
    assert json.loads(file.read_text("utf-8"))["images"] == 2
    out = capsys.readouterr()
    assert "base" in out.out and "other names" not in out.err
    Image.new("RGB", (80, 60)).save(tmp_path / "image.png")
    assert main(["detect", *words, str(tmp_path / "image.png"), "--output", str(tmp_path / "o")]) == 0


# Sizes and costs


@pytest.mark.parametrize("name", TABLE_1)
def test_presets(name):
    """The parameters of Table 1, and those that torchvision states for its published models to the last one."""
    with torch.device("meta"):
        model = build(name, weights=None)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(TABLE_1[name], rel=0.02)
    published = COCO_WEIGHTS.get((model.config.kind, model.config.backbone))
    assert (configure(name).detector.weights == "coco") == (published is not None)
    if published is not None:
        assert count == torchvision.models.get_weight(published).meta["num_params"]
    config = model.model_config
    assert name in presets() and config.preset == name and config.image_size == 800
    assert dict(zip(config.category_ids, config.classes))[90] == "toothbrush" and config.classes[0] == "person"
    with torch.device("meta"):
        assert build(name, 3, weights=None).model_config.classes == ("0", "1", "2")


@pytest.mark.parametrize("kind", KINDS)
def test_dense(kind):
    """It runs on the meta device, and its parts are those of the ordinary way."""
    parts = {
        "fcos": ["backbone", "head"],
        "faster_rcnn": ["backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor"],
    }
    parts["mask_rcnn"] = [*parts["faster_rcnn"], "roi_heads.mask_head", "roi_heads.mask_predictor"]
    called = []
    images = batch((64, 96), (80, 96)).to("meta")
    with torch.device("meta"):
        model = Baseline(BaselineConfig(kind, "resnet18", None), 90)
        for part in parts[kind]:
            model.net.get_submodule(part).register_forward_hook(lambda *_, part=part: called.append(part))
        outputs = model.dense(images)
    assert called == parts[kind]
    reached = {name for part in called for name, _ in model.net.get_submodule(part).named_parameters(part)}
    assert reached == {name for name, _ in model.net.named_parameters()}  # nothing that has weights is left out
    if kind == "fcos":
        cells = sum(math.ceil(96 / stride) ** 2 for stride in (8, 16, 32, 64, 128))
        assert outputs["head"]["cls_logits"].shape == (2, cells, 91)
    else:
        assert outputs["box"][0].shape == (2000, 91) and len(outputs["rpn"][0]) == 5
    if kind == "mask_rcnn":
        assert outputs["mask"].shape == (200, 91, 28, 28)


# Weights


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_of_a_file(tmp_path, suffix):
    state = small("fcos").net.state_dict()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    model = Baseline(BaselineConfig("fcos", "resnet18", str(path)), 4)
    assert all(torch.equal(value, state[key]) for key, value in model.net.state_dict().items())
    with pytest.raises(UserError, match=r"does not fit fcos on resnet18 with 3 classes: .*cls_logits.*\[5") as caught:
        Baseline(BaselineConfig("fcos", "resnet18", str(path)), 3)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(UserError, match="does not fit faster_rcnn on resnet18"):
        Baseline(BaselineConfig("faster_rcnn", "resnet18", str(path)), 4)


def test_published_weights(monkeypatch):
    """The whole detector for "coco", with torchvision's older names; the backbone alone for "imagenet"."""
    theirs = Baseline(BaselineConfig("faster_rcnn", "resnet18", None), 90).net.state_dict()
    old = {key.replace("conv.0.0.", "conv.").replace("s.0.0.", "s.0."): value for key, value in theirs.items()}
    assert old.keys() != theirs.keys()
    imagenet = torchvision.models.resnet18().state_dict()
    asked = []

    def download(name):
        asked.append(name)
        return dict(old if "COCO" in name else imagenet)

    monkeypatch.setattr("regolite.models.baselines.download", download)
    monkeypatch.setitem(COCO_WEIGHTS, ("faster_rcnn", "resnet18"), "FasterRCNN_ResNet18.COCO")
    own = build("faster_rcnn_r50", backbone="resnet18").net.state_dict()
    assert all(torch.equal(own[key], value) for key, value in theirs.items())
    model = Baseline(BaselineConfig("fcos", "resnet18", "imagenet"), 4)
    assert all(torch.equal(value, imagenet[key]) for key, value in model.net.backbone.body.state_dict().items())
    assert asked == ["FasterRCNN_ResNet18.COCO", "ResNet18_Weights.IMAGENET1K_V1"]


def test_batch_normalization_of_the_published_weights():
    """torchvision takes its published R-CNNs without the usual epsilon."""
    with torch.device("meta"):
        norms = {name: build(name, weights=None).net.backbone.body.bn1 for name in ("fcos_r50", "faster_rcnn_r50")}
    assert {name: norm.eps for name, norm in norms.items()} == {"fcos_r50": 1e-5, "faster_rcnn_r50": 0.0}


# Mistakes


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"backbone": "vgg16"}, "no backbone 'vgg16'; .*resnet50"),
        ({"backbone": "resnet18", "weights": "coco"}, "no COCO weights of faster_rcnn on resnet18; give weights='im"),
        ({"weights": "nowhere.pth"}, r"no weights of a baseline at nowhere\.pth"),
        ({"weights": "coco"}, r"know 90 classes \(COCO's ids 1 to 90\), not 4: leave num_classes out, or train others"),
        ({"dim": 128}, "dim=128: torchvision's pyramid on a resnet50 has 256 channels"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
    ],
)
def test_mistakes(fields, said):
    with pytest.raises(UserError, match=said), torch.device("meta"):
        build("faster_rcnn_r50", **{"num_classes": 4, "weights": None, **fields})


def test_offline(monkeypatch, tmp_path):
    def fail(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.urlopen", fail)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))  # an empty cache
    said = "can't download FCOS_ResNet50_FPN_Weights.COCO_V1 .*fetch https://.*pth.*weights=PATH"
    with pytest.raises(UserError, match=said), torch.device("meta"):
        build("fcos_r50")


# Training

TINY = ("backbone=tiny", "weights=none", "frozen_stages=0", "dim=64")
RUN = RunConfig(
    data="scenes:8:val=1:size=96", image_size=96, augment="none", batch_size=8, lr=2e-3, clip=1.0, device="cpu",
    schedule="one_cycle", backbone_lr_mult=1.0, evaluate_every=0, log_every=1,
)  # fmt: skip
TERMS = {
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
    "faster_rcnn": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"},
}
TERMS["mask_rcnn"] = TERMS["faster_rcnn"]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def without_images(monkeypatch):
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *_: [])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_torchvisions(kind, monkeypatch):
    """Of raw pixels, boxes in pixels and labels from 1; the samplers of the R-CNNs draw nothing at random."""
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n, device=device))
    model = small(kind).train()
    theirs = torchvisions_own(model).train()
    if kind == "mask_rcnn":
        theirs.roi_heads.mask_roi_pool = None
    raw, counts = [torch.rand(3, 64, 160), torch.rand(3, 96, 64)], (3, 0)
    boxes = [torch.tensor([[0.5, 0.5, 0.25, 0.5], [0.2, 0.3, 0.1, 0.2], [0.7, 0.6, 0.5, 0.75]])[:n] for n in counts]
    targets = [Target(torch.arange(n), box, i, (1, 1)) for i, (n, box) in enumerate(zip(counts, boxes))]
    wanted = []
    for image, box in zip(raw, boxes):
        height, width = image.shape[1:]
        cx, cy, w, h = box.T
        corners = torch.stack(
            [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
        )
        wanted.append({"boxes": corners.T, "labels": torch.arange(len(box)) + 1})
    expected = theirs(raw, wanted)
    terms = model(batch_images([normalized(image) for image in raw], multiple=32), targets=targets)
    assert set(terms) == set(expected) == TERMS[kind]
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], rtol=1e-3, atol=1e-5)
    loss, named = OwnLoss()(terms, targets)
    torch.testing.assert_close(loss, sum(expected.values()), rtol=1e-3, atol=1e-5)
    assert set(named) == {f"base/{name}" for name in terms}
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    masks = [name for name, p in model.named_parameters() if "mask" in name]
    assert bool(masks) == (kind == "mask_rcnn")
    assert not any(model.get_parameter(name).requires_grad for name in masks)
    with pytest.raises(UserError, match="call model.train()"):
        model.eval().loss(batch((64, 64)), targets[:1])


def test_parts_of_a_batch_weigh_as_many_images():
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(4.0)}
    nothing = Target(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), 0, (1, 1))
    loss, named = OwnLoss()(terms, [nothing] * 3, num_boxes=7.0, num_images=4.0)
    assert loss == 4.5 and named["base/a"] == 1.5


def test_the_pyramid_learns_at_the_full_rate_and_the_stem_does_not():
    with torch.device("meta"):
        model = build("faster_rcnn_r50", 3, weights=None)
        free = build("faster_rcnn_r50", 3, weights=None, frozen_stages=0)
    groups = {group["name"]: group for group in parameter_groups(model, RunConfig(lr=1e-3, backbone_lr_mult=0.1))}
    assert groups["backbone"]["lr"] == pytest.approx(1e-4) and set(groups) == {"backbone", "rest"}
    named = dict(model.named_parameters())
    held = {id(p) for p in groups["rest"]["params"]}
    assert id(named["net.backbone.fpn.inner_blocks.0.0.weight"]) in held
    assert id(named["net.backbone.body.layer2.0.conv1.weight"]) not in held
    still = {name.split(".")[3] for name, p in named.items() if not p.requires_grad}
    assert still == {"conv1", "layer1"} and all(p.requires_grad for p in free.parameters())


@pytest.mark.parametrize("kind", ["fcos", "faster_rcnn"])
def test_laptop_presets_start_from_the_bundled_features(kind):
    model = build(f"{kind}_tiny", 3)
    again = build(model.model_config.without_pretrained(), 3)
    weights = [m.net.backbone.body.state_dict() for m in (model, again)]
    bundled = build("detr_tiny", 3).backbone.body.state_dict()
    shared = [key for key in weights[0] if key in bundled]
    assert len(shared) > 200 and all(torch.equal(weights[0][key], bundled[key]) for key in shared)
    assert not all(torch.equal(weights[1][key], bundled[key]) for key in shared)
    assert model.net.backbone.out_channels == 128
    with torch.no_grad():
        model.eval()(batch((64, 96)))


@pytest.mark.parametrize("kind", ["fcos", "faster_rcnn"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(kind, tmp_path, without_images):
    config = replace(
        RUN, data="scenes:4:val=1:size=64", model=f"{kind}_tiny", overrides=TINY, image_size=64, batch_size=2, epochs=2,
        optimizer="sgd" if kind == "fcos" else "adamw",
    )  # fmt: skip
    whole = regolite.train(replace(config, output=str(tmp_path / "whole")))
    parts = replace(config, output=str(tmp_path / "parts"), checkpoint_minutes=0.0)

    class Interrupted(Exception):
        pass

    def watch(line):
        if line["step"] == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        regolite.train(parts, watch)
    folder = regolite.train(replace(parts, resume=True))
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert set(lines(folder)[0]["terms"]) == {f"base/{name}" for name in TERMS[kind]}
    assert load(folder / "model.safetensors").model_config.preset == f"{kind}_tiny"


def test_the_command_trains_and_draws(tmp_path):
    """Two parts of a batch, a moving average, bf16 (for which the loss stays in float32) and the figures of a run."""
    words = "--data scenes:4:val=1:size=64 --model fcos_tiny --image-size 64 --batch-size 4 --accumulate 2 --epochs 1"
    more = "--ema 0.5 --precision bf16 --device cpu --log-every 1 --set"
    folder = tmp_path / "run"
    assert main(["train", *words.split(), "--output", str(folder), *more.split(), *TINY]) == 0
    assert (folder / "figures" / "curves.png").is_file()
    [step, *_] = lines(folder)
    assert step["loss"] == pytest.approx(sum(step["terms"].values()), rel=1e-4) and step["loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "images", "epochs"), [("fcos", 8, 100), ("faster_rcnn", 2, 120), ("mask_rcnn", 2, 120)]
)
def test_it_learns_its_images(kind, images, epochs, tmp_path, without_images):
    preset = {"mask_rcnn": "mask_rcnn_x101"}.get(kind, f"{kind}_tiny")
    data = f"scenes:{images}:val=1:size=96"
    sizes = {"backbone": "tiny", "weights": None, "frozen_stages": 0, "dim": 64}
    model = build(preset, len(open_data(data, "train").classes), **sizes)
    if kind != "fcos":  # fewer regions than torchvision's 2000 and 512: these images are small
        model.net.rpn._pre_nms_top_n = model.net.rpn._post_nms_top_n = {"training": 100, "testing": 100}
        model.net.roi_heads.fg_bg_sampler.batch_size_per_image = 64
    config = replace(RUN, data=data, batch_size=images, epochs=epochs, evaluate_train=True, log_every=20)
    folder = regolite.train(replace(config, output=str(tmp_path / "run")), model=model)
    last = lines(folder)[-1]
    assert last["split"] == "train" and last["AP"] >= 90
    batched, targets = collate([open_data(data, "train", make_transform("none", 96))[0]], multiple=32)
    [found] = load(folder / "model.safetensors").detections(batched, batched.sizes)
    assert len(found.above(0.5)) >= len(targets[0]) > 0
