from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.data import Augment, Batch, ImageData, Loader, PixelSource, make_loader, open_data
from clicktrain.data.draws import Part
from clicktrain.data.loader import BatchPlan
from clicktrain.errors import UserError

CPU = torch.device("cpu")
EVERYTHING = Augment(crop_padding=2, flip=True, cutout=3)


def numbered(count: int = 23, shape: tuple[int, int, int] = (1, 4, 4)) -> ImageData:
    """Images whose every pixel is their number."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *shape).contiguous()
    labels = torch.arange(count) % 3
    mean, std = (0.0,) * shape[0], (1 / 255,) * shape[0]
    source = PixelSource(images, labels)
    return ImageData("numbered", ("a", "b", "c"), shape, mean, std, source, source)


def loader(data: ImageData, split: str = "train", *, seed: int = 0, **settings: object) -> Loader:
    arguments: dict[str, object] = {"batch_size": 5, "device": CPU, "augment": Augment(), "drop_last": False}
    return make_loader(data, split, seed=seed, **(arguments | settings))  # type: ignore[arg-type]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)


@given(
    num_images=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    epoch=st.integers(0, 50),
)
def test_the_batches_of_an_epoch_are_each_image_once(
    num_images: int, batch_size: int, drop_last: bool, shuffle: bool, epoch: int
) -> None:
    plan = BatchPlan(num_images, batch_size, drop_last, shuffle, 0)
    order = plan.order(epoch)
    batches = [order[plan.rows(batch)] for batch in range(len(plan))]
    seen = torch.cat([*batches, torch.empty(0, dtype=torch.int64)])
    assert len(seen) == (num_images // batch_size * batch_size if drop_last else num_images)
    assert len(seen.unique()) == len(seen)
    assert all(len(batch) == batch_size for batch in batches[: len(plan) - 1])


def test_training_shuffles_anew_each_epoch_and_validation_never() -> None:
    data = numbered()

    def order(split: str, seed: int, epoch: int) -> list[int]:
        batches = list(loader(data, split, seed=seed).epoch(epoch))
        for batch in batches:
            assert torch.equal(batch.x[:, 0, 0, 0].round().long() % 3, batch.y)  # images keep their labels
        return [round(x) for batch in batches for x in batch.x[:, 0, 0, 0].tolist()]

    assert order("val", 0, 0) == order("val", 1, 7) == list(range(23))
    drawn = [order("train", 0, 0), order("train", 0, 1), order("train", 1, 0)]
    assert all(sorted(one) == list(range(23)) for one in drawn)
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert order("train", 0, 1) == drawn[1]


@given(start=st.integers(0, 6), epoch=st.integers(0, 3))
def test_starting_late_gives_the_same_batches_bit_for_bit(start: int, epoch: int) -> None:
    data = open_data("synthetic:classes=3,size=8,train=27,val=4")
    uninterrupted = list(loader(data, augment=EVERYTHING).epoch(epoch))
    assert len(uninterrupted) == 6
    torch.manual_seed(epoch)  # whatever the global generator does
    assert_same(list(loader(data, augment=EVERYTHING).epoch(epoch, start)), uninterrupted[start:])


def test_augmentation_differs_between_batches_epochs_and_seeds() -> None:
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    source = PixelSource(image.repeat(40, 1, 1, 1), torch.zeros(40, dtype=torch.int64))  # all alike
    data = ImageData("alike", ("a", "b"), (1, 8, 8), (0.0,), (1.0,), source, source)
    drawn = [
        batch.x
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
        for batch in loader(data, seed=seed, augment=Augment(crop_padding=2), batch_size=20).epoch(epoch)
    ]
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == 6


def test_batches_are_normalized_by_the_training_statistics() -> None:
    data = open_data("synthetic:classes=2,size=8,train=200,val=10")
    x = torch.cat([batch.x for batch in loader(data).epoch(0)]).double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64))


def test_validation_is_never_augmented() -> None:
    data = open_data("synthetic:classes=2,size=8,train=20,val=11")
    plain = list(loader(data, "val").epoch(0))
    assert_same(list(loader(data, "val", augment=EVERYTHING).epoch(3)), plain)


def test_type_and_memory_layout_are_as_asked() -> None:
    data = open_data("synthetic:classes=2,size=8,train=20,val=11")
    exact = next(loader(data, augment=EVERYTHING).epoch(0))
    batch = next(loader(data, augment=EVERYTHING, channels_last=True, dtype=torch.bfloat16).epoch(0))
    assert batch.x.dtype == torch.bfloat16
    assert batch.x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.x, exact.x.to(torch.bfloat16))
    assert exact.x.is_contiguous()
    assert exact.y.dtype == torch.int64


def test_drop_last_leaves_out_the_rest() -> None:
    assert [len(batch.y) for batch in loader(numbered(), drop_last=True).epoch(0)] == [5, 5, 5, 5]
    assert [len(batch.y) for batch in loader(numbered()).epoch(0)] == [5, 5, 5, 5, 3]


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 24, "drop_last": True}, "batch_size=24 is more than the 23 images"),
        ({"augment": Augment(crop_padding=4, padding="reflect")}, "at most 3 is possible"),
        ({"augment": Augment(cutout=9)}, "cutout=9 is larger"),
    ],
)
def test_impossible_loaders_are_named_at_once(settings: dict[str, object], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        loader(numbered(), **settings)


@pytest.mark.parametrize("start", [-1, 6])
def test_a_start_outside_of_the_epoch_is_an_error_at_once(start: int) -> None:
    with pytest.raises(ValueError, match=r"outside of the epoch's 5"):
        loader(numbered()).epoch(0, start)


@pytest.mark.gpu
def test_a_gpu_gets_the_batches_of_the_cpu() -> None:
    data = open_data("synthetic:classes=3,size=32,train=200,val=10")
    for augment in (Augment(crop_padding=4, flip=True), Augment(resized_crop=True, flip=True), EVERYTHING):
        on_cpu = list(loader(data, augment=augment, batch_size=64).epoch(1))
        on_gpu = list(loader(data, augment=augment, batch_size=64, device=torch.device("cuda")).epoch(1))
        for one, other in zip(on_cpu, on_gpu, strict=True):
            assert other.x.is_cuda
            assert torch.equal(one.y, other.y.cpu())
            torch.testing.assert_close(one.x, other.x.cpu(), atol=1e-3, rtol=1e-3)


def test_alternating_flips_go_by_the_image_whatever_the_batch() -> None:
    pixels = torch.tensor([0, 1], dtype=torch.uint8).view(1, 1, 1, 2).expand(20, 1, 1, 2).contiguous()
    source = PixelSource(pixels, torch.arange(20))
    data = ImageData("pairs", tuple(map(str, range(20))), (1, 1, 2), (0.0,), (1 / 255,), source, source)

    def mirrored(epoch: int, start: int = 0, batch_size: int = 6) -> dict[int, bool]:
        batches = loader(data, augment=Augment(alternating=True), batch_size=batch_size).epoch(epoch, start)
        return {int(y): bool(x[0, 0, 0] > 0.5) for batch in batches for x, y in zip(*batch, strict=True)}

    first, second = mirrored(0), mirrored(1)
    assert len(first) == 20
    assert all(first[image] != second[image] for image in first)
    assert mirrored(2) == first
    assert mirrored(0, batch_size=7) == first
    assert mirrored(0, start=2).items() <= first.items()


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop_padding=2, flip=True, cutout=3),
        Augment(resized_crop=True),
        Augment(crop_padding=1, padding="reflect", alternating=True),
    ],
)
def test_parts_of_a_batch_are_augmented_as_in_the_whole(augment: Augment, count: int, start: int) -> None:
    data = open_data("synthetic:classes=3,size=8,train=28,val=9")
    settings = {"batch_size": 12, "augment": augment, "drop_last": True}
    whole = list(loader(data, **settings).epoch(2, start))
    parts = [
        list(loader(data, part=Part(index, count), **settings).epoch(2, start)) for index in range(count)
    ]
    together = [
        Batch(torch.cat([own.x for own in batch]), torch.cat([own.y for own in batch]))
        for batch in zip(*parts, strict=True)
    ]
    assert [len(batch.y) for part in parts for batch in part] == [12 // count] * count * (2 - start)
    assert_same(together, whole)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_processes_take_turns_at_validation_batches(start: int) -> None:
    data = numbered()
    whole = list(loader(data, "val").epoch(0, start))
    parts = [list(loader(data, "val", part=Part(index, 3)).epoch(0, start)) for index in range(3)]
    assert_same(sorted((b for part in parts for b in part), key=lambda b: int(b.x[0, 0, 0, 0])), whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("count", "parts", "message"), [
    (6, None, "6 processes cannot share batches of 5 images: give a batch_size of at least 6"),
    (2, 7, "7 parts cannot share batches of 5 images: give a batch_size of at least 7"),
])  # fmt: skip
def test_a_batch_with_fewer_images_than_shares_is_refused(
    count: int, parts: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        loader(numbered(), part=Part(0, count, parts))


@pytest.mark.parametrize("whole", [12, 13, 17])
@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("parts", range(1, 7))
def test_parts_of_a_batch_stay_for_any_number_of_processes(parts: int, count: int, whole: int) -> None:
    processes = [Part(index, count, parts) for index in range(count)]
    expected = [Part(index, parts).rows(whole) for index in range(parts)]
    covered = [row for one in processes for row in range(whole)[one.rows(whole)]]
    assert covered == list(range(whole))
    lengths = [expected[part].stop - expected[part].start for part in range(parts)]
    assert max(lengths) - min(lengths) <= 1
    pieces = [(part, piece) for one in processes for part, piece in _pieces(one, whole)]
    for part, rows in enumerate(expected):
        own = [piece for number, piece in pieces if number == part]
        assert (own[0].start, own[-1].stop) == (rows.start, rows.stop)
        sharing = {index for index, one in enumerate(processes) if part in one.own}
        assert all(processes[index].sharers == range(min(sharing), max(sharing) + 1) for index in sharing
                   if count > parts)  # fmt: skip
    assert max(piece.stop - piece.start for _, piece in pieces) == processes[0].longest(whole)
    assert min(piece.stop - piece.start for _, piece in pieces) >= 1


def _pieces(one: Part, whole: int) -> list[tuple[int, slice]]:
    return list(zip(one.own, one.pieces(whole), strict=True))
