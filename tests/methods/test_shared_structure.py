"""What filters of a group share: kernels, or channels alone with patterns of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clicktrain import ClickTrain
from clicktrain.errors import UserError


def pruned(**settings: object) -> tuple[Tensor, float]:
    """The mask of a layer of 12 filters after a short run, and the compression asked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(8, 2, 7, 7)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = ClickTrain(compression=4.0, **settings)  # type: ignore[arg-type]
    pruner = method.attach(model, optimizer, epochs=2, steps_per_epoch=10)
    for _ in range(20):
        loss = model(x).square().mean()
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    return pruner.masks["1"].cpu(), method.compression


@pytest.mark.filterwarnings("ignore:compression of convolution weights")
@pytest.mark.parametrize("share", ["kernels", "channels", "similar"])
def test_what_is_shared(share: str) -> None:
    mask, compression = pruned(group=4, share=share)
    kept = mask.flatten(2).any(2)
    counts = mask.flatten(2).sum(2)
    assert set(counts[kept].tolist()) == {4}
    assert len(set(kept.sum(1).tolist())) == 1, "equally many kernels in each filter"
    dense = 8 * 2 * 9  # the first layer stays whole
    assert (dense + mask.numel()) / (dense + int(mask.sum())) == pytest.approx(compression, rel=0.1)
    neighbors = [mask[first : first + 4] for first in range(0, 12, 4)]
    if share == "similar":
        rows = sorted(tuple(row) for row in kept.tolist())
        assert all(len(set(rows[first : first + 4])) == 1 for first in range(0, 12, 4))
    else:
        assert all((own.flatten(2).any(2) == own[:1].flatten(2).any(2)).all() for own in neighbors)
    same_patterns = all(bool((own == own[:1]).all()) for own in neighbors)
    assert same_patterns == (share == "kernels")


def test_a_group_of_one_shares_nothing() -> None:
    with pytest.raises(UserError, match="share is channels but group is 1"):
        ClickTrain(share="channels")
