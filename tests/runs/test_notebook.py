"""What a notebook shows of plans, outcomes and summaries."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from clicktrain.methods.contract import LayerPlan, PruningPlan
from clicktrain.methods.outcome import Outcome, Target
from clicktrain.runs.summary import RunSummary
from clicktrain.wording import html_table, shape, times


class Cells(HTMLParser):
    """The text of each cell of a page, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_a_table_escapes_what_it_holds() -> None:
    rows = [("<b>", "a&b"), (1, "</td>")]
    assert Cells(html_table(rows)).rows == [["<b>", "a&b"], ["1", "</td>"]]


def test_a_plan() -> None:
    layer = LayerPlan("conv<1>", (8, 3, 3, 3), "weights", 0.25, None, "because")
    plan = PruningPlan((layer,), "sparsity asked 0.75, planned 0.75", (("stage 1", "dense"),))
    rows = Cells(plan._repr_html_()).rows
    assert rows[0] == ["layer", "shape", "what", "density", "per filter", "why"]
    assert rows[1][:4] == ["conv<1>", "8x3x3x3", "weights", "0.250"]
    assert "<b>stage 1</b>: dense" in plan._repr_html_()
    assert plan._repr_html_().endswith("<p>sparsity asked 0.75, planned 0.75</p>")
    assert all(cell in str(plan) for cell in ("conv<1>", "stage 1: dense", "planned 0.75"))


def test_an_outcome() -> None:
    outcome = Outcome((Target("sparsity", 0.8, 0.5, "share", "whole kernels"),))
    assert Cells(outcome._repr_html_()).rows[1] == ["sparsity", "80.0%", "50.0% (missed)", "whole kernels"]
    assert Outcome()._repr_html_() == "<p>nothing was asked for and nothing pruned</p>"


def test_a_summary_is_a_dictionary_that_shows_itself() -> None:
    target = Target("compression of convolution weights", 8.0, 7.0, "times", "kernels are whole")
    layer = {"name": "conv1", "shape": [8, 3, 3, 3], "density": 0.125, "forward_flops": 1e6,
             "forward_flops_dense": 8e6}  # fmt: skip
    values = {
        "method": "rigl", "model": "resnet20", "data": "digits", "val_accuracy": 91.234,
        "best_val_accuracy": 92.0, "compression_ratio": 7.0, "train_flops_ratio": 0.61,
        "inference_flops_ratio": 0.15, "train_seconds": 61.0, "outcome": Outcome((target,)).to_json(),
        "warnings": ["a & b"], "layers": [layer], "parameters": 200_000, "dense_parameters": 300_000,
        "file_bytes": {"model.safetensors": 800_000, "packed.safetensors": 150_000},
    }  # fmt: skip
    summary = RunSummary(values)
    assert summary == values
    assert json.loads(json.dumps(summary)) == json.loads(json.dumps(values))
    shown = summary._repr_html_()
    rows = Cells(shown).rows
    assert rows[0] == ["", "rigl on resnet20 on digits"]
    assert ["accuracy", "91.23% (best 92.00%)"] in rows
    assert ["compression of convolution weights", times(8), times(7), "kernels are whole"] in rows
    assert ["conv1", shape([8, 3, 3, 3]), "12.5%", "1 M", "8 M"] in rows
    assert [row[:3] for row in rows if row[0].endswith(".safetensors")] == [
        ["model.safetensors", "800 kB", "67%"],  # of 800 kB and 100,000 removed parameters
        ["packed.safetensors", "150 kB", "12%"],
    ]
    assert "<p><b>a &amp; b</b></p>" in shown
    assert Cells(RunSummary()._repr_html_()).rows  # a summary of another version is shown as far as it goes
