"""The page: well formed, self-contained, escaped, in the order that a reader wants."""
import html.parser
import re

import pandas as pd
import pytest

from kdp_core.base.measurements import Answers
from kdp_core.figures import similarity, style
from kdp_core.results import report, report_models
from kdp_core.results.summary import fits, summarise, tidy
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
    style.save(similarity.similarity_maps(points.similarity()), folder / "similarity", dpi=40)
    entries = [report_models.FigureEntry("Similarity <1>", "Maps of \"states\".", "similarity_maps",
                                  folder / "similarity.png", "figures/a b/similarity", "tiny"),
               report_models.FigureEntry("All", "Of all models.", "overview", folder / "similarity.png")]
    benchmarks = pd.DataFrame({"rule": ["kernel", "kernel", "hidden"], "s": [2.0, "4.0", 5.5],
                               "max_rss": ["-", 900, "NA"]})
    return report.build(summary=summarise(grid), scores=tidy(grid), figures=entries,
                        fits=fits([({"method": "kdp"}, points.kernel())]),
                        config_yaml="methods: {kdp: <script>alert(1)</script>}\nsource: https://example.org\n",
                        versions={"torch": "2.13"}, seeds={"seed": 7}, benchmarks=benchmarks)


def test_well_formed_and_self_contained(page):
    parser = parsed(page)
    files = [value for value in parser.loads if not value.startswith(("#", "data:image/png;base64,"))]
    # beside the page, by relative path
    assert files == ["figures/a%20b/similarity.pdf", "figures/a%20b/similarity.csv"]
    assert not re.search(r"@import|url\(", page)
    assert not {"link", "iframe", "object", "embed"} & set(parser.seen)
    assert parser.seen.count("img") == 2 and parser.seen.count("script") == 1
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
    made = [report.build(summary=summarise(grid), scores=tidy(grid)) for _ in range(2)]
    assert made[0] == made[1]
    assert "Figures" not in made[0] and "Run times" not in made[0]


def test_refusals(tmp_path):
    grid = points.grid()
    summary, scores = summarise(grid), tidy(grid)
    with pytest.raises(report_models.ReportError, match=r"'Norms' has no file norms\.png; run rule norms first"):
        absent = report_models.FigureEntry("Norms", "", "norms", tmp_path / "norms.png")
        report.build(summary=summary, scores=scores, figures=[absent])
    with pytest.raises(report_models.ReportError, match="no rows"):
        report.build(summary=summary.iloc[:0], scores=scores)
    with pytest.raises(report_models.ReportError, match="columns job; give the columns rule and s"):
        report.build(summary=summary, scores=scores, benchmarks=pd.DataFrame({"job": []}))


def test_the_lead_and_the_order_of_sections(page):
    words = "".join(parsed(page).words)
    assert words.index("kdp removed 38") < words.index("In short")
    assert ("This run pruned tiny by kdp, remove, lossy and <b>&odd at targets of 20 and 40 % of the parameters, which "
            "gave 7 pruned models. All jobs together took 12 s.") in words
    assert re.findall(r"<h2>(.+?)</h2>", page) == ["In short", "Summary", "Overview", "tiny", "Tasks", "Configuration",
                                                   "Versions and seeds", "Run times"]
    of_model = page[page.index('<section id="model1">'):]
    assert re.findall(r"<h3>(.+?)</h3>", of_model) == ["Scores by task", "Costs and blocks", "Fits", "Figures"]
    assert "Similarity &lt;1&gt;" in of_model and "Of all models." not in of_model


def test_the_first_screen_has_the_picture_and_what_the_models_write(tmp_path):
    grid = points.grid()
    style.save(similarity.similarity_maps(points.similarity()), tmp_path / report.FIRST, dpi=40)
    entries = [report_models.FigureEntry("Size", "Of all.", "all", tmp_path / f"{report.FIRST}.png")]
    said = Answers(["Once", "Twice"], 8, [{"name": "dense", "texts": [" upon a time", " told"]},
                                          {"name": "kdp", "texts": [" <b>upon</b>", " sold"]}])
    made = report.build(summary=summarise(grid), scores=tidy(grid), figures=entries, answers={"tiny": said})
    first, words = made[:made.index("<main>")], "".join(parsed(made).words)
    assert first.count("<img") == made.count("<img") == 1 and "<h4>" not in first
    assert "dense" in first and "<b>Once</b> upon a time" in first and "&lt;b&gt;upon&lt;/b&gt;" in first
    assert first.index("upon a time") < first.index("<details>") < first.index("<b>Twice</b> sold")
    assert "most likely tokens, at most 8" in words and "Overview" not in made
    plain = report.build(summary=summarise(grid), scores=tidy(grid))
    assert 'class="first"' not in plain


def test_figures_say_what_they_are_and_how_large(page):
    assert re.search(r'alt="Similarity &lt;1&gt;: described below" width="\d{3,}" height="\d{2,}" src="data:', page)
    assert "Maps of &quot;states&quot;. Made by rule <code>similarity_maps</code>." in page


def test_scores_of_each_task_and_costs_of_each_model():
    grid = points.grid()
    words = parsed(report.build(summary=summarise(grid), scores=tidy(grid))).words
    scores = words[words.index("Scores by task"):words.index("Costs and blocks")]
    # kdp at 20 %: continuation acc and acc_norm, lastword acc and perplexity, text perplexity, with their errors
    at = scores.index("kdp")
    assert [word.strip() for word in scores[at - 1:at + 11]] == ["20", "kdp", "11.0", "± 1.0", "65.0", "± 1.0", "45.0",
                                                                 "± 1.0", "44.00", "± 5.00", "25.00", "± 0.25"]
    costs = words[words.index("Costs and blocks"):]
    at = costs.index("kdp")
    assert costs[at:at + 9] == ["kdp", "19.0", "4", "81.0", "10.37", "81.0", "8.1", "500", "12"]
    assert "Set to zero (%)" not in words


def test_kinds_of_models_stand_apart():
    def kinds(grid):
        made = report.build(summary=summarise(grid), scores=tidy(grid))
        summary = made[made.index('id="summary"'):made.index('id="model1"')]
        return re.findall(r'scope="rowgroup" colspan="\d+"><span>(.+?)</span>', summary)

    zeroed = points.pruned("wanda", points.scores(30.0, 0.4, 0.6), share=0.0)
    zeroed = zeroed._replace(facts=zeroed.facts._replace(params_zeroed=10**7))
    tuned = points.pruned("tuned", points.scores(24.0, 0.55, 0.65))._replace(finetuned=True)
    assert kinds(points.grid()) == []
    assert kinds([*points.grid(), tuned, zeroed]) == list(report_models.GROUPS.values())


def test_a_summary_of_its_own_where_there_are_several_models():
    grid = [*points.grid(), points.dense("small"), points.pruned("kdp", points.scores(25.0, 0.45, 0.65), model="small")]
    page = report.build(summary=summarise(grid), scores=tidy(grid))
    small = page[page.index("<h2>small</h2>"):page.index("<h2>tiny</h2>")]
    assert "Summary of small" in small and "lossy" not in small and "lossy" in page


def test_paired_tests_are_told_and_listed():
    grid = points.grid()
    tested = {"model": "tiny", "calib": "news", "method": "kdp", "ratio": 0.4, "k_max": 3, "other": "remove",
              "other_calib": "news", "other_k_max": 3, "against": "best", "metric": "acc", "task": "all",
              "difference": 0.0025, "stderr": 0.0005, "p": 1e-6, "p_holm": 4e-6, "items": 960}
    comparisons = pd.DataFrame([tested, tested | {"task": "lastword"}])
    with_tests, without = (report.build(summary=summarise(grid), scores=tidy(grid), comparisons=given)
                           for given in (comparisons, None))
    assert "paired test on the same 960 items, p &lt; 0.001" in with_tests and "1 test, item by item" in with_tests
    assert report.PAIRED_RULE in parsed(with_tests).words and report.UNPAIRED_RULE in parsed(without).words
    assert "Paired comparisons" not in without and "on the same" not in without.split("What the words mean")[0]


def test_the_dense_model_alone():
    grid = [points.dense()]
    words = parsed(report.build(summary=summarise(grid), scores=tidy(grid))).words
    assert "tiny: only the dense model was evaluated; nothing is pruned yet." in words
