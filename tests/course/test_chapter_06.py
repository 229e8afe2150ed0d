"""The checkers of notebook 06: right answers pass, and each usual mistake is called by its name."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from regolite.boxes import to_xyxy
from regolite.course import Mistake, find
from regolite.losses import SetLoss
from regolite.matching import MatchingCosts, PaddedTargets, match


def judge(number, answer):
    torch.manual_seed(0)
    return find(number).checker(answer)


def read(logits):
    return tuple(logits.softmax(-1)[:, :-1].max(-1))


def settles(queries, objects, weight):
    idle = weight * (queries - objects)
    return idle / (idle + objects)


def focal(logits, truth, alpha=0.25, gamma=2.0):
    return sigmoid_focal_loss(logits, truth, alpha=alpha, gamma=gamma)


def pieces(logits, truth):
    p = logits.sigmoid()
    return torch.where(truth == 1, p, 1 - p), torch.where(truth == 1, 0.25, 0.75)


def focal_by(formula):
    return lambda logits, truth, alpha=0.25, gamma=2.0: formula(*pieces(logits, truth))


def image_loss(nothing=-1, weight=0.1, l1="sum", corners=True, overlap="sum", only_matched=False, free=False):
    def answer(logits, boxes, labels, wanted, query, objects):
        columns = logits.shape[1]
        truth = torch.full((len(logits),), nothing % columns)
        truth[query] = labels
        weights = torch.ones(columns)
        weights[-1] = weight
        label = F.cross_entropy(logits, truth, weights)
        if only_matched:
            label = F.cross_entropy(logits[query], labels)
        boxes = boxes.detach() if free else boxes
        apart = (boxes[query] - wanted).abs()
        change = to_xyxy if corners else lambda b: b
        giou = generalized_box_iou_loss(change(boxes[query]), change(wanted))
        far = {
            "sum": apart.sum() / objects,
            "mean": apart.mean(),
            "image": apart.sum(-1).mean(),
            "undivided": apart.sum(),
        }
        return label, far[l1], giou.sum() / objects if overlap == "sum" else giou.mean()

    return answer


def name_predictions(output):
    named = {}
    for decoder, layers in [("base", output.layers), *((f"stage{i}", s) for i, s in enumerate(output.stages, 1))]:
        named |= {f"{decoder}.{i}": layer for i, layer in enumerate(layers[:-1], 1)} | {decoder: layers[-1]}
    return named


def softmax_term(logits, at, labels, boxes, config, nothing=-1, no_object=None, norm=None, images=False):
    truth = torch.full(logits.shape[:2], nothing % logits.shape[-1])
    truth[at] = labels
    weight = torch.full(logits.shape[:2], config.no_object if no_object is None else no_object)
    weight[at] = 1.0
    entropy = F.cross_entropy(logits.transpose(1, 2), truth, reduction="none") * weight
    if images:
        return (entropy.sum(1) / weight.sum(1)).mean()
    return entropy.sum() / {"queries": truth.numel(), "boxes": boxes}.get(norm, weight.sum())


def focal_term(logits, at, labels, boxes, config, norm=None, entropy=False, alpha=0.25, floor=1.0):
    truth = torch.zeros_like(logits)
    truth[(*at, labels)] = 1.0
    loss = sigmoid_focal_loss(logits, truth, alpha=alpha)
    if entropy:
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return loss.mean() if norm == "mean" else loss.sum() / (max(boxes, floor) if norm is None else 1.0)


def wrong(term, **options):
    return lambda *given: term(*given, **options)


def learner(
    names=name_predictions,
    softmax=softmax_term,
    focal=focal_term,
    l1=lambda found, wanted: (found - wanted).abs().sum(-1),
    giou=lambda found, wanted: generalized_box_iou_loss(to_xyxy(found), to_xyxy(wanted)),
    norm=lambda values, image, boxes, prediction: values.sum() / max(boxes, 1.0),
    weights=None,
    costs=None,
    share=False,
    use_num_boxes=True,
    count="",
    total=lambda terms: torch.stack(list(terms.values())).sum(),
    only=None,
    detach=False,
):
    """A learner's SetLoss, layer by layer."""

    class Loss:
        def __init__(self, config, scoring):
            self.config, self.scoring = config, scoring

        def __call__(self, output, targets, num_boxes=None):
            c, padded, terms = self.config, PaddedTargets.of(targets), {}
            boxes = len(padded) if num_boxes is None or not use_num_boxes else num_boxes
            boxes = {"pairs": len(padded) * len(names(output)), "padding": padded.labels.numel()}.get(count, boxes)
            named = names(output)
            for name, prediction in named.items():
                which = output.layers[-1] if share else prediction
                own = MatchingCosts(c.label_cost, c.l1_cost, c.giou_cost)
                own = MatchingCosts(c.label, c.l1, c.giou) if costs == "loss" else costs or own
                pairs = match([which], padded, self.scoring, own)
                at, labels = (pairs.image, pairs.query), padded.labels[pairs.image, pairs.target]
                term = softmax if self.scoring == "softmax" else focal
                label = term(prediction.logits, at, labels, boxes, c)
                found, wanted = prediction.boxes[at], padded.boxes[pairs.image, pairs.target]
                found = found.detach() if detach else found
                w = weights or (c.label, c.l1, c.giou)
                terms[f"{name}/label"] = w[0] * label
                terms[f"{name}/l1"] = w[1] * norm(l1(found, wanted), pairs.image, boxes, prediction)
                terms[f"{name}/giou"] = w[2] * norm(giou(found, wanted), pairs.image, boxes, prediction)
            return (total(terms), terms) if only is None else total(terms)

    return Loss


def by_image(values, image, boxes, prediction):
    return torch.stack([values[image == b].mean() for b in image.unique()]).mean()


def adapt(by_name=True, nothing=True, body=True, strict=True, bias=True, drop_new=False):
    def answer(state, old_classes, model, new_classes):
        state, own = dict(state), model.state_dict()
        for name in ("class_head.weight", "class_head.bias"):
            head = own[name].clone()
            if name.endswith("bias") and not bias:
                state[name] = head
                continue
            for row, known in enumerate(new_classes):
                if not by_name and row < len(old_classes):
                    head[row] = state[name][row]
                elif by_name and known in old_classes:
                    head[row] = state[name][old_classes.index(known)]
                elif drop_new:
                    head[row] = 0.0
            if nothing:
                head[-1] = state[name][-1]
            state[name] = head
        if not body:
            state["box_head.0.weight"] = own["box_head.0.weight"]
        model.load_state_dict(state, strict=strict)

    return answer


RIGHT = [
    ("6.1", read),
    ("6.1", lambda x: (x.softmax(1)[:, :-1].amax(1), x[:, :-1].argmax(1))),
    ("6.2", settles),
    ("6.2", lambda q, n, w: torch.tensor(settles(q, n, w))),
    ("6.3", focal),
    ("6.4", image_loss()),
    ("6.5", SetLoss),
    ("6.5", learner()),
    ("6.6", adapt()),
]


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_right_answers_pass(number, answer):
    assert judge(number, answer).endswith((".", "refused."))


WRONG = [
    ("6.1", lambda x: (torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.long)), "all 0"),
    ("6.1", lambda x: x.softmax(-1)[:, :-1].amax(-1), "return two tensors"),
    ("6.1", lambda x: tuple(x.softmax(-1).max(-1)), "which is not a class"),
    ("6.1", lambda x: tuple(x[:, :-1].softmax(-1).max(-1)), "leaves out the column"),
    ("6.1", lambda x: tuple(x[:, :-1].sigmoid().max(-1)), "a sigmoid scores each class"),
    ("6.1", lambda x: tuple(x[:, :-1].max(-1)), "still logits"),
    ("6.1", lambda x: (1 - x.softmax(-1)[:, -1], x[:, :-1].argmax(-1)), "any object at all"),
    ("6.1", lambda x: (x.softmax(-1)[:, :-1].amax(-1), torch.zeros(len(x), dtype=torch.long)), "not the best class"),
    ("6.2", lambda q, n, w: None, "should be a number"),
    ("6.2", lambda q, n, w: (q - n) / q, "ignores the weight"),
    ("6.2", lambda q, n, w: 1 - settles(q, n, w), "the probability of an object"),
    ("6.2", lambda q, n, w: w * (q - n) / q, "the sum of the weights"),
    ("6.2", lambda q, n, w: w * q / (w * q + n), "not all queries are unmatched"),
    ("6.2", lambda q, n, w: 0.385, "for 100 queries, 7 objects"),
    ("6.2", lambda q, n, w: 0.5, "set its derivative"),
    ("6.3", lambda x, t, alpha=0.25, gamma=2.0: focal(x, t).sum(), "neither summed nor averaged"),
    ("6.3", focal_by(lambda pt, a: -pt.log()), "plain cross-entropy"),
    ("6.3", focal_by(lambda pt, a: -a * pt.log()), "down-weights easy examples"),
    ("6.3", focal_by(lambda pt, a: -((1 - pt) ** 2) * pt.log()), "alpha_t is missing"),
    ("6.3", focal_by(lambda pt, a: -(1 - a) * (1 - pt) ** 2 * pt.log()), "alpha_t is inverted"),
    ("6.3", focal_by(lambda pt, a: -a * pt**2 * pt.log()), "not p_t\\^gamma"),
    ("6.3", focal_by(lambda pt, a: -0.25 * (1 - pt) ** 2 * pt.log()), "depends on the target"),
    ("6.3", focal_by(lambda pt, a: a * (1 - pt) ** 2 * pt.log()), "the sign is wrong"),
    ("6.3", lambda x, t, alpha=0.25, gamma=2.0: focal(x.detach(), t).requires_grad_(), "no gradient flows"),
    ("6.3", lambda x, t, alpha=0.25, gamma=2.0: focal(x, t), "alpha=0.6"),
    (
        "6.3",
        lambda x, t, alpha=0.25, gamma=2.0: (
            -(alpha * t * (1 - x.sigmoid()) ** gamma * x.sigmoid().log())
            - (1 - alpha) * (1 - t) * x.sigmoid() ** gamma * (1 - x.sigmoid()).log()
        ),
        "F.logsigmoid",
    ),
    ("6.4", image_loss(nothing=0), "have class 0 as target"),
    ("6.4", image_loss(weight=1.0), "weighs as much"),
    ("6.4", image_loss(only_matched=True), "leaves out the queries"),
    ("6.4", image_loss(l1="mean"), "a mean over pairs and numbers"),
    ("6.4", image_loss(l1="image"), "this image's objects"),
    ("6.4", image_loss(l1="undivided"), "not divided"),
    ("6.4", image_loss(corners=False), "cxcywh boxes as corners"),
    ("6.4", image_loss(overlap="mean"), "mean over the image's pairs"),
    ("6.4", lambda *given: image_loss()(*given)[0], "three terms"),
    ("6.5", learner(only=True), "return two things"),
    (
        "6.5",
        learner(names=lambda o: {"base": o.layers[-1]} | {f"stage{i}": s[-1] for i, s in enumerate(o.stages, 1)}),
        "auxiliary losses",
    ),
    ("6.5", learner(names=lambda o: {f"base.{i}": p for i, p in enumerate(o.layers, 1)}), "REGO's stages are missing"),
    (
        "6.5",
        learner(names=lambda o: {k.replace("base", "decoder"): p for k, p in name_predictions(o).items()}),
        "names of the terms are wrong",
    ),
    ("6.5", learner(softmax=wrong(softmax_term, nothing=0)), "class 0 as target"),
    ("6.5", learner(softmax=wrong(softmax_term, no_object=1.0)), "weighs as much as an object"),
    ("6.5", learner(softmax=wrong(softmax_term, no_object=0.1)), "a fixed 0.1"),
    ("6.5", learner(softmax=wrong(softmax_term, no_object=0.0)), "leaves out the queries"),
    ("6.5", learner(softmax=wrong(softmax_term, norm="queries")), "divided by the number of queries"),
    ("6.5", learner(softmax=wrong(softmax_term, norm="boxes")), "divided by the number of boxes; divide by the sum"),
    ("6.5", learner(softmax=wrong(softmax_term, images=True)), "for each image and averaged"),
    ("6.5", learner(focal=wrong(focal_term, norm="mean")), "a mean over all queries and classes"),
    ("6.5", learner(focal=wrong(focal_term, norm="none")), "label term is not divided"),
    ("6.5", learner(focal=wrong(focal_term, entropy=True)), "not the focal loss"),
    ("6.5", learner(focal=wrong(focal_term, alpha=-1)), "has no alpha"),
    ("6.5", learner(focal=wrong(focal_term, floor=0.0)), "without objects"),
    ("6.5", learner(l1=lambda a, b: (a - b).abs().mean(-1)), "mean over the four numbers"),
    ("6.5", learner(l1=lambda a, b: (to_xyxy(a) - to_xyxy(b)).abs().sum(-1)), "compares corners"),
    ("6.5", learner(norm=by_image), "averaged within each image"),
    ("6.5", learner(norm=lambda v, i, n, p: v.sum()), "L1 term is not divided"),
    ("6.5", learner(norm=lambda v, i, n, p: v.sum() / p.boxes[..., 0].numel()), "divided by the number of queries"),
    ("6.5", learner(norm=lambda v, i, n, p: v.sum() / len(p.boxes)), "divided by the number of images"),
    ("6.5", learner(giou=generalized_box_iou_loss), "cxcywh boxes as corners"),
    ("6.5", learner(giou=lambda a, b: 1 - generalized_box_iou_loss(to_xyxy(a), to_xyxy(b))), "is GIoU itself"),
    ("6.5", learner(giou=lambda a, b: generalized_box_iou_loss(to_xyxy(a), to_xyxy(b)) - 1), "is -GIoU"),
    ("6.5", learner(weights=(1.0, 1.0, 1.0)), "lacks its weight, config.label"),
    ("6.5", learner(costs=MatchingCosts(0.0, 0.0, -5.0)), "should be"),
    ("6.5", learner(costs=MatchingCosts()), "weights of the config"),
    ("6.5", learner(costs="loss"), "has the weights of the loss"),
    ("6.5", learner(count="pairs"), "not of pairs"),
    ("6.5", learner(count="padding"), "N counts padding"),
    ("6.5", learner(share=True), "pairs of the last one"),
    ("6.5", learner(use_num_boxes=False), "`num_boxes` is ignored"),
    ("6.5", learner(total=lambda terms: torch.stack(list(terms.values())).mean()), "the mean of the terms"),
    ("6.5", learner(total=lambda terms: terms["base/label"] + terms["base/l1"] + terms["base/giou"]), "the total"),
    ("6.5", learner(detach=True), "no gradient flows back"),
    ("6.6", lambda state, old, model, new: None, "should come from the checkpoint"),
    ("6.6", adapt(by_name=False), "by its number"),
    ("6.6", adapt(nothing=False), "both have 'no object'"),
    ("6.6", adapt(bias=False), "class_head.bias should come"),
    ("6.6", adapt(drop_new=True), "the class is new"),
    ("6.6", adapt(body=False), "box_head.0.weight is not the checkpoint's"),
    ("6.6", adapt(strict=False), "without an error"),
]


@pytest.mark.parametrize(("number", "answer", "says"), WRONG)
def test_mistakes_are_named(number, answer, says):
    with pytest.raises(Mistake, match=says):
        judge(number, answer)
