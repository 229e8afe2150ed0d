"""The contract of a detector: every detector satisfies it, and REGO, training and records rely on nothing else."""

from __future__ import annotations

import pytest
import torch
from small_models import CLASSES, DETECTORS, TRANSFORMERS, batch, check_contract, deformable, detr
from torch import nn

import regolite
from regolite import Rego, UserError
from regolite.losses import LossConfig, OwnLoss, SetLoss
from regolite.models.config import DETECTORS as REGISTERED
from regolite.models.config import config_of, registered
from regolite.models.deformable_attention import DeformableAttention
from regolite.models.detector import ATTRIBUTES, Detector, as_detector
from regolite.training.activation_checkpointing import checkpoint_activations, keep_all_activations
from regolite.training.config import RunConfig
from regolite.training.schedule import parameter_groups


@pytest.fixture
def images():
    return batch((64, 96), (80, 60))


class Plain(nn.Module):
    """A module of one query that has the attributes of a detector, but is none."""

    dim, heads, scoring, projected, num_logits, feature_channels = 32, 4, "sigmoid", True, CLASSES, [32]

    def __init__(self):
        super().__init__()
        self.part = deformable(levels=3)

    def forward(self, images):
        output = self.part(images)
        output.features = output.features[:1]
        return output


@pytest.mark.parametrize("name", DETECTORS)
def test_the_attributes_are_true(name, images):
    detector = DETECTORS[name]()
    output = check_contract(detector, CLASSES, images)
    assert (detector.num_stages, detector.base_detector, detector.model_config) == (0, detector, None)
    assert (output.references is None) == (name in ("detr", "up_detr"))
    names = ["encoder.0", "encoder.1", "decoder.0.self", "decoder.0.cross", "decoder.1.self", "decoder.1.cross"]
    if name not in TRANSFORMERS:
        names = ["decoder.0.self", "decoder.1.self"]
    assert list(dict(detector.named_attentions())) == names
    assert len(detector.transformer_layers()) == (4 if name in TRANSFORMERS else 2)


@pytest.mark.parametrize("name", DETECTORS)
def test_those_of_rego_are_true(name, images):
    detector = DETECTORS[name]()
    rego = Rego(detector, stages=2, decoder_layers=1, encoder_layers=1, ffn_dim=48).eval()
    check_contract(rego, CLASSES, images)
    assert all(getattr(rego, attribute) == getattr(detector, attribute) for attribute in ATTRIBUTES)
    assert rego.num_stages == 2 and rego.base_detector is detector
    assert rego.transformer_layers()[:-4] == detector.transformer_layers()
    attentions = list(dict(rego.named_attentions()))
    assert attentions[:-6] == list(dict(detector.named_attentions()))
    assert attentions[-6:] == [
        f"stage.{n}.{part}" for n in (1, 2) for part in ("encoder.0", "decoder.0.self", "relations.0")
    ]
    for name, _ in rego.named_parameters():
        base = name.removeprefix("detector.")
        assert rego.parameter_group(name) == ("rest" if base == name else detector.parameter_group(base))


def test_every_registered_detector_is_one():
    built = {}
    with torch.device("meta"):
        for preset in regolite.presets():
            config = regolite.configure(preset).without_pretrained()
            if (name := registered(config.detector)[0]) not in built:
                built[name] = regolite.build(config, 3)
                assert built[name].model_config is not None
    assert set(built) | {"transformers"} == set(REGISTERED)  # tests/interop/test_adapter.py builds those
    assert all(isinstance(model, Detector) for model in built.values())
    with pytest.raises(UserError, match="can't stand on a Baseline, which has no dim, heads, "):
        Rego(built["baseline"], stages=1)


def test_the_criterion_is_the_set_loss_or_its_own():
    config = LossConfig(l1=3.0)
    plain = as_detector(Plain())
    for detector in (detr(), plain, Rego(deformable(), stages=1, ffn_dim=32)):
        criterion = detector.criterion(config)
        assert isinstance(criterion, SetLoss) and (criterion.config, criterion.scoring) == (config, detector.scoring)
        assert not detector.takes_targets
    plain.has_own_loss = True
    assert plain.takes_targets and isinstance(plain.criterion(config), OwnLoss)


def test_denoising_is_what_the_configuration_says():
    learns = regolite.build("deformable_detr_everyday", 3, weights=None)
    assert learns.denoises and Rego(learns, stages=1, ffn_dim=32).denoises
    assert not Rego(learns, stages=1, ffn_dim=32, frozen=True).denoises and not deformable().denoises


def test_a_detector_chooses_its_layers_attentions_and_groups(images):
    """A subclass with names of its own: training and REGO ask the methods."""

    class Renamed(Detector):
        def __init__(self):
            super().__init__()
            self.inner = detr()
            for attribute in ATTRIBUTES:
                setattr(self, attribute, getattr(self.inner, attribute))

        def forward(self, images):
            return self.inner(images)

        def parameter_group(self, name):
            return "sampling" if name.startswith("inner.query_positions") else "rest"

        def transformer_layers(self):
            return list(self.inner.decoder.layers)

        def named_attentions(self):
            yield "decoder.0.self", (self.inner.decoder.layers[0], self.inner.decoder.layers[0].self_attention)

    rego = Rego(Renamed(), stages=1, ffn_dim=48)
    groups = {group["name"]: group["params"] for group in parameter_groups(rego, RunConfig())}
    assert set(groups) == {"sampling", "rest"} and groups["sampling"] == [rego.detector.inner.query_positions.weight]
    checkpoint_activations(rego)
    changed = {name for name, module in rego.named_modules() if "forward" in vars(module)}
    assert changed == {
        *(f"detector.inner.decoder.layers.{n}" for n in (0, 1)),
        *(f"stages.0.decoder.layers.{n}" for n in (0, 1)),
    }
    keep_all_activations(rego)
    assert not any("forward" in vars(module) for module in rego.modules())
    with regolite.record(rego) as trace, torch.no_grad():
        rego.eval()(images)
    assert "decoder.0.self" in trace and "decoder.0.cross" not in trace and "stage.1.relations.0" in trace


def test_a_plain_module_with_the_attributes_carries_rego(images):
    plain = Plain()
    view = as_detector(plain)
    assert [getattr(view, name) for name in ATTRIBUTES] == [getattr(plain, name) for name in ATTRIBUTES]
    assert (view.denoises, view.model_config, view.num_stages) == (False, None, 0)
    rego = Rego(plain, stages=2, ffn_dim=48).eval()
    assert rego.detector is plain and len(rego(images).stages) == 2
    assert any(isinstance(attention, DeformableAttention) for _, (_, attention) in rego.named_attentions())
    assert len(rego.transformer_layers()) == 4 + 4
    with pytest.raises(UserError, match="make the model with regolite.build"):
        config_of(rego)


def test_a_compiled_detector_has_the_attributes_of_the_original():
    model = Rego(deformable(), stages=2, ffn_dim=48)
    assert as_detector(torch.compile(model)) is model
