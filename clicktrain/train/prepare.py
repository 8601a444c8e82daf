"""Builds everything that a run needs, and finds every mistake, before a file is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from clicktrain.comm.agreement import all_or_none
from clicktrain.comm.alike import check_same_data
from clicktrain.comm.processes import ALONE, Processes, group_among
from clicktrain.comm.sync_batch_norm import synchronized
from clicktrain.compiler import MaskedLatency
from clicktrain.data import (
    WHOLE,
    Augment,
    ImageData,
    Loader,
    Part,
    fingerprint,
    make_loader,
    open_data,
)
from clicktrain.errors import FailedElsewhere, UserError, shortened
from clicktrain.formats.memory_format import keep_out_of_channels_last_
from clicktrain.limits import check_memory
from clicktrain.methods import METHODS, Method, Pruner
from clicktrain.models import min_image_size
from clicktrain.models.from_facts import build_from_facts
from clicktrain.models.registry import CIFARNET
from clicktrain.models.whitening import IMAGES, whiten_
from clicktrain.train.augmentation import SMALL_IMAGE, augmentation
from clicktrain.train.config import RunConfig
from clicktrain.train.device import resolve_device, set_up
from clicktrain.train.initial_weights import EarlierCost, load_initial_weights_
from clicktrain.train.norms import norms_of, single_value_norms
from clicktrain.train.optim import BatchSizes, make_optimizer, make_scheduler
from clicktrain.train.run_logs import check_logs
from clicktrain.train.second_cycle import SecondCycle
from clicktrain.train.training_cost import TrainingCost

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run that is ready to start; nothing has been written.

    Attributes:
        device: of the network and the batches.
        processes: that train together.
        part: of each training batch that is this process's.
        norm_group: processes that share batch norm statistics, where some but not all of them do.
        model: with its initial weights.
        scheduler: to be stepped after each optimizer step.
        cycle: the learning rate of the scheduler, where it has two cycles.
        pruner: the method, attached to model and optimizer.
        earlier: cost of the initial weights; a resumed run has it in its checkpoint.
        facts: what rebuilds the network: model, width, stem, num_classes, in_channels, image_shape, classes,
            mean, std, value_range.
    """

    config: RunConfig
    method: Method[Any]
    device: torch.device
    data: ImageData
    train_loader: Loader
    val_loader: Loader
    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    cycle: SecondCycle | None
    pruner: Pruner
    cost: TrainingCost
    earlier: EarlierCost
    batch_sizes: BatchSizes
    facts: dict[str, Any]
    processes: Processes = ALONE
    part: Part = WHOLE
    norm_group: ProcessGroup | None = None

    @property
    def batch_size(self) -> int:
        """Images in a training batch of the running epoch, of all processes."""
        return self.batch_sizes.now.images

    @property
    def batch_images(self) -> int:
        """Images in a training batch: fewer than the batch size if there are no more."""
        return min(self.batch_size, len(self.data.train))

    @property
    def own_batch_size(self) -> int:
        """The most images that any process runs at once in training."""
        return self.part.longest(self.batch_images)

    @property
    def planned_batch_size(self) -> int:
        """Images that a process runs at once, as many processes as the run began with: growing batches follow
        from it, whatever number goes on."""
        return self.planned_share(self.batch_size)

    def planned_share(self, images: int) -> int:
        """The longest part of that many images, of the parts that the run has."""
        return -(-images // (self.config.parts or 1))

    @property
    def norms_shared(self) -> bool:
        """Whether processes share batch norm statistics."""
        return self.processes.number > (1 if self.config.sync_batch_norm else self.part.number)


def prepare(
    config: RunConfig, method: Method[Any], processes: Processes = ALONE, *, begins: bool = True
) -> Prepared:
    """Open the data, build and check everything; UserError for a setting that cannot be carried out here.

    ``begins``: the run has no checkpoint yet, so that it needs its initial weights. What fails in one of
    several processes fails in all of them.
    """
    _check_settings(config, method, processes)
    device = resolve_device(config.device)
    set_up(config, device, processes)
    data = all_or_none(lambda: open_run_data(config))
    if processes.number > 1:
        check_same_data(data.spec, fingerprint(data))
    try:
        return _prepared(config, method, processes, device, data, begins)
    except UserError as error:
        raise error if processes.first else FailedElsewhere(str(error)) from None


def _check_settings(config: RunConfig, method: Method[Any], processes: Processes) -> None:
    """UserError for settings that do not go together, whatever the data and the network are."""
    check_logs(config.log_names)
    if config.dynamic_batch and not method.reads_graph:
        raise UserError(
            f"dynamic_batch is true but method {config.method} removes no channels while it trains: "
            f"turn it off, or use {' or '.join(name for name, kind in METHODS.items() if kind.reads_graph)}"
        )
    if config.distill and config.teacher is None and not method.dense_until_chosen:
        raise UserError(
            f"distill is set but method {config.method} has no dense network to learn from when its masks "
            "are frozen: give teacher, the folder of a finished run"
        )


def _prepared(
    config: RunConfig,
    method: Method[Any],
    processes: Processes,
    device: torch.device,
    data: ImageData,
    begins: bool,
) -> Prepared:
    part = part_of(config, processes)
    train_loader = make_train_loader(config, data, device, part)
    facts = model_facts(config, data)
    torch.manual_seed(config.seed)  # of the initial weights; each batch is seeded by itself
    model = build_model(facts).to(device)
    check_model(model, config, data, device, part.number)
    group = None
    if processes.number > (1 if config.sync_batch_norm else part.number):
        sharers = {part_of(config, replace(processes, rank=rank)).sharers for rank in range(processes.number)}
        group = group_among(sorted(sharers, key=min)) if 1 < part.number < processes.number else None
        model = synchronized(model, whole=group is None)
    whiten_first_(model, config, data)
    if config.recalibrate_norms and not norms_of(model):
        raise UserError(
            f"recalibrate_norms is {config.recalibrate_norms} but model {config.model} has no batch norm "
            "that keeps statistics: leave it out"
        )
    earlier = EarlierCost()
    if config.initial_weights is not None and begins:
        earlier = load_initial_weights_(
            model, config.initial_weights, data.classes, config.model, data.image_shape[0]
        )
    elif config.initial_weights is None and method.expects_trained:
        raise UserError(
            f"this setting of method {config.method} prunes a network that is trained already: give "
            "initial_weights, the folder of a finished run"
        )
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        keep_out_of_channels_last_(model)
    optimizer = make_optimizer(model, config)
    example = torch.zeros(1, *data.image_shape, device=device)
    cost = TrainingCost(model, example)
    pruner = method.attach(
        model,
        optimizer,
        epochs=config.epochs,
        steps_per_epoch=len(train_loader),
        packed=config.packed,
        example=example,
        measure=MaskedLatency(model, example),
        accelerate=False,  # the trainer keeps its own view, and its plan in the run's folder
    )
    cost.follow(pruner)
    sizes = BatchSizes(config.batch_size, len(train_loader), config.accumulate)
    steps = config.epochs * sizes.first.steps
    cycle = None
    if config.second_cycle is not None and method.freezes:
        cycle = SecondCycle(config, steps, pruner.cut_epoch)
    return Prepared(
        config=config,
        method=method,
        device=device,
        data=data,
        train_loader=train_loader,
        val_loader=make_eval_loader(config, data, "val", device, processes),
        model=model,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, config, steps, sizes, cycle),
        cycle=cycle,
        pruner=pruner,
        cost=cost,
        earlier=earlier,
        batch_sizes=sizes,
        facts=facts,
        processes=processes,
        part=part,
        norm_group=group,
    )


def whiten_first_(model: nn.Module, config: RunConfig, data: ImageData) -> None:
    """Whiten the first convolution, as the settings say; its weights need no gradient from then on.

    Raises:
        UserError: the network begins with something else.
    """
    if not (config.model == CIFARNET if config.whitening is None else config.whitening):
        return
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.groups != 1 or first.in_channels != data.image_shape[0]:
        raise UserError(
            f"whitening is on but model {config.model} does not begin with a convolution of the images: turn "
            "it off"
        )
    count = min(IMAGES, len(data.train))
    loader = make_loader(
        data, "train", batch_size=count, seed=0, augment=Augment(), drop_last=True, device=torch.device("cpu")
    )
    whiten_(first, next(iter(loader.epoch(0))).x)


def open_run_data(config: RunConfig, value_range: tuple[float, float] | None = None) -> ImageData:
    """Open the images that the settings name; ``value_range``: see `open_data`."""
    return open_data(
        config.data,
        image_size=config.image_size,
        val_fraction=config.val_fraction,
        holdout=config.holdout,
        seed=config.seed,
        cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
        workers=config.workers,
        value_range=value_range,
        shuffle_buffer=config.shuffle_buffer,
    )


def part_of(config: RunConfig, processes: Processes = ALONE) -> Part:
    """This process's part of each training batch; where norms are those of the whole batch, an even share."""
    return Part(processes.rank, processes.number, None if config.sync_batch_norm else config.parts or 1)


def make_train_loader(config: RunConfig, data: ImageData, device: torch.device, part: Part = WHOLE) -> Loader:
    """Make the loader of the training split, of this process's part of each batch.

    The last batch is dropped if it is not full (batch norm needs more than one image), unless it is the only
    one.
    """
    whole = len(data.train) >= config.batch_size
    repeats, augment = config.augment_repeats, augmentation(config, data)
    return _make_loader(
        config, data, "train", device, augment=augment, drop_last=whole, part=part, repeats=repeats
    )


def make_eval_loader(
    config: RunConfig,
    data: ImageData,
    split: Literal["train", "val", "test"],
    device: torch.device,
    processes: Processes = ALONE,
) -> Loader:
    """Make the loader of a split, without augmentation; UserError if there is none.

    Several processes take turns at its batches.
    """
    part = Part(processes.rank, processes.number)
    return _make_loader(config, data, split, device, augment=Augment(), drop_last=False, part=part)


def _make_loader(
    config: RunConfig,
    data: ImageData,
    split: Literal["train", "val", "test"],
    device: torch.device,
    **more: Any,
) -> Loader:
    more |= {"batch_size": config.batch_size, "seed": config.seed, "channels_last": config.channels_last}
    return make_loader(data, split, device=device, **more)


@torch.no_grad()
def check_model(
    model: nn.Module, config: RunConfig, data: ImageData, device: torch.device, parts: int = 1
) -> None:
    """Send one blank image through the network; UserError unless it gives one number per class.

    ``parts``: of a batch, with batch norm statistics of their own unless these are synchronized.
    """
    shape, classes = data.image_shape, len(data.classes)
    smallest = min_image_size(config.model, model_facts(config, data)["stem"])
    if min(shape[1:]) < smallest:
        other = ", or stem=cifar" if min_image_size(config.model, "cifar") <= min(shape[1:]) else ""
        raise UserError(
            f"model {config.model} needs images of at least {smallest} pixels, those of {data.spec} have "
            f"{shape[1]}x{shape[2]}: set image_size={smallest}{other}"
        )
    try:
        model.eval()
        with _output_bytes(model) as kept, single_value_norms(model) as lonely:
            output = model(torch.zeros(1, *shape, device=device))
        model.train()
    except MemoryError:
        raise
    except Exception as error:  # a user's forward may raise anything
        first = shortened(str(error).strip().split("\n", 1)[0] or type(error).__name__, 160)
        raise UserError(f"model {config.model} does not take images of shape {shape}: {first}") from error
    got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if got != (1, classes):
        raise UserError(f"model {config.model} gives {got} for one image: (1, {classes}) is needed")
    if lonely and config.batch_size // parts == 1 and (parts == 1 or not config.sync_batch_norm):
        of = "" if parts == 1 else f" in each of {parts} parts of a batch"
        raise UserError(
            f"batch_size is {config.batch_size}: batch norm {lonely[0]} of model {config.model} has one "
            f"value per channel for each image, and needs two{of}: set batch_size to at least {2 * parts}"
        )
    # Half of the estimate: activations may share memory (in-place operators) or be recomputed.
    check_memory(
        config.batch_size * sum(kept) / 2,
        f"training model {config.model} on batches of {config.batch_size} images of {shape[1]}x{shape[2]}",
        "make batch_size, image_size or width smaller",
        device,
    )


@contextlib.contextmanager
def _output_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Collect the bytes of each layer's output inside the block: what a backward pass would keep."""
    sizes: list[int] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.nbytes)

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [module.register_forward_hook(note) for module in leaves]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def model_facts(config: RunConfig, data: ImageData) -> dict[str, Any]:
    """What rebuilds the network without the data, as plain values."""
    stem = config.stem
    if stem == "auto":
        stem = "cifar" if max(data.image_shape[1:]) <= SMALL_IMAGE else "imagenet"
    return {
        "model": config.model,
        "width": config.width,
        "stem": stem,
        "num_classes": len(data.classes),
        "in_channels": data.image_shape[0],
        "image_shape": list(data.image_shape),
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "value_range": None if data.value_range is None else list(data.value_range),
    }


def build_model(facts: dict[str, Any]) -> nn.Module:
    """The network that `model_facts` describes, with fresh weights."""
    return build_from_facts(facts["model"], facts)
