"""The page: the verdict first, everything in one file, written as a whole or not at all."""

import os
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from latentlab.report import (
    Page,
    Section,
    figure_svg,
    plot_intervals,
    plot_khat,
    plot_losses,
    plot_mixture,
    plot_predictive,
    render,
    write,
)

VOID = {"meta", "br", "hr", "img", "link"}
HOSTILE = "<script>alert(1)</script>"


class Reader(HTMLParser):
    """Reads a page and fails where a tag is not closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], Counter(), [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self._see(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._see(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "body" in self.open and data.strip():
            self.text.append(data.strip())

    def _see(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "src", "aria-labelledby"):
                self.links.append((name, value))
            else:
                self.links += [("href", link) for link in re.findall(r"url\(([^)]*)\)", value)]


def page(level="use with care", name="length", **changes):
    """A page with every kind of picture and table on it."""
    r = np.random.default_rng(0)
    x, x_new = r.normal(size=(40, 2)), r.normal(size=(5, 40, 2))
    weights, locs = r.dirichlet([9.0, 9.0], 20), r.normal(size=(20, 2, 2))
    names = (name, "mass")
    intervals = plot_intervals([name], [1.0], [0.5], [1.5])
    table = pd.DataFrame({"site": ["locs", name], "mean": [1234567.0, np.nan], "draws": [3, 4]})
    sections = (
        Section("Data", "As drawn.", (plot_mixture(x, weights, locs, locs**2, names).figure,)),
        Section("Numbers", figures=(intervals.figure, intervals.figure), table=table, note=name),
        Section("Climb", figures=(plot_losses(np.arange(9.0), (0, 4), stop_reason=name).figure,)),
        Section("Trust", figures=(plot_khat([name], [0.2], [0.1]).figure,)),
        Section("Check", figures=(plot_predictive(x, x_new, names),)),
    )
    said = {
        "title": f"a mixture of {name}",
        "level": level,
        "headline": "the best optimum was found twice",
        "reasons": (f"k-hat of {name} is 0.6 ± 0.1",),
        "next_steps": ("try a richer guide",),
        "facts": {"columns": name, "seed": "0"},
        "sections": sections,
    }
    return Page(**said | changes)


def test_the_page_is_whole_and_every_link_stays_on_it():
    text = render(page())
    reader = Reader(text)
    assert text.startswith('<!doctype html>\n<html lang="en">')
    assert reader.tags["svg"] == 6
    assert len(reader.links) > 50
    for name, link in reader.links:
        target = link if name == "aria-labelledby" else link.removeprefix("#")
        assert name == "aria-labelledby" or link.startswith("#")
        assert target in reader.ids
    without_namespaces = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//\w|@import|<link|<script", without_namespaces)


def test_ids_are_unique_even_for_a_figure_shown_twice():
    ids = Reader(render(page())).ids
    assert len(ids) > 20
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("level", ["use", "use with care", "do not use"])
def test_the_verdict_stands_before_everything_else(level):
    sign, verdict, *rest = Reader(render(page(level))).text
    assert (len(sign), verdict) == (1, level)
    order = ["a mixture of length", "Why", "What to try next", "Data", "How it went"]
    assert [rest.index(part) for part in order] == sorted(rest.index(part) for part in order)


def test_levels_differ_in_word_sign_and_class():
    pages = [render(page(level, sections=())) for level in ("use", "use with care", "do not use")]
    signs = {Reader(text).text[0] for text in pages}
    looks = {re.search(r'<header class="verdict (\w+)"', text)[1] for text in pages}
    assert len(signs) == len(looks) == 3


def test_an_unknown_level_is_named():
    with pytest.raises(ValueError, match="level: expected one of \"use\".*got 'fine'"):
        render(page("fine"))


def test_hostile_names_are_text():
    reader = Reader(render(page(name=HOSTILE)))
    assert reader.tags["script"] == 0
    assert HOSTILE in reader.text
    text = render(page(name='"><img src=x onerror=alert(1)>', facts={HOSTILE: "{{ 7 * 7 }}"}))
    assert Reader(text).tags["img"] == 0
    assert "{{ 7 * 7 }}" in text


def test_the_same_page_gives_the_same_bytes(tmp_path):
    shown = page()
    first = write(shown, tmp_path / "a.html").read_bytes()
    assert write(shown, tmp_path / "b.html").read_bytes() == first
    assert write(page(), tmp_path / "c.html").read_bytes() == first


def test_a_page_with_nothing_but_a_verdict():
    reader = Reader(render(Page("a mixture", "use", "")))
    assert reader.text == ["✓", "use", "a mixture"]


def test_numbers_have_four_digits_and_stand_to_the_right():
    index = pd.Index(["a", "b", "c"], name="cell")
    table = pd.DataFrame(
        {
            "mean": np.array([0.5, 12345.6, 2e-7], "float32"),
            "said": ["0.31 ± 0.06", None, "12 %"],
            "count": [1, 20, 3],
            "text": ["3 rows", "2", "<b>"],
        },
        index=index,
    )
    text = render(page(sections=(Section("t", table=table),)))
    cells = [re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", row) for row in text.split("<tr>")[1:]]
    assert cells == [
        ["cell", "mean", "said", "count", "text"],
        ["a", "0.5000", "0.31 ± 0.06", "1", "3 rows"],
        ["b", "1.235e+04", "–", "20", "2"],
        ["c", "2.000e-07", "12 %", "3", "&lt;b&gt;"],
    ]
    assert text.count('<td class="number">') == 9
    assert re.findall(r'<th scope="col" class="number">(\w+)', text) == ["mean", "said", "count"]


def test_an_empty_table_keeps_its_heads():
    text = render(page(sections=(Section("t", table=pd.DataFrame({"a": [], "b": []})),)))
    assert Reader(text).tags["th"] == 2


def test_figures_take_their_ink_from_the_page():
    text = render(page())
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "#5f6672" not in drawn
    assert "#000000" not in drawn
    assert drawn.count("currentColor") > 50
    assert "font-family" not in drawn
    assert "<style" not in drawn
    assert drawn.count('role="img"') == drawn.count("aria-label=") == 6
    assert ">length</text>" in drawn


def test_a_plain_figure_of_matplotlib_follows_the_theme_too():
    figure = Figure()
    figure.subplots().plot([1, 2], [3, 4], color="black")
    svg = figure_svg(figure, "a line")
    assert 'aria-label="a line"' in svg
    assert "#000000" not in svg
    assert re.search(r'<svg [^>]*viewBox="0 0 460.8 345.6"[^>]* fill="currentColor"', svg)


def test_names_that_a_caller_gave_to_lines_do_not_become_ids():
    figure = Figure()
    figure.subplots().plot([1, 2], [[3, 4], [5, 6]], gid="section-1")
    assert "section-1" not in figure_svg(figure)


def test_an_svg_text_is_taken_in_and_another_text_refused():
    svg = '<svg viewBox="0 0 9 9"><g id="a"><use href="#a"/></g></svg>'
    assert '<g id="p-a"><use href="#p-a" /></g>' in figure_svg(svg, "own", prefix="p-")
    for wrong in ("<svg></svg>", "no svg", '<svg viewBox="0 0 9 9">'):
        with pytest.raises(ValueError, match="figure: expected a figure, or the text of an SVG"):
            figure_svg(wrong)


def test_a_folder_gets_report_html(tmp_path):
    assert write(page(sections=()), tmp_path) == tmp_path / "report.html"
    assert write(page(sections=()), str(tmp_path / "own.html")) == tmp_path / "own.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own.html", "report.html"]


def test_a_page_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    file = write(page(sections=()), tmp_path)
    old = file.read_bytes()
    with pytest.raises(ValueError, match="figure"):
        write(page(sections=(Section("broken", figures=("no svg",)),)), file)

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError, match=r"report\.html: cannot be written \(Permission d"):
        write(page("use"), file)
    assert file.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; create it first"):
        write(page(sections=()), tmp_path / "nowhere" / "a.html")


def test_half_a_character_in_a_name_does_not_stop_the_page(tmp_path):
    figure = plot_khat(["caf\udce9"], [0.2], [0.1]).figure
    shown = page(title="caf\udce9", sections=(Section("caf\udce9", figures=(figure,)),))
    file = write(shown, tmp_path)
    assert "caf" in file.read_text(encoding="utf-8")
