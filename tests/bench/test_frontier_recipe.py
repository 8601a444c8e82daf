"""Recipes: what they become, and one sentence for each that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from clicktrain.bench.frontier.lines import add_line, head, is_of, read_lines
from clicktrain.bench.frontier.recipe import parse_recipe, read_recipe
from clicktrain.bench.frontier.runs import jobs_of
from clicktrain.cli import main
from clicktrain.errors import UserError

GOOD: dict[str, Any] = {
    "family": "tiny",
    "base": {"model": "resnet20", "data": "digits", "batch_size": 64},
    "seeds": [0, 1],
    "dense": {"widths": [0.25, 0.5], "epochs": [2, 4]},
    "pruned": [
        {"method": "clicktrain", "setting": "cut", "width": 0.5, "epochs": 4, "settings": {"compression": 4}},
        {"method": "gmp", "epochs": 4, "seeds": [1], "after": "dense-w0.5-e4"},
    ],
}


def test_a_recipe_becomes_cells() -> None:
    recipe = parse_recipe(GOOD, "ignored")
    assert recipe.family == "tiny"
    assert [cell.name for cell in recipe.cells] == [
        "dense-w0.25-e2", "dense-w0.25-e4", "dense-w0.5-e2", "dense-w0.5-e4", "cut-w0.5-e4", "gmp-w1-e4",
    ]  # fmt: skip
    config, method = recipe.cell("cut-w0.5-e4").config(1)
    assert (config.width, config.epochs, config.seed, config.threads, config.batch_size) == (0.5, 4, 1, 1, 64)
    assert method.compression == 4
    assert recipe.cell("gmp-w1-e4").config(1, "runs/x")[0].initial_weights == "runs/x"


def test_names_choose_cells_and_seeds() -> None:
    recipe = parse_recipe(GOOD, "")
    assert [c.name for c in recipe.only(["dense-w0.5-*"])] == ["dense-w0.5-e2", "dense-w0.5-e4"]
    (one,) = recipe.only(["cut*/seed-1"])
    assert one.seeds == (1,)
    with pytest.raises(UserError, match="no run is called 'cut-w2'"):
        recipe.only(["dense*", "cut-w2"])


def test_first_seeds_come_first_and_what_starts_from_another_last() -> None:
    recipe = parse_recipe(GOOD, "")
    names = [job.name for job in jobs_of(recipe.cells, {})]
    assert names[:5] == [f"{cell.name}/seed-0" for cell in recipe.cells[:5]]
    assert names[-1] == "gmp-w1-e4/seed-1"
    assert len(names) == 11


def test_a_line_counts_while_the_cell_has_its_settings(tmp_path: Path) -> None:
    recipe, path = parse_recipe(GOOD, ""), tmp_path / "new" / "results.jsonl"
    cell = recipe.cell("cut-w0.5-e4")
    add_line(path, {**head(cell, 0), "status": "failed", "reason": "x"})
    lines = read_lines(path)
    assert is_of(lines["cut-w0.5-e4", 0], cell)
    assert [job.seed for job in jobs_of([cell], lines)] == [1]
    GROUP = {**GOOD["pruned"][0], "settings": {"compression": 5}}
    other = parse_recipe({**GOOD, "pruned": [GROUP]}, "").cell("cut-w0.5-e4")
    assert [job.seed for job in jobs_of([other], lines)] == [0, 1]
    path.write_text('{"name": "a"}\n')
    with pytest.raises(UserError, match="is damaged"):
        read_lines(path)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"dens": {}}, "a recipe has no key 'dens'"),
    ({"dense": None, "pruned": None}, "nothing to train"),
    ({"dense": {"width": 1, "widths": [1]}}, "dense has width and widths"),
    ({"dense": {"widths": []}}, "widths is empty"),
    ({"dense": {"widths": [0.5, 0.5]}}, "a value is there twice"),
    ({"dense": {"widths": ["wide"]}}, "widths is 'wide': a number is needed"),
    ({"dense": {"epochs": 2.5}}, "epochs is 2.5"),
    ({"dense": {"method": "rigl"}}, "write it under 'pruned'"),
    ({"dense": {"layers": 3}}, "'dense' has no key 'layers'"),
    ({"dense": 3}, "a mapping is needed"),
    ({"pruned": [{"epochs": 3}]}, "name one that prunes"),
    ({"pruned": [{"method": "dense"}]}, "name one that prunes"),
    ({"pruned": [{"method": "clicktrian"}]}, "use one of dense, clicktrain"),
    ({"pruned": [{"method": "rigl", "setting": "a/b"}]}, "setting is 'a/b'"),
    ({"pruned": [{"method": "rigl", "settings": {"compresion": 4}}]}, "unknown setting 'compresion'"),
    ({"pruned": [{"method": "rigl", "settings": {"width": 4}}]}, "write it as widths beside them"),
    ({"pruned": [{"method": "rigl", "settings": [1]}]}, "settings are needed"),
    ({"pruned": [{"method": "rigl"}, {"method": "rigl"}]}, "two cells are called rigl-w1-e60"),
    ({"pruned": [{"method": "gmp", "after": "nobody"}]}, "name a cell that starts fresh"),
    ({"pruned": [{"method": "gmp", "seeds": [7], "after": "dense-w0.5-e4"}]}, "which has no seed 7"),
    ({"base": {"model": "resnet20", "width": 2}}, "base has width"),
    ({"base": {"model": "mine.nets:make"}}, "no code of one's own"),
    ({"base": {"model": "prunetrain", "dynamic_batch": True}}, "times of steps need one batch size"),
    ({"base": {"initial_weights": "runs/a"}}, "name the cell that it starts from by 'after'"),
    ({"base": {"test_time_augmentation": "flip"}}, "not be that of the prediction that is timed"),
    ({"base": {"batch_size": 0}}, "batch_size is 0: must be at least 1"),
    ({"seeds": [-1]}, "seed is -1"),
    ({"seeds": "all"}, "seeds is 'all'"),
    ({"engines": ["fp64"]}, "engines is 'fp64'"),
    ({"family": "a b"}, "family is 'a b'"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_a_wrong_recipe_is_one_sentence(
    change: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **change}))
    assert main(["frontier", str(path), "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"clicktrain: error: {path}: ")
    assert sentence in error
    assert not (tmp_path / "runs").exists()


def test_recipes_of_the_repository_are_good(repository: Path) -> None:
    """A frontier has 5 dense widths and 3 lengths; what compares settings has a dense network of its time."""
    recipes = sorted((repository / "recipes").glob("frontier-*.yaml"))
    assert recipes
    for path in recipes:
        cells = read_recipe(path).cells
        dense = [cell for cell in cells if cell.kind == "dense"]
        one_time = path.stem.endswith(("-equal-time", "-trials", "-length"))
        assert len({cell.width for cell in dense}) >= (1 if one_time else 5)
        assert len({cell.epochs for cell in dense}) >= (1 if one_time else 3)
