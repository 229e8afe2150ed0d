"""torch.compile and strict torch.export: every family of detectors is one graph, with and without REGO."""

import shutil

import pytest
import torch
from small_models import DETECTORS, batch, unchecked

from regolite import Rego, build
from regolite.exporting import Exportable


@pytest.fixture(autouse=True)
def fresh():
    """No code compiled by other tests; and no shape checker, which asks for numbers where PyTorch traces symbols."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with unchecked():
        yield


def with_rego(family):
    changes = {"smca": {"multi_scale_layers": (1,)}}.get(family, {})
    detector = DETECTORS[family](decoder_layers=1, queries=5, **changes)
    return Rego(detector, stages=1, alphas=(2.0,), ffn_dim=32, decoder_layers=1, dropout=0.0).eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", DETECTORS)
def test_strict_export_gives_the_same_outputs(family):
    """Of the base detector and of REGO, for another batch size and other sizes of images than were traced."""
    module = Exportable(with_rego(family))
    images = torch.export.Dim("batch", min=1, max=8)
    example = torch.rand(2, 3, 64, 64), torch.tensor([[64, 64], [48, 32]])
    inputs = torch.rand(3, 3, 64, 64), torch.tensor([[64, 64], [40, 64], [64, 33]])
    shapes = {"pixels": {0: images}, "sizes": {0: images}}
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=shapes, strict=True).module()
        for expected, found in zip(module(*inputs), program(*inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def compare(model, compiled, images):
    with torch.no_grad():
        for expected, found in zip(model(images).by_stage, compiled(images).by_stage, strict=True):
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["smca", "sparse_rcnn", "two_stage"])
def test_compiled_models_give_the_same_outputs(family):
    model = with_rego(family)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    compare(model, compiled, batch((64, 64), (48, 40)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++")
def test_inductor_gives_the_same_outputs():
    model = with_rego("detr")
    compare(model, torch.compile(model, fullgraph=True), batch((64, 64), (48, 40)))


def test_one_graph_serves_images_of_every_size():
    model = DETECTORS["detr"](encoder_layers=1, decoder_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for size in ((64, 64), (96, 64), (64, 128)):
        compare(model, compiled, batch(size, (48, 40)))


@pytest.mark.slow
def test_gradients_of_a_compiled_model_are_the_same():
    model = with_rego("two_stage").train()
    images = batch((64, 64), (48, 40))
    parameters = dict(model.named_parameters())

    def gradients(function):
        output = function(images)
        predictions = [*output.layers, output.proposals, *(p for stage in output.stages for p in stage)]
        loss = sum(p.logits.square().mean() + p.boxes.square().mean() for p in predictions)
        found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True, allow_unused=True)
        return dict(zip(parameters, found))

    expected = gradients(model)
    compiled = gradients(torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False))
    assert sum(gradient.any().item() for gradient in expected.values()) > 100
    for name, gradient in expected.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_baseline_is_compiled_in_parts():
    """The number of its detections depends on the image, so that it cannot be one graph."""
    model = build("fcos_tiny", 3, backbone="tiny", weights=None, dim=32, frozen_stages=0).eval()
    with torch.no_grad():
        model.net.head.classification_head.cls_logits.bias.fill_(0.0)  # scores over its threshold of 0.2
        images = batch((64, 64), (48, 40))
        compiled = torch.compile(model, backend="eager", dynamic=False)
        for expected, found in zip(model(images), compiled(images), strict=True):
            assert len(found) > 0
            torch.testing.assert_close(found.boxes_xyxy, expected.boxes_xyxy)
            torch.testing.assert_close(found.scores, expected.scores)
