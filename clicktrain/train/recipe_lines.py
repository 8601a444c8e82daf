"""What a run does to its images, what it is trained on and how, in a few lines."""

from __future__ import annotations

from clicktrain.train.augmentation import augmentation
from clicktrain.train.loss import mixing_of
from clicktrain.train.prepare import Prepared


def recipe_lines(prepared: Prepared) -> list[str]:
    """Images, loss and optimizer of a run, a line each, for a plan that is printed."""
    config = prepared.config
    images = augmentation(config, prepared.data).describe()
    if config.augment_repeats > 1:
        images += f"; each of them {config.augment_repeats} times in an epoch"
    if mixing := mixing_of(config):
        images += f"; then {mixing.describe()}"
    return [f"training images: {images}", f"loss: {_loss(prepared)}", f"optimizer: {_optimizer(prepared)}"]


def _loss(prepared: Prepared) -> str:
    config = prepared.config
    parts = [{"cross_entropy": "cross-entropy", "bce": "binary cross-entropy of each class"}[config.loss]]
    if config.bce_threshold is not None:
        parts.append(f"classes of more than {100 * config.bce_threshold:g}% of a label count in full")
    if config.label_smoothing:
        parts.append(f"label smoothing {config.label_smoothing:g}")
    if config.distill:
        parts.append(f"{100 * config.distill:g}% from a teacher")
    return ", ".join(parts)


def _optimizer(prepared: Prepared) -> str:
    config = prepared.config
    parts = [config.optimizer, f"learning rate {config.peak_learning_rate:g} ({config.schedule})"]
    if config.weight_decay:
        where = "" if config.decay_norm_and_bias else ", not of norms and biases"
        parts.append(f"weight decay {config.weight_decay:g}{where}")
    factors = [group.get("rate_factor", 1.0) for group in prepared.optimizer.param_groups]
    if min(factors) != max(factors):
        number = len(set(factors))
        parts.append(f"{number} rates by layer, from x{min(factors):.3g} to x{max(factors):.3g}")
    averages = {f"average of the weights (decay {config.ema_decay:g})": config.ema_decay}
    averages["lookahead"] = config.lookahead
    return ", ".join([*parts, *(words for words, on in averages.items() if on)])
