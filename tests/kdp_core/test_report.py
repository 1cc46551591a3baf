"""The page: well formed, self-contained, escaped, and honest in words."""
import html.parser
import re

import pandas as pd
import pytest

from kdp_core import figures, report, tables
from tests.kdp_core import points

VOID = {"meta", "img", "br", "link", "input"}


class Parser(html.parser.HTMLParser):
    """Keeps text and attributes and refuses tags that do not pair."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.words, self.loads = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def parsed(page):
    parser = Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    grid = [*points.grid(), points.pruned("<b>&odd", points.scores(30.0, 0.4, 0.6))]
    folder = tmp_path_factory.mktemp("figures")
    figures.save(figures.similarity_maps(points.similarity()), folder / "similarity", dpi=40)
    entries = [report.FigureEntry("Similarity <1>", "Maps of \"states\".", "similarity_maps",
                                  folder / "similarity.png")]
    benchmarks = pd.DataFrame({"rule": ["kernel", "kernel", "hidden"], "s": [2.0, "4.0", 5.5],
                               "max_rss": ["-", 900, "NA"]})
    return report.build(summary=tables.summarise(grid), scores=tables.tidy(grid), figures=entries,
                        fits=tables.fits([({"method": "kdp"}, points.kernel())]),
                        config_yaml="methods: {kdp: <script>alert(1)</script>}\nsource: https://example.org\n",
                        versions={"torch": "2.13"}, seeds={"seed": 7}, benchmarks=benchmarks)


def test_well_formed_and_self_contained(page):
    parser = parsed(page)
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in parser.loads)
    assert not re.search(r"@import|url\(", page)
    assert not {"link", "iframe", "object", "embed"} & set(parser.seen)
    assert parser.seen.count("img") == 1 and parser.seen.count("script") == 1
    anchors = [value[1:] for value in parser.loads if value.startswith("#")]
    assert anchors == re.findall(r'<section id="(\w+)">', page)


def test_all_text_escaped(page):
    words = "".join(parsed(page).words)
    assert "<b>&odd" in words and "Similarity <1>" in words and "alert(1)" in words
    assert "<script>alert" not in page and "<b>&odd" not in page


def test_every_method_and_number_of_the_table_is_there(page):
    words = parsed(page).words
    for text in ("dense", "kdp", "remove", "lossy", "55.0", "5-8 8-11", "2-5 5-8", "0.875"):
        assert text in words, text
    # two jobs of rule kernel, 6 s in all, 4 s the longest, 900 MB the one that was sampled
    assert words[words.index("kernel", words.index("Longest job (s)")):][:5] == ["kernel", "2", "6.0", "4.0", "900"]


def test_equal_arguments_give_equal_bytes():
    grid = points.grid()
    made = [report.build(summary=tables.summarise(grid), scores=tables.tidy(grid)) for _ in range(2)]
    assert made[0] == made[1]
    assert "Figures" not in made[0] and "Run times" not in made[0]


def test_refusals(tmp_path):
    grid = points.grid()
    summary, tidy = tables.summarise(grid), tables.tidy(grid)
    with pytest.raises(report.ReportError, match=r"'Norms' has no file norms\.png; run rule norms first"):
        absent = report.FigureEntry("Norms", "", "norms", tmp_path / "norms.png")
        report.build(summary=summary, scores=tidy, figures=[absent])
    with pytest.raises(report.ReportError, match="no rows"):
        report.build(summary=summary.iloc[:0], scores=tidy)
    with pytest.raises(report.ReportError, match="columns rule and s"):
        report.build(summary=summary, scores=tidy, benchmarks=pd.DataFrame({"job": []}))


def test_words_for_a_clear_win_a_tie_and_a_loss():
    found = {finding.subject: finding.sentences for finding in report.headline(tables.summarise(points.grid()))}
    assert found["tiny, dense"] == ["60.0 ± 0.7 % mean accuracy and 20.00 ± 0.20 perplexity."]
    # 15 points apart, sqrt(2) * 0.7071 = 1.0 points combined
    assert found["tiny, target 20 %"] == [
        "kdp kept the most accuracy (55.0 ± 0.7 %, 91.7 % of dense), 15.0 points ahead of remove (40.0 ± 0.7 %): "
        "15.0 combined standard errors, a clear difference.",
        "kdp had the lowest perplexity (25.00 ± 0.25, 1.25 times dense), 15.00 ahead of remove (40.00 ± 0.40): "
        "31.8 combined standard errors, a clear difference.",
        "Less accurate than “remove”, which deletes layers and puts nothing in their place: lossy.",
        "Really removed: 19.0 to 21.0 % of the parameters."]
    tie = found["tiny, target 40 %"]
    assert tie[0] == ("No winner in accuracy: kdp reads best (40.0 ± 0.7 %, 66.7 % of dense), with remove within one "
                      "combined standard error of it.")
    assert "Not told apart from “remove” in accuracy: kdp." in tie


def test_words_between_one_and_two_errors_and_without_errors():
    def sentence(acc, stderr):
        grid = [points.dense(), points.pruned("a", points.scores(30.0, acc, 0.6, stderr=stderr)),
                points.pruned("b", points.scores(30.0, 0.4, 0.6, stderr=stderr))]
        return report.headline(tables.summarise(grid))[1].sentences[0]
    # half of 0.03 = 1.5 points apart, 1.0 combined
    assert sentence(0.43, 0.01).endswith("1.5 combined standard errors, suggestive, not clear.")
    assert sentence(0.43, None).endswith("standard errors are not known.")
    assert sentence(0.4, None).startswith("No winner in accuracy")


def test_one_method_alone():
    grid = [points.dense(), points.pruned("kdp", points.scores(30.0, 0.4, 0.6))]
    assert report.headline(tables.summarise(grid))[1].sentences[0] == (
        "kdp alone was scored for accuracy: 50.0 ± 0.7 %, 83.3 % of dense.")
