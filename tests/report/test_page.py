"""The page as a document: self-contained, escaped, captioned; the same figures and numbers in files beside it."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from headgate.errors import ConfigError
from headgate.experiments.report import write_figures, write_report
from headgate.experiments.report.content import Figure, Table
from headgate.experiments.report.page import Written, build
from headgate.experiments.report.reading import read_study
from headgate.experiments.report.sections import SECTIONS

from .conftest import SKILL, STEPS, make_comparison

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Document(HTMLParser):
    """Elements in order, with attributes and text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in dict.fromkeys(self.open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(written: Written) -> Document:
    return Document(written.page.read_text())


def test_the_page_needs_nothing_but_itself(page: Document) -> None:
    assert not page.all("script") and not page.all("link") and not page.all("img")
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), f"{name}={target} is outside the page"
        assert "url(http" not in (attributes.get("style") or "")
    assert "@import" not in page.texts["style"][0] and "url(" not in page.texts["style"][0]


def test_every_id_is_unique_and_every_reference_resolves(page: Document) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a.get("xlink:href") or "" for _, a in page.elements]
    wanted = {link[1:] for link in links if link.startswith("#")}
    wanted |= {a["aria-labelledby"] for _, a in page.elements if a.get("aria-labelledby")}
    assert wanted <= set(ids)


def test_the_order_is_verdict_table_figures_methods_record(page: Document) -> None:
    text = "".join(page.texts["body"])
    found = [
        text.index(word)
        for word in ("schema_bank helps", "Arms", "Seed by seed", "Learning", "Pareto frontier")
    ]
    assert found == sorted(found)
    sections = [a["id"] for a in page.all("section")]
    assert (
        sections[:6] == ["arms", "paired", "curves", "pareto", "cost", "flips"] and sections[-1] == "record"
    )
    assert sections[6:-1] == ["backward_gate", "layer_routing", "schema_bank"]


def test_every_figure_says_n_and_seeds_and_every_drawing_has_words(page: Document) -> None:
    for caption in page.texts["figcaption"]:
        assert "n = 3 seeds (1, 2, 3)" in caption, caption
    drawings = [a for a in page.all("div") if a.get("role") == "img"]
    assert len(drawings) >= 20 and all(len(a["aria-label"] or "") > 20 for a in drawings)


def test_every_panel_is_a_png_and_an_svg_file(written: Written) -> None:
    for path in written.figures:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
            assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len({path.stem for path in written.figures}) * 2 == len(written.figures), "a key was used twice"


def test_names_and_outputs_are_text_never_markup(tmp_path: Path) -> None:
    odd = "<script>alert('$x_1$')</script>"
    arms = {"lora": {}, odd: {"lora": {"r": 4}}}
    page = Document(write_report(make_comparison(tmp_path, [1, 2, 3], arms=arms)).page.read_text())
    assert not page.all("script") and not page.all("b"), "an item's <b> came through"
    assert odd in page.texts["h1"][0] + "".join(page.texts["table"])


def test_the_tables_hold_every_run_and_every_log(written: Written, compared: Path) -> None:
    runs, logs = (list(csv.DictReader(path.open())) for path in written.tables)
    study = read_study(compared)
    assert len(runs) == sum(len(arm.runs) for arm in study.arms)
    for row in runs:
        assert study.metric is not None
        assert float(row["metric"]) == study.arm(row["arm"]).values(study.metric)[int(row["seed"])]
    assert {int(row["step"]) for row in logs} == set(STEPS)


def test_the_markdown_names_figures_that_exist(written: Written) -> None:
    lines = written.markdown.read_text().splitlines()
    named = [line[line.rindex("](") + 2 : -1] for line in lines if line.startswith("![")]
    assert named and all((written.markdown.parent / name).exists() for name in named)
    table = [line for line in lines if line.startswith("|")]
    assert table[1].startswith("|---") and {line.count("|") for line in table[:7]} == {table[0].count("|")}


@pytest.mark.parametrize("method", sorted(SECTIONS.names()))
def test_the_figures_of_a_method_alone(compared: Path, method: str) -> None:
    if method not in SKILL:
        with pytest.raises(ConfigError, match=f"no run in .* used {method}"):
            write_figures(compared, method)
        return
    keys = {path.stem for path in write_figures(compared, method)}
    assert {
        "backward_gate": "gate_acceptance",
        "layer_routing": "routing_blocks_3",
        "schema_bank": "schema_load_4",
    }[method] in keys


def test_layer_routing_draws_the_figures_of_its_seed(compared: Path) -> None:
    """The ten of the seed, inference speed-up from a saved benchmark among them."""
    bench = {
        "name": "routing",
        "hardware": {"processor": "a CPU"},
        "ratios": {"prefill/batch 25% realised speed-up": 1.2},
        "ideal": {"prefill/batch 25% ideal speed-up": 1.3},
    }
    (compared / "routing.json").write_text(json.dumps(bench))
    keys = {path.stem for path in write_figures(compared, "layer_routing")}
    for name in (
        "convergence",
        "final_loss",
        "training_loss",
        "final_training_loss",
        "speed_up",
        "head_to_head",
    ):
        assert f"routing_{name}" in keys
    assert {"pareto_depth", "routing_temperature", "routing_loss_parts_0", "routing_blocks_3"} <= keys
    (compared / "routing.json").unlink()


def test_a_method_that_has_logged_nothing_draws_nothing(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path, [1, 2, 3])
    for file in folder.parent.glob("*/metrics.jsonl"):
        file.write_text("")
    sections = {section.key: section for section in build(read_study(folder))}
    assert "curves" not in sections and not sections["schema_bank"].figures
    with pytest.raises(ConfigError, match="logged nothing yet"):
        write_figures(folder, "schema_bank")


def test_an_unknown_method_is_refused_by_name(compared: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'layer_rooting': did you mean 'layer_routing'\? installed are .*schema_bank"
    ):
        write_figures(compared, "layer_rooting")


def test_an_unfinished_comparison_has_a_page_without_a_verdict(tmp_path: Path) -> None:
    arms = {"lora": {}, "other": {"lora": {"r": 4}}}
    text = write_report(make_comparison(tmp_path, [1, 2, 3], arms=arms, finish=False)).page.read_text()
    assert "Unfinished: 2 complete runs" in text and "Missing: lora, seed 2" in text
    assert 'class="verdicts"' not in text


def test_a_stream_has_its_matrix_and_the_experts_their_reasons(tmp_path: Path) -> None:
    arms = {"lora": {}, "experts": {"methods": {"lora_experts": {}}}}
    study = read_study(make_comparison(tmp_path, [1, 2, 3], arms=arms))
    sections = {section.key: section for section in build(study)}
    table, figure = sections["continual"].blocks
    assert isinstance(table, Table) and isinstance(figure, Figure)
    by_column = dict(zip(table.columns, table.rows[0], strict=True))
    # farm: 1.8 after its own segment, 1.6 at the end; shop: 1.6 after farm, 1.5 before the stream; + 0.1 x seed
    assert by_column["backward transfer (higher is better)"] == "0.2000 ± 0.0000"
    assert by_column["forward transfer (higher is better)"] == "−0.1000 ± 0.0000"
    assert by_column["average (lower is better)"] == "1.7500 ± 0.0500"
    assert "after farm: 1.80, 1.80; after shop: 1.60, 1.90" in figure.panels[0].alt
    keys = {panel.key for panel in sections["lora_experts"].figures[0].panels}
    assert keys == {"experts_count", "experts_entropy", "experts_usage_0", "experts_maturity_0"}
    decisions = sections["lora_experts"].blocks[-1]
    assert isinstance(decisions, Table)
    assert list(decisions.rows[0]) == ["experts", "1", "10", "farm", "novel", "0.250", "0.600"]
