"""The checkers of notebook 06: right answers pass, and each usual mistake is called by its name."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from regolite.boxes import to_xyxy
from regolite.course import Mistake, find


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
    ("6.5", adapt()),
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
    ("6.5", lambda state, old, model, new: None, "should come from the checkpoint"),
    ("6.5", adapt(by_name=False), "by its number"),
    ("6.5", adapt(nothing=False), "both have 'no object'"),
    ("6.5", adapt(bias=False), "class_head.bias should come"),
    ("6.5", adapt(drop_new=True), "the class is new"),
    ("6.5", adapt(body=False), "box_head.0.weight is not the checkpoint's"),
    ("6.5", adapt(strict=False), "without an error"),
]


@pytest.mark.parametrize(("number", "answer", "says"), WRONG)
def test_mistakes_are_named(number, answer, says):
    with pytest.raises(Mistake, match=says):
        judge(number, answer)
