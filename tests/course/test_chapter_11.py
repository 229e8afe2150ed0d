"""The checkers of notebook 11 accept right answers and name what is wrong with the others."""

import pytest
import torch
from torch import nn

from regolite.boxes import enlarge, inverse_sigmoid, to_pixels
from regolite.course import Mistake, find
from regolite.models import rego
from regolite.models.attention import MultiHeadAttention
from regolite.models.glimpse import GlimpseHead, cut_glimpses
from regolite.models.transformer import Decoder, DecoderLayer, box_head, class_head
from regolite.types import FeatureMap, Memory, Prediction


def correct(boxes, change):
    return (inverse_sigmoid(boxes) + change).sigmoid()


def infinite(boxes, change):
    return (torch.log(boxes / (1 - boxes)) + change + 0 * torch.log(boxes)).sigmoid()


def run_stages(stages, features, sizes, hidden, boxes, detach=True, layer=-1, cut=False, stuck=False, returned=None):
    found = []
    for stage in stages:
        given = boxes.detach() if detach else boxes
        predictions, hidden = stage(features, sizes, hidden.detach() if cut else hidden, given)
        found.append(predictions)
        boxes = boxes if stuck else predictions[layer].boxes
    return (found, hidden) if returned is None else returned


def loop(**changes):
    return lambda *inputs: run_stages(*inputs, **changes)


class Stage(nn.Module):
    """A right answer, each line of which a subclass can get wrong by a flaw's name."""

    flaw = ""

    def __init__(self, config, number, dim, heads, num_logits, scoring):
        super().__init__()
        flaw, depth = self.flaw, 2 if self.flaw == "depth" else config.decoder_layers
        self.config, self.number = config, number
        self.alpha = config.ratios[min(number, config.stages - 1) if flaw == "next alpha" else number - 1]
        self.alpha = config.ratios[-number] if flaw == "from the end" else self.alpha
        self.glimpse = GlimpseHead(dim, dim)
        self.condense, self.condense_norm = nn.Linear(number * dim, dim, bias=flaw == "bias"), nn.LayerNorm(dim)
        dropout = 0.0 if flaw == "dropout" else config.dropout
        layers = [
            DecoderLayer(dim, heads, MultiHeadAttention(dim, heads, dropout), config.ffn_dim, dropout)
            for _ in range(depth)
        ]
        self.decoder = Decoder(layers, None if flaw == "norm" else nn.LayerNorm(dim))
        fuse = [nn.Linear((number + 1) * dim, dim, bias=flaw == "fuse bias") for _ in layers]
        self.fuse = fuse[0] if flaw == "one fuse" else fuse if flaw == "list" else nn.ModuleList(fuse)
        self.fuse_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in layers)
        prior = None if flaw == "prior" else 0.01
        self.class_head = class_head(dim, num_logits, prior if scoring == "sigmoid" or flaw == "always" else None)
        self.box_head = box_head(dim, None if flaw == "head" else 0.0)

    def forward(self, features, sizes, hidden, boxes, query_mask=None):
        flaw = self.flaw
        alpha = {"alpha": 1.0, "number": float(self.number)}.get(flaw, self.alpha)
        regions = enlarge(boxes, alpha) if flaw == "pixels" else to_pixels(enlarge(boxes, alpha), sizes)
        if flaw == "padded":
            regions = to_pixels(enlarge(boxes, alpha), sizes.amax(0).expand_as(sizes))
        vectors = self.glimpse(cut_glimpses(features, regions)).unflatten(0, boxes.shape[:2])
        cut = flaw == "all detached" or (self.config.detach_hidden and flaw != "ignored")
        known = self.condense(hidden.detach() if cut else hidden)
        known = known if flaw == "condense_norm" else self.condense_norm(known)
        asks, answers = (known, vectors) if flaw == "swapped" else (vectors, known)
        positions = answers if flaw == "positions" else torch.zeros_like(answers)
        memory = Memory(answers, positions, None if flaw in ("memory mask", "no mask") else query_mask, [])
        translated = self.decoder(asks, 0.0, memory, None if flaw in ("decoder mask", "no mask") else query_mask)
        predictions, logit = [], inverse_sigmoid(boxes)
        for h, fuse, norm in zip(translated, self.fuse, self.fuse_norms):
            before = hidden if flaw == "attached" else hidden.detach()
            fused = fuse(torch.cat([h, before] if flaw == "fuse order" else [before, h], -1))
            fused = fused if flaw == "fuse_norm" else norm(fused)
            start = inverse_sigmoid(boxes) if flaw == "not summed" else 0 if flaw == "no correction" else logit
            logit = (start.detach() if flaw == "cut logit" else start) + self.box_head(fused)
            box = boxes + self.box_head(fused) if flaw == "direct" else logit.sigmoid()
            predictions.append(Prediction(self.class_head(fused), box))
        predictions = predictions[-1:] if flaw == "last" else predictions
        states = torch.cat([hidden, translated[-1]], -1)
        states = {
            "alone": translated[-1],
            "state order": torch.cat([translated[-1], hidden], -1),
            "first states": torch.cat([hidden, translated[0]], -1),
            "cut states": states.detach(),
            "cut half": torch.cat([hidden.detach(), translated[-1]], -1),
        }.get(flaw, states)
        return predictions if flaw == "no pair" else (predictions, states)


class Rego(nn.Module):
    flaw = ""

    def __init__(self, detector, config):
        super().__init__()
        self.detector, self.config = detector, config
        self.dim, self.scoring, self.num_logits = detector.dim, detector.scoring, detector.num_logits
        if self.flaw == "scoring":
            del self.scoring
        projected = {"always": False, "never": True}.get(self.flaw, detector.projected)
        self.projections = nn.ModuleList(
            nn.Identity() if projected else nn.Conv2d(c, self.dim, 1) for c in detector.feature_channels
        )
        number = 0 if self.flaw == "numbers" else 1
        stages = [
            rego.Stage(config, i + number, self.dim, detector.heads, self.num_logits, detector.scoring)
            for i in range(config.stages)
        ]
        self.stages = stages if self.flaw == "list" else nn.ModuleList(stages)

    def forward(self, images, stages=None):
        flaw, output = self.flaw, self.detector(images)
        features = [FeatureMap(p(f.tensor), f.mask, f.stride) for p, f in zip(self.projections, output.features)]
        hidden, boxes = output.queries, output.layers[0 if flaw == "base layer" else -1].boxes
        hidden = hidden.detach() if flaw == "cut base" else hidden
        sizes = images.sizes
        if flaw == "padded":
            sizes = sizes.new_tensor(images.pixels.shape[-2:]).expand_as(sizes)
        some = self.stages if flaw == "all" or (flaw == "zero" and not stages) else self.stages[:stages]
        for stage in some:
            given = boxes if flaw == "attached" else boxes.detach()
            predictions, new = stage(features, sizes, hidden.detach() if flaw == "cut" else hidden, given)
            hidden = hidden if flaw == "hidden" else new
            output.stages += predictions if flaw == "flat" else [] if flaw == "nothing" else [predictions]
            boxes = boxes if flaw == "stuck" else predictions[0 if flaw == "first" else -1].boxes
        return output.final if flaw == "final" else output


def flawed(base, name):
    return type(base.__name__, (base,), {"flaw": name})


def with_alphas(model, images, alphas, restore=True, backward=False, grad=False):
    trained = [stage.alpha for stage in model.stages]
    for stage, alpha in zip(model.stages, alphas[::-1] if backward else alphas):
        stage.alpha = alpha
    with torch.set_grad_enabled(grad):
        output = model(images)
    if restore:
        for stage, alpha in zip(model.stages, trained):
            stage.alpha = alpha
    return output


RIGHT = [
    ("11.1", correct),
    ("11.2", run_stages),
    ("11.3", Stage),
    ("11.3", rego.Stage),
    ("11.4", Rego),
    ("11.4", rego.Rego),
    ("11.5", with_alphas),
]


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_right(number, answer):
    assert len(find(number).checker(answer)) > 20


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("11.1", lambda b, c: b, "change is not used"),
        ("11.1", lambda b, c: b + c, "leave the image"),
        ("11.1", lambda b, c: (b + c).clamp(0, 1), "has no gradient at both ends"),
        ("11.1", lambda b, c: (b + c).sigmoid(), "0.5 would become 0.62"),
        ("11.1", lambda b, c: b + c.sigmoid(), "has no meaning"),
        ("11.1", lambda b, c: inverse_sigmoid(b) + c, "still logits"),
        ("11.1", lambda b, c: correct(b, c.detach()), "no gradient"),
        ("11.1", infinite, "infinity"),
        ("11.2", loop(layer=0), "should get O_box\\(1\\), but gets other boxes"),
        ("11.2", loop(detach=False), "not detached"),
        ("11.2", loop(stuck=True), "those of the base detector"),
        ("11.2", loop(cut=True), "hidden states were detached"),
        ("11.2", loop(returned=([], None)), "list of each stage's predictions"),
        ("11.2", loop(returned=1), "a pair"),
        ("11.2", lambda stages, *inputs: run_stages(stages[:2], *inputs), "not every stage"),
        ("11.3", flawed(Stage, "alpha"), "not enlarged"),
        ("11.3", flawed(Stage, "number"), "not the number of the stage"),
        ("11.3", flawed(Stage, "next alpha"), "of the next stage"),
        ("11.3", flawed(Stage, "pixels"), "reads pixels"),
        ("11.3", flawed(Stage, "padded"), "padded size of the batch"),
        ("11.3", flawed(Stage, "condense_norm"), "condense_norm is not applied"),
        ("11.3", flawed(Stage, "swapped"), "queries and memory are swapped"),
        ("11.3", flawed(Stage, "positions"), "no position encoding"),
        ("11.3", flawed(Stage, "fuse order"), "halves of the concatenation"),
        ("11.3", flawed(Stage, "fuse_norm"), "after fuse is not applied"),
        ("11.3", flawed(Stage, "not summed"), "second layer starts from the boxes"),
        ("11.3", flawed(Stage, "no correction"), "without O_box"),
        ("11.3", flawed(Stage, "direct"), "to the boxes themselves"),
        ("11.3", flawed(Stage, "bias"), "condense has no bias"),
        ("11.3", flawed(Stage, "fuse bias"), "fuse layers have no bias"),
        ("11.3", flawed(Stage, "norm"), "Decoder needs the LayerNorm"),
        ("11.3", flawed(Stage, "one fuse"), "one linear layer for each"),
        ("11.3", flawed(Stage, "list"), "a plain list"),
        ("11.3", flawed(Stage, "prior"), "start at 0.01"),
        ("11.3", flawed(Stage, "always"), "for sigmoid scoring alone"),
        ("11.3", flawed(Stage, "head"), "should repeat the boxes"),
        ("11.3", flawed(Stage, "depth"), "not always 2"),
        ("11.3", flawed(Stage, "dropout"), "config.dropout is not used"),
        ("11.3", flawed(Stage, "no mask"), "query_mask is not respected"),
        ("11.3", flawed(Stage, "memory mask"), "query_mask is not respected"),
        ("11.3", flawed(Stage, "decoder mask"), "query_mask is not respected"),
        ("11.3", flawed(Stage, "attached"), "concatenate hidden.detach"),
        ("11.3", flawed(Stage, "ignored"), "detach_hidden is ignored"),
        ("11.3", flawed(Stage, "all detached"), "no gradient reaches"),
        ("11.3", flawed(Stage, "cut states"), "H_dec\\(i\\) is detached"),
        ("11.3", flawed(Stage, "cut half"), "with its gradient"),
        ("11.3", flawed(Stage, "cut logit"), "between the layers of the stage"),
        ("11.3", flawed(Stage, "from the end"), "counted from the last stage"),
        ("11.3", flawed(Stage, "alone"), "is H_g\\(i\\) alone"),
        ("11.3", flawed(Stage, "state order"), "halves of H_dec"),
        ("11.3", flawed(Stage, "first states"), "of the last layer"),
        ("11.3", flawed(Stage, "last"), "each of the 2 decoder layers"),
        ("11.3", flawed(Stage, "no pair"), "should return a pair"),
        ("11.3", lambda *given: None, "derived from nn.Module"),
        ("11.4", flawed(Rego, "stuck"), "boxes of the base detector"),
        ("11.4", flawed(Rego, "first"), "gets the boxes of the first layer"),
        ("11.4", flawed(Rego, "base layer"), "starts from the base detector's first layer"),
        ("11.4", flawed(Rego, "padded"), "padded size of the batch"),
        ("11.4", flawed(Rego, "hidden"), "wrong width"),
        ("11.4", flawed(Rego, "attached"), "boxes are not detached"),
        ("11.4", flawed(Rego, "cut"), "detached in the loop"),
        ("11.4", flawed(Rego, "cut base"), "no stage trains the base decoder"),
        ("11.4", flawed(Rego, "flat"), "append, do not extend"),
        ("11.4", flawed(Rego, "nothing"), "has no stages"),
        ("11.4", flawed(Rego, "final"), "a DetectorOutput"),
        ("11.4", flawed(Rego, "all"), "switch REGO off"),
        ("11.4", flawed(Rego, "zero"), "Beware: 0 is false"),
        ("11.4", flawed(Rego, "numbers"), "start at 1"),
        ("11.4", flawed(Rego, "list"), "plain list"),
        ("11.4", flawed(Rego, "always"), "nn.Identity"),
        ("11.4", flawed(Rego, "never"), "needs a 1x1 convolution"),
        ("11.4", flawed(Rego, "scoring"), "detector's scoring"),
        ("11.5", lambda m, i, a: with_alphas(m, i, [s.alpha for s in m.stages]), "ratios of the training"),
        ("11.5", lambda m, i, a: with_alphas(m, i, a, backward=True), "wrong order"),
        ("11.5", lambda m, i, a: with_alphas(m, i, a, restore=False), "still has the ratios"),
        ("11.5", lambda m, i, a: with_alphas(m, i, a, grad=True), "no_grad"),
        ("11.5", lambda m, i, a: with_alphas(m, i, a).final, "DetectorOutput"),
    ],
)
def test_wrong(number, answer, said):
    with torch.random.fork_rng(), pytest.raises(Mistake, match=said):
        torch.manual_seed(0)
        find(number).checker(answer)
