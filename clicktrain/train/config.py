"""Settings of a training run: the same fields in Python, YAML and on the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from clicktrain.errors import UserError, shown
from clicktrain.files import find_recipe, read_yaml
from clicktrain.methods import METHODS, Method
from clicktrain.own_code import FromFile, is_own, require_named
from clicktrain.runs.folder import RunFolder
from clicktrain.settings import (
    SaidOnce,
    build,
    choice_fields,
    field_names,
    said_twice,
    to_plain,
    unknown_field,
)
from clicktrain.train.setting_checks import check_settings
from clicktrain.train.views import Views

Precision = Literal["fp32", "bf16", "fp16"]
BatchRate = Literal["linear", "sqrt", "none"]
SecondCycleRule = Literal["norm", "loss"]
ExchangedGradients = Literal["kept", "dense"]
ExchangedDtype = Literal["fp32", "fp16", "bf16"]
LogName = Literal["csv", "tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(SaidOnce):
    """Everything about a run except the settings of its method. Raises UserError for a value out of range."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("val_fraction", "holdout"),)

    model: str = "resnet20"
    """Network: a name of the zoo, timm:NAME or torchvision:NAME of these packages, or package.module:factory
    for your own."""
    width: float = 1.0
    """Factor on the number of filters in every layer of a zoo network."""
    stem: Literal["auto", "cifar", "imagenet"] = "auto"
    """First layers: cifar (3x3, stride 1), imagenet (7x7, stride 2, pooling); auto: cifar up to 64 pixels."""
    data: str = "digits"
    """Data set: digits, synthetic:..., parquet:DIR, imagefolder:DIR, cifar10:DIR, cifar100:DIR,
    parquet-shards:DIR and webdataset:DIR (streamed), or a Hugging Face data set's name."""
    image_size: int | None = None
    """Side of the square images that the network sees, in pixels; the data set's own size by default."""
    val_fraction: float = 0.2
    """Share of the images held back for validation, where the data set has no validation split."""
    holdout: int | None = None
    """Training images held back for validation, to choose settings on; the data set's own validation split is
    then the test split, looked at once, at the end."""
    workers: int = 2
    """Processes that decode images of data sets too large for memory."""
    shuffle_buffer: int | None = None
    """Images that are shuffled together where shards are streamed (parquet-shards, webdataset): this many
    encoded images are in memory; 4096 by default."""
    cache_dir: str | None = None
    """Folder for decoded data sets; a folder in the user's cache by default."""
    method: str = "clicktrain"
    """How the network is pruned while it trains; dense for not at all."""
    initial_weights: str | None = None
    """Weights to start from: the folder of a finished run, a .safetensors file of the plain network, or
    pretrained: what timm or torchvision publish, from their caches (nothing is downloaded); fresh ones by
    default."""
    epochs: int = 60
    """Passes over the training images."""
    time_budget: float | str | None = None
    """Train for as long as fits: a share of the time of the dense run of the same settings and epochs (1.0),
    or a time (90s, 20min, 2h). Steps are measured before the run starts, and epochs is set to what fits."""
    budget_epochs: int | None = None
    """Epochs of the dense run that time_budget is a share of; epochs by default, which planning replaces."""
    batch_size: int = 128
    """Images in one forward and backward pass; the optimizer steps on batch_size x accumulate images."""
    dynamic_batch: bool = False
    """Let the batch grow when channels have been removed, to fill the memory budget (PruneTrain)."""
    memory_budget: str | None = None
    """Memory that an iteration may take in each process when the batch grows, as 4GiB or 500MB; what the
    first batch takes by default."""
    batch_granularity: int = 32
    """Images by which the batch grows at a time."""
    batch_limit: int | None = None
    """Largest batch that the growing may lead to; the whole training set by default."""
    batch_lr: BatchRate = "linear"
    """How the learning rate grows with the batch: linear (by the same ratio), sqrt (by its square root) or
    none."""
    optimizer: Literal["sgd", "adamw", "adam", "lamb"] = "sgd"
    """sgd, adamw, adam (weight decay added to the gradient) or lamb (for large batches); betas: momentum and
    0.999."""
    learning_rate: float = 0.1
    """Peak learning rate."""
    learning_rate_batch: int | None = None
    """Images per optimizer step that learning_rate is meant for: with others it is scaled, as
    learning_rate_scaling says; by default it is taken as it stands."""
    learning_rate_scaling: Literal["linear", "sqrt"] = "linear"
    """Scale the learning rate in proportion to the images per optimizer step, or to their square root."""
    momentum: float = 0.9
    """Momentum of sgd; first beta of adamw, adam and lamb."""
    nesterov: bool = True
    """Nesterov's momentum (sgd only)."""
    weight_decay: float = 5e-4
    """Weight decay: added to the gradient by sgd and adam, decoupled in adamw and lamb."""
    decay_norm_and_bias: bool = True
    """Apply weight decay to batch norm parameters and biases too, as the recipes of the papers do."""
    bias_rate_factor: float = 1.0
    """Factor on the learning rate of biases; their weight decay is divided by it, so that they decay as
    fast."""
    layer_decay: float = 1.0
    """Factor on the learning rate from one depth (a residual block, a layer) to the next one towards the
    input; the last layer has the whole rate."""
    layer_rates: dict[str, float] = field(default_factory=dict, hash=False)
    """Factors on the learning rates of parameters whose names fit a pattern, as in fc.*=10; they multiply."""
    schedule: Literal["cosine", "linear", "triangular", "onecycle", "step", "constant"] = "cosine"
    """Learning rate over the run. Cosine or linear to zero, triangular (straight up from a fifth for
    warmup_epochs or 23% of the run, then linear to zero), onecycle (up for warmup_epochs or 30% of the run,
    then down), step (times gamma at each milestone) or constant."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from zero (onecycle, triangular: of the rising part; 0 means 30% and 23% of
    the run)."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the run at which the step schedule lowers the learning rate."""
    gamma: float = 0.1
    """Factor of the step schedule at each milestone."""
    second_cycle: float | SecondCycleRule | None = None
    """Restart the learning rate when masks are frozen: the schedule ends at cycle_floor just before, then the
    rate falls in a line from this share of the peak to zero at the end of the run. norm, loss: the share of
    the run that is left, or the damage done by freezing (norm of the pruned weights; rise of the training
    loss) if that is more."""
    cycle_floor: float = 0.05
    """Share of the peak at which the first of two cycles ends (second_cycle)."""
    distill: float = 0.0
    """Weight of a teacher's outputs in the loss, once masks are frozen (knowledge distillation); 0 is off.
    Methods that never freeze masks learn from it throughout."""
    distill_temperature: float = 4.0
    """Divides the outputs of teacher and network before they are compared."""
    teacher: str | None = None
    """Folder of the finished run that teaches; by default the run's own network, with the weights that it had
    when masks were chosen."""
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """cross_entropy, or bce: each class by itself is there or not (binary cross-entropy, summed over the
    classes)."""
    bce_threshold: float | None = None
    """Count a class as there if its share of a mixed label is above this, else as not there (bce); by default
    the share itself is the target."""
    label_smoothing: float = 0.0
    """Share of each label spread evenly over all classes."""
    mixup: float = 0.0
    """Parameter alpha of mixup's Beta distribution; 0 is off. With cutmix too, batches get one of the two."""
    cutmix: float = 0.0
    """Parameter alpha of CutMix's Beta distribution (a box of another image in each image); 0 is off."""
    mix_probability: float = 1.0
    """Share of the batches that mixup and cutmix are applied to."""
    cutout: int = 0
    """Side of the square that cutout blanks in each training image, in pixels; 0 is off."""
    augment: Literal["auto", "none", "cifar", "cifarnet", "imagenet", "digits"] = "auto"
    """Random changes to training images; auto chooses by the data set. cifarnet: shifts by up to 2 pixels,
    mirrored in every other epoch."""
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Changes of color and shape drawn for each image, after those of augment: randaugment (of one strength)
    or trivialaugment (one change of any strength)."""
    randaugment_operations: int = 2
    """Changes of each image (randaugment)."""
    randaugment_magnitude: float = 9.0
    """Strength, 0 to 10 (randaugment)."""
    randaugment_deviation: float = 0.0
    """Standard deviation of the strength, drawn for each image and change (randaugment)."""
    randaugment_probability: float = 1.0
    """Probability of each of the changes to be made (randaugment)."""
    erasing: float = 0.0
    """Probability that a box of a training image, 2% to 40% of it, is erased; 0 is off."""
    erasing_fill: Literal["random", "mean"] = "random"
    """What erased boxes are filled with: random values or the mean color."""
    augment_repeats: int = 1
    """How often each image of an epoch is in it, augmented differently each time (repeated augmentation); the
    epoch has as many batches as without, of as many fewer images."""
    sync_batch_norm: bool = False
    """Batch norm statistics of the whole batch, whatever number of processes share it; else those of each
    part, of which the first one's are saved."""
    parts: int | None = None
    """Parts of each batch, with batch norm statistics of their own; by default as many as there are processes
    when the run begins. It stays with a run, whatever number of processes goes on with it."""
    exchange: ExchangedGradients = "kept"
    """With several processes: which gradients of weights that are masked and dense travel, those of kept
    weights or all; of packed weights there are no others."""
    exchange_dtype: ExchangedDtype = "fp32"
    """With several processes: what gradients are rounded to while they travel; fp32 rounds nothing."""
    whitening: bool | None = None
    """Make the first convolution whiten patches of the training images, and keep it so; by default only in
    cifarnet, which is made for it."""
    ema_decay: float = 0.0
    """Decay per step of the moving average of the weights, which is then evaluated and saved; 0 is off. It
    begins again when masks are frozen."""
    lookahead: bool = False
    """Every 5 steps the weights go back to slow weights that follow them, ever more slowly (Lookahead); these
    are evaluated and saved, and begin again when masks are frozen."""
    recalibrate_norms: int = 0
    """Training batches over which batch norm statistics are measured again once masks are frozen and, of an
    average of the weights, before it is evaluated and saved; 0 is off."""
    clip_grad_norm: float = 0.0
    """Largest allowed norm of the whole gradient; 0 is off."""
    accumulate: int = 1
    """Batches whose gradients are averaged before each optimizer step."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes cuda, then mps, then cpu."""
    precision: Precision = "fp32"
    """Number format of the forward and backward pass (autocast; weights stay fp32)."""
    channels_last: bool = False
    """Keep images and weights in channels-last memory order."""
    compile: bool = False
    """Compile the network with torch.compile (again once the weights are packed)."""
    cuda_graphs: bool = False
    """Record forward and backward pass as a CUDA graph and replay it (on cuda); record it again whenever
    layers, masks or modes have changed. What cannot be recorded runs as written; a warning says why."""
    packed: bool = True
    """Train on the kept values only after hard pruning, and while masks move, once 60% is zero; otherwise on
    masked dense weights."""
    operators: Literal["measured", "density", "sparse", "reference"] = "measured"
    """How packed layers run (on the CPU): measured: what is fastest, found out once per machine; density:
    sparse where more than 65% is zero; sparse: all that can; reference: the slow one."""
    test_time_augmentation: Views = "none"
    """Average the outputs over views of each image wherever the run is evaluated: flip (the image and its
    mirror image) or shift (also both of the image shifted by a pixel, to two sides)."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; one more is written when the run is interrupted."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep, newest first."""
    threads: int | None = None
    """CPU threads of PyTorch; its own choice by default. Bitwise repeatability needs the same number."""
    deterministic: bool = False
    """Use only deterministic operators: slower on cuda, no effect needed on cpu, where runs repeat anyway."""
    log: tuple[LogName, ...] = ()
    """Where the figures of each epoch go besides the run's own files. To csv (metrics.csv in its folder),
    tensorboard (files in its folder), wandb, mlflow (where these are set up to go); several are possible."""
    tensorboard: bool = False
    """The same as tensorboard among log."""
    seed: int = 0
    """Seed of the initial weights, the order of the images, their augmentation and dropout."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def log_names(self) -> tuple[LogName, ...]:
        """Where figures go, each once."""
        return tuple(dict.fromkeys((*self.log, *(("tensorboard",) if self.tensorboard else ()))))

    @property
    def images_per_step(self) -> int:
        """Images that one optimizer step averages over."""
        return self.batch_size * self.accumulate

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate for the images per step that this run has."""
        if self.learning_rate_batch is None:
            return self.learning_rate
        factor = self.images_per_step / self.learning_rate_batch
        return self.learning_rate * (math.sqrt(factor) if self.learning_rate_scaling == "sqrt" else factor)


def resolve_method(name: str, **settings: Any) -> Method[Any]:
    """The method called ``name`` with its settings; UserError for an unknown name, setting or value."""
    if name not in METHODS:
        raise UserError(f"method is {shown(name)}: use one of {', '.join(METHODS)}")
    return build(METHODS[name], settings)


def from_dict(values: Mapping[str, Any]) -> tuple[RunConfig, Method[Any]]:
    """Split flat settings into those of the run and those of its method, and check both.

    Raises:
        UserError: a setting that neither has (names the nearest), or a value that does not fit.
    """
    for name in values:
        if not isinstance(name, str):
            raise UserError(f"settings need names, {shown(name)} is none")
    run_fields = field_names(RunConfig)
    run = build(RunConfig, {k: v for k, v in values.items() if k in run_fields})
    rest = {k: v for k, v in values.items() if k not in run_fields}
    method_fields = field_names(METHODS[run.method]) if run.method in METHODS else tuple(rest)
    for name in rest.keys() - set(method_fields):
        raise unknown_field(name, run_fields + method_fields)
    return run, resolve_method(run.method, **rest)


def check_said_once(given: Mapping[Any, Any], path: str | Path | None = None) -> None:
    """Raise a UserError where one thing is said twice, as by a sparsity and a compression.

    Args:
        given: settings that somebody wrote down; a run's own config.yaml spells out all of them, defaults
            among them, and may hold both.
        path: of the recipe they are from; None: they are flags.
    """
    method = given.get("method", RunConfig.method)
    known = METHODS.get(method) if isinstance(method, str) else None
    both = said_twice(RunConfig.alternatives + (() if known is None else known.alternatives), given)
    if both is not None:
        first, second = (name if path else f"--{name.replace('_', '-')}" for name in both)
        what = f"{first} {shown(given[both[0]])} and {second} {shown(given[both[1]])}"
        where = "" if path is None else f"{path}: "
        raise UserError(f"{where}{what} are both given, and say the same thing: give one")
    budget = given.get("time_budget")
    if path is None and isinstance(budget, str) and given.get("epochs") is not None:
        raise UserError(  # of a share of the dense run, epochs is that run's length
            f"--epochs {given['epochs']} and --time-budget {budget} both say how long the run is: give one"
        )


def code_settings(values: Mapping[Any, Any]) -> tuple[str, ...]:
    """The settings of a run that may name a user's own code: the model, and the choices of its method."""
    method = values.get("method", RunConfig.method)
    known = METHODS.get(method) if isinstance(method, str) else None
    return ("model", *(() if known is None else choice_fields(known)))


def without_code(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same settings, with names of a user's own code that can be shown but are never imported."""
    return {
        key: FromFile(value) if key in code_settings(values) and is_own(value) else value
        for key, value in values.items()
    }


def load_config(
    path: str | Path, model: str | None = None, own: Mapping[str, str] | None = None
) -> tuple[RunConfig, Method[Any]]:
    """Read a YAML recipe: flat, fields of RunConfig and of the method it names; others keep their defaults.

    Args:
        path: of the file.
        model: the network instead of the one that the file names; one of somebody's own, whose code would
            run, counts only when it is given here.
        own: further settings, as the criterion, that name a user's own code; they count likewise.

    Raises:
        UserError: no such file, not YAML, not a flat mapping, an unknown setting or a wrong value; or the
            file names somebody's own code that is not given here.
    """
    given = {**({} if model is None else {"model": model}), **(own or {})}
    return _checked(read_settings(path), given, path)


def load_run_config(
    folder: RunFolder,
    model: str | None = None,
    own: Mapping[str, str] | None = None,
    *,
    own_model_allowed: bool = False,
) -> tuple[RunConfig, Method[Any]]:
    """The settings that a run was started with.

    Args:
        folder: of the run.
        model, own: as `load_config`; the latter have to be the run's.
        own_model_allowed: return the settings all the same, for a caller who runs none of that code.

    Raises:
        UserError: this is not the folder of a run, its settings are damaged, or a name is missing.
    """
    values = folder.read_settings()
    for name, given in (own or {}).items():
        if given != values.get(name):
            raise UserError(
                f"the run in {folder.path} has {name} {shown(values.get(name))}, not {shown(given)}"
            )
    if own_model_allowed and model is None:
        return _checked(without_code(values), {}, folder.config, trusted=True)
    return _checked(values, {**({} if model is None else {"model": model}), **(own or {})}, folder.config)


def _checked(
    values: Mapping[Any, Any], given: Mapping[str, str], path: str | Path, *, trusted: bool = False
) -> tuple[RunConfig, Method[Any]]:
    """The settings of a file, with what the caller gives on top; ``trusted``: no code of theirs is run."""
    try:
        for name in () if trusted else code_settings({**values, **given}):
            require_named(values.get(name), "it", given.get(name), name)
        return from_dict({**values, **given})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def resume_command(folder: RunFolder, config: RunConfig, method: Method[Any]) -> str:
    """What a user types to go on with a run; code of their own has to be named again."""
    values = config_to_dict(config, method)
    own = [name for name in code_settings(values) if is_own(values[name])]
    flags = [f" --{name.replace('_', '-')} {values[name]}" for name in own]
    return f"clicktrain resume {folder.path}" + "".join(flags)


def read_settings(path: str | Path) -> dict[Any, Any]:
    """The settings in a YAML file as they stand there, not checked; errors for a file that has none.

    The package's own recipes are found wherever the current folder is: `clicktrain.files.find_recipe`.
    """
    try:
        values = read_yaml(find_recipe(path))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: give the path of a YAML file with settings") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings: write one 'setting: value' a line")
    return values


def config_to_dict(run: RunConfig, method: Method[Any]) -> dict[str, Any]:
    """All settings, flat, as plain values, which ``from_dict`` and ``load_config`` read back."""
    return {**to_plain(run), **to_plain(method)}
