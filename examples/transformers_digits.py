"""A Transformers Trainer with an image classifier, and the one line that makes it prune.

    python examples/transformers_digits.py

Trains a small ResNet, made from its configuration without a download, on scikit-learn's handwritten digits,
4x compressed at the end, in half a minute on a CPU.
"""

from __future__ import annotations

import sys
import tempfile

import torch
import torch.nn.functional as F
from own_loop import load_images
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import clicktrain
from clicktrain.integrations.transformers import PruningCallback

EPOCHS = 15


def main(epochs: int = EPOCHS) -> nn.Module:
    torch.manual_seed(0)
    x_train, y_train, x_val, y_val = load_images()
    config = ResNetConfig(
        num_channels=1,
        embedding_size=32,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    model = ResNetForImageClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=360,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            dataloader_drop_last=True,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=examples(x_train, y_train),
            eval_dataset=examples(x_val, y_val),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
            callbacks=[PruningCallback(clicktrain.ClickTrain(compression=4))],  # the line
        )
        trainer.train()
        accuracy = 100 * trainer.evaluate()["eval_accuracy"]
    print(f"accuracy {accuracy:.1f}%  compression {clicktrain.compression_ratio(model):.2f}x")
    return model


def examples(x: Tensor, y: Tensor) -> list[dict[str, object]]:
    """What the Trainer collates into batches: images of 16x16 pixels, and labels."""
    images = F.interpolate(x, scale_factor=2)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, y, strict=True)]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
