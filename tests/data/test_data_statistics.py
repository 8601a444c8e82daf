from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.data.statistics import channel_sums, mean_and_std


@given(seed=st.integers(0, 100), count=st.integers(1, 300), channels=st.sampled_from([1, 3]))
def test_statistics_are_those_of_the_pixels(seed: int, count: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, 3, 2), generator=generator, dtype=torch.uint8)
    mean, std = mean_and_std(channel_sums(images), 6)
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), pixels.mean(1))
    torch.testing.assert_close(torch.tensor(std, dtype=torch.float64), pixels.std(1, correction=0))


def test_bright_images_do_not_overflow() -> None:
    images = torch.full((2, 1, 200, 200), 255, dtype=torch.uint8)
    assert channel_sums(images).tolist() == [[[255 * 40000, 255**2 * 40000]]] * 2


def test_a_channel_that_never_changes_is_left_alone_by_a_division() -> None:
    assert mean_and_std(channel_sums(torch.full((4, 1, 2, 2), 51, dtype=torch.uint8)), 4) == ((0.2,), (1.0,))
