"""A detector of SSD's shape in a loop of its own: channels of the maps go, boxes and classes stay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain import PaT

CLASSES, ANCHORS = 3, 2


def block(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Detector(nn.Module):
    """Two feature maps, on each a head for classes and one for boxes, all default boxes in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Sequential(block(3, 12), block(12, 16)), block(16, 24)
        self.classes = nn.ModuleList(nn.Conv2d(c, ANCHORS * CLASSES, 3, padding=1) for c in (16, 24))
        self.boxes = nn.ModuleList(nn.Conv2d(c, ANCHORS * 4, 3, padding=1) for c in (16, 24))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = [self.early(x)]
        maps.append(self.late(maps[0]))
        scores = [
            head(y).permute(0, 2, 3, 1).reshape(len(x), -1, CLASSES)
            for head, y in zip(self.classes, maps, strict=True)
        ]
        boxes = [
            head(y).permute(0, 2, 3, 1).reshape(len(x), -1, 4)
            for head, y in zip(self.boxes, maps, strict=True)
        ]
        return torch.cat(scores, 1), torch.cat(boxes, 1)


def test_pat_prunes_the_maps_of_a_detector() -> None:
    torch.manual_seed(0)
    model, x = Detector(), torch.randn(4, 3, 16, 16)
    before = [tuple(y.shape) for y in model(x)]
    assert before == [(4, 40, CLASSES), (4, 40, 4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = PaT(policy="epoch", prune_epoch=0, prune_ratio=0.5, prune_steps=2)
    pruner = method.attach(model, optimizer, epochs=2, steps_per_epoch=2, example=x)
    labels, places = torch.randint(CLASSES, (4, 40)), torch.randn(4, 40, 4)
    for _ in range(4):
        scores, boxes = model(x)
        here = labels > 0  # class 0 is background, which has no box
        loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten())
        loss = loss + F.smooth_l1_loss(boxes[here], places[here])
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    widths = [model.early[i][0].out_channels for i in range(2)] + [model.late[0].out_channels]
    assert sum(widths) == (12 + 16 + 24) // 2
    assert [head.in_channels for head in model.classes] == widths[1:]
    assert [head.in_channels for head in model.boxes] == widths[1:]
    assert [tuple(y.shape) for y in model.eval()(x)] == before
