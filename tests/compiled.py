"""Checks of torch.compile and torch.export: ``python tests/compiled.py strict_export``.

A program of its own, since the shape checker of the tests wraps every function in code that PyTorch cannot trace.
"""

import sys

import torch
from small_models import DETECTORS, batch

from regolite import Rego, build
from regolite.exporting import Exportable


def detector(family):
    changes = {"smca": {"multi_scale_layers": (1,)}}.get(family, {})
    layers = {} if family == "sparse_rcnn" else {"encoder_layers": 1}
    return DETECTORS[family](decoder_layers=1, queries=5, **layers, **changes)


def with_rego(family):
    return Rego(detector(family), stages=1, alphas=(2.0,), ffn_dim=32, decoder_layers=1, dropout=0.0).eval()


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def strict_export():
    """Outputs for another batch size and other sizes of images than were traced.

    REGO is exported on a detector with the features of its backbone and on one with projected features.
    """
    images = torch.export.Dim("batch", min=1, max=8)
    example = torch.rand(2, 3, 64, 64), torch.tensor([[64, 64], [48, 32]])
    inputs = torch.rand(3, 3, 64, 64), torch.tensor([[64, 64], [40, 64], [64, 33]])
    for family in DETECTORS:
        module = Exportable(with_rego(family) if family in ("detr", "two_stage") else detector(family))
        shapes = {"pixels": {0: images}, "sizes": {0: images}}
        with torch.no_grad():
            program = torch.export.export(module, example, dynamic_shapes=shapes, strict=True).module()
            assert_equal(program(*inputs), module(*inputs))
        print(family)


def compiled(family):
    """Outputs of one graph of the whole model. Inductor, which compiles C++ for 40 seconds, starts from it."""
    torch.compiler.reset()  # the families share code, which may be compiled eight times
    model, images = with_rego(family), batch((64, 64), (48, 40))
    function = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for found, expected in zip(function(images).by_stage, model(images).by_stage, strict=True):
            assert_equal((found.logits, found.boxes), (expected.logits, expected.boxes))
    print(family)


def ahead_of_time():
    for family in DETECTORS:
        compiled(family)
    gradients("two_stage")


def gradients(family):
    """Gradients of one graph of the whole model, with a loss on every prediction."""
    model, images = with_rego(family).train(), batch((64, 64), (48, 40))
    parameters = dict(model.named_parameters())

    def differentiate(function):
        output = function(images)
        predictions = [*output.layers, output.proposals, *(p for stage in output.stages for p in stage)]
        loss = sum(p.logits.square().mean() + p.boxes.square().mean() for p in predictions)
        return torch.autograd.grad(loss, list(parameters.values()))

    expected = differentiate(model)
    found = differentiate(torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False))
    for name, one, other in zip(parameters, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
    print(family)


def baseline():
    """The number of its detections depends on the image, so that it is several graphs."""
    model = build("fcos_tiny", 3, backbone="tiny", weights=None, dim=32, frozen_stages=0).eval()
    torch.nn.init.zeros_(model.net.head.classification_head.cls_logits.bias)  # for scores above its threshold of 0.2
    images = batch((64, 64), (48, 40))
    with torch.no_grad():
        for found, expected in zip(torch.compile(model, backend="eager", dynamic=False)(images), model(images)):
            assert len(found) > 0
            assert_equal((found.boxes_xyxy, found.scores), (expected.boxes_xyxy, expected.scores))
    print("fcos")


if __name__ == "__main__":
    torch.manual_seed(0)
    globals()[sys.argv[1]]()
