"""A finished run, read back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from short_runs import DENSE, FIVE_STAGES, At, Killed, kill, run
from tiny_networks import tiny

from clicktrain.errors import UserError
from clicktrain.train import load_run
from clicktrain.train.evaluate import evaluate
from clicktrain.train.prepare import make_eval_loader, open_run_data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    run(path, FIVE_STAGES)
    return path


def test_the_network_reaches_what_the_summary_says(finished: Path) -> None:
    loaded = load_run(finished, model=tiny)
    data = open_run_data(loaded.config)
    loader = make_eval_loader(loaded.config, data, "val", torch.device("cpu"))
    result = evaluate(loaded.model, loader, device=torch.device("cpu"))
    assert result is not None
    assert result.accuracy == pytest.approx(loaded.summary["val_accuracy"])
    assert result.images == len(data.val)
    assert loaded.image_shape == data.image_shape
    assert loaded.facts["classes"] == list(data.classes)


def test_masks_are_those_of_the_pruned_layers(finished: Path) -> None:
    loaded = load_run(finished, model=tiny)
    assert set(loaded.masks) == {"3", "7"}
    for name, mask in loaded.masks.items():
        weight = loaded.model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        assert bool((weight[~mask] == 0).all())
        kept = mask.flatten(1).sum(1)
        row = next(row for row in loaded.summary["layers"] if row["name"] == name)
        assert kept.tolist() == [row["nnz_per_filter"]] * len(kept)
        assert row["density"] == pytest.approx(mask.float().mean().item())


def test_an_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", DENSE, At(2, kill))
    with pytest.raises(UserError, match="is not finished: continue it with 'clicktrain resume"):
        load_run(tmp_path / "run")


def test_weights_that_are_damaged_or_missing(tmp_path: Path) -> None:
    run(tmp_path / "run", {**DENSE, "epochs": 1})
    model = tmp_path / "run" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"model.safetensors is missing or damaged"):
        load_run(tmp_path / "run", model=tiny)
    model.unlink()
    (tmp_path / "run" / "packed.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors is missing or damaged"):
        load_run(tmp_path / "run", model=tiny)


def test_packed_weights_alone_are_enough(finished: Path, tmp_path: Path) -> None:
    both = load_run(finished, model=tiny)
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    alone = load_run(tmp_path / "run", model=tiny)
    assert list(alone.masks) == list(both.masks)
    state = alone.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in both.model.state_dict().items())


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        load_run(tmp_path)
