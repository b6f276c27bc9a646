"""Pages and pictures: whole without a network, true to the report, safe with any name."""

import itertools
import json
import math
import re
import runpy
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from reports import layer, make_report

from compress.report.card.card import model_card
from compress.report.comparison import Differences, Run, compare_runs
from compress.report.metrics import METRICS, Shown, shown_in
from compress.report.pages import (
    comparison_page,
    run_page,
    write_comparison_pictures,
    write_pictures,
)
from compress.report.pages.charts import (
    bits_figure,
    duration,
    error_figure,
    memory_figure,
    ranks_figure,
)
from compress.report.pages.comparison import recipe_differences
from compress.report.pages.figures import Figure
from compress.report.pages.frames import Frame, Point
from compress.report.pages.headline import headline
from compress.report.pages.labels import LETTER, LINE, RADIUS, placed
from compress.report.pages.making import remarks
from compress.report.pages.marks import marks_of
from compress.report.pages.pareto import front, pareto_pictures
from compress.report.pages.places import NO_BLOCK, Place, bytes_by_part, places_of
from compress.report.pages.spectra import share_at, spectra_figures
from compress.report.pages.theme import PAGE, PICTURE
from compress.report.report import KeptTensor, LayerReport, Report, Spectrum
from compress.sweep.results import best_at, best_table

KL = METRICS["kl"]
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
HOSTILE = "</script><img src=x onerror=alert(1)><!-- \u2028 {{ 7 * 7 }} & 'quoted' \"twice\""


def with_spectrum(block: int, projection: str) -> LayerReport:
    ranks = (1, 2, 4, 8, 16, 32)
    shares = tuple(float(f"{1 / rank**0.7:.4g}") for rank in ranks)
    one = layer(f"model.layers.{block}.{projection}", 0.01 * (block + 1))
    bits = 4.5 + 0.1 * len(projection)
    spectrum = Spectrum(ranks=ranks, shares=shares)
    return replace(one, rank=8, spectrum=spectrum, bits_per_weight=bits)


@pytest.fixture
def report() -> Report:
    layers = [with_spectrum(*each) for each in itertools.product(range(4), PROJECTIONS)]
    memory = {"calibrate": 700_000_000, "compress": 900_000_000}
    return replace(make_report(), layers=tuple(layers), peak_memory=memory)


class Read(HTMLParser):
    """The elements of a page, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002  (the parser hands it over)
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def drawn(page: str) -> list[dict[str, Any]]:
    """The charts of a page."""
    charts: list[dict[str, Any]] = json.loads(Read(page).scripts[0])["specs"]
    return charts


def compared(report: Report) -> list[Run]:
    bare = replace(
        report, scores=None, totals=replace(report.totals, tensor_bytes_after=90_000_000)
    )
    other = replace(bare, recipe=report.recipe | {"seed": 4, "limit": None})
    return [
        Run(label=name, folder=Path(name), report=it) for name, it in (("a", report), ("b", other))
    ]


def test_a_page_refers_to_nothing_outside_it(report: Report) -> None:
    for page in (
        run_page(report),
        comparison_page(compare_runs(compared(report), Differences.TELL)),
    ):
        refers = [
            value
            for _, attributes in Read(page).elements
            for name, value in attributes.items()
            if name in ("src", "href", "srcset", "data", "action")
        ]
        assert refers == ["data:,"]
        assert not re.search(r"@import|url\(", page[: page.index("<body>")])
        assert "default-src 'none'" in page


def test_names_and_notes_may_hold_anything(report: Report) -> None:
    strange = replace(with_spectrum(5, HOSTILE), note=HOSTILE, method=HOSTILE, form=HOSTILE)
    kept = KeptTensor(name=HOSTILE, shape=(3,), reason=HOSTILE, n_bytes=12)
    hostile = replace(
        report,
        layers=(*report.layers, strange),
        kept=(kept,),
        notes=(HOSTILE,),
        recipe=report.recipe | {"model": HOSTILE},
        calibration={HOSTILE: [{HOSTILE: HOSTILE}]},
        timings={HOSTILE: 1.0},
    )
    plain, page = Read(run_page(report)), Read(run_page(hostile))
    assert [page.count(tag) for tag in ("script", "img")] == [plain.count("script"), 0]
    assert page.text.count("<img src=x onerror=alert(1)>") >= 5
    assert "{{ 7 * 7 }}" in page.text
    assert len(drawn(run_page(hostile))) == len(drawn(run_page(report))) + 1


def test_the_headline_has_the_figures_of_the_report(report: Report) -> None:
    text = Read(run_page(report)).text
    for figure in ("101.3 MB", "538.0 MB", "5.31× smaller", "29.10", "27.80", "0.0600", "94.0 %"):
        assert figure in text
    assert "−5.0 points" in text and "offline_piqa" in text
    assert "python-docs" in text and "32,768" in text
    assert "statistics of an equal run were used again" in text
    assert "upon a" in text and "there was" in text


def test_a_page_without_an_evaluation_says_so_and_leaves_out_what_was_not_measured(
    report: Report,
) -> None:
    text = Read(run_page(replace(report, scores=None))).text
    assert "was not evaluated" in text
    assert not any(word in text for word in ("Perplexity", "KL divergence", "Tasks", "tokens/s"))


def test_a_chart_without_data_is_a_sentence(report: Report) -> None:
    bare = replace(
        report,
        scores=None,
        timings={},
        peak_memory={},
        layers=tuple(
            replace(
                it, relative_error=None, spectrum=None, rank=None, bits_per_weight=4.0, form="x"
            )
            for it in report.layers
        ),
    )
    page = run_page(bare)
    assert len(drawn(page)) == 1
    text = Read(page).text
    for sentence in (
        "No layer's error was measured.",
        "Every layer takes 4.00 bits per weight.",
        "No layer has a low-rank part.",
        "No spectra: no layer has a low-rank part",
        "No stage was timed.",
        "The report has no memory figures",
    ):
        assert sentence in text


def test_every_chart_has_one_place_on_the_page(report: Report) -> None:
    page = run_page(report)
    places = [
        attributes["data-chart"]
        for _, attributes in Read(page).elements
        if "data-chart" in attributes
    ]
    assert places == [str(number) for number in range(len(drawn(page)))]
    # errors, bits, three spectra, bytes, time, memory, the tasks' differences
    assert len(places) == 9


def test_a_page_is_small_enough_to_send(report: Report) -> None:
    layers = [with_spectrum(*each) for each in itertools.product(range(80), PROJECTIONS)]
    assert len(run_page(replace(report, layers=tuple(layers))).encode()) < 1_500_000


def test_the_heat_map_has_a_cell_for_every_layer(report: Report) -> None:
    chart = error_figure(report, PAGE).chart
    assert chart is not None
    cells = chart.to_dict()["data"]["values"]
    assert {(it["block"], it["projection"], it["value"]) for it in cells} == {
        (str(block), projection.partition(".")[2], 0.01 * (block + 1))
        for block, projection in itertools.product(range(4), PROJECTIONS)
    }


def bits_of(report: Report) -> Figure:
    return bits_figure(report.bits_by_layer(), PAGE)


def test_layers_that_are_all_alike_are_told_in_a_sentence(report: Report) -> None:
    assert ranks_figure(report, PAGE).told == "Every low-rank part has rank 8."
    assert bits_of(report).chart is not None
    same = replace(report, layers=tuple(replace(it, bits_per_weight=3.0) for it in report.layers))
    assert bits_of(same).chart is None
    assert memory_figure(report, PAGE).chart is not None


def test_a_layer_is_named_by_block_and_the_shortest_ending_that_tells_it_apart() -> None:
    places = places_of(
        [
            "encoder.layer.0.attention.output.dense",
            "encoder.layer.0.output.dense",
            "encoder.layer.11.attention.self.query",
            "pooler.dense",
        ]
    )
    assert list(places.values()) == [
        Place("0", "attention.output.dense"),
        Place("0", "output.dense"),
        Place("11", "query"),
        Place(NO_BLOCK, "pooler.dense"),
    ]


def test_experts_of_one_kind_are_one_projection_apart_from_dense_and_shared_layers() -> None:
    parts = ("experts.0.up_proj", "experts.1.up_proj", "shared_experts.up_proj", "up_proj")
    names = [f"model.layers.1.mlp.{part}" for part in parts]
    assert [place.projection for place in places_of(names).values()] == [
        "experts.up_proj",
        "experts.up_proj",
        "shared_experts.up_proj",
        "mlp.up_proj",
    ]
    alone = places_of(names[:2])
    assert {place.projection for place in alone.values()} == {"experts.up_proj"}


def test_every_byte_is_in_one_part(report: Report) -> None:
    kept = {"model.embed_tokens.weight": 10, "lm_head.weight": 20, "model.norm.weight": 1}
    kept |= {"model.layers.0.self_attn.q_proj.bias": 2, "odd": 5}
    tensors = [
        KeptTensor(name=name, shape=(1,), reason="outside", n_bytes=size)
        for name, size in kept.items()
    ]
    parts = bytes_by_part(replace(report, kept=tuple(tensors)))
    assert parts[:3] == [(name, 4 * 8192, 4 * 2000) for name in ("q_proj", "o_proj", "down_proj")]
    assert parts[3:] == [
        ("head", 20, 20),
        ("embeddings", 10, 10),
        ("kept: outside", 5, 5),
        ("biases", 2, 2),
        ("norms", 1, 1),
    ]


def test_equal_notes_are_told_once_with_their_layers(report: Report) -> None:
    noted = replace(report, layers=tuple(replace(it, note="dead") for it in report.layers))
    found = remarks(noted)
    assert [it.text for it in found] == [*report.notes, "dead"]
    assert len(found[-1].layers) == len(report.layers)
    assert found[-1].where.endswith(f"and {len(report.layers) - 3} more")


def test_between_two_points_a_spectrum_is_straight_on_logarithmic_scales() -> None:
    spectrum = Spectrum(ranks=(1, 10, 100), shares=(1.0, 0.1, 0.0))
    assert share_at(spectrum, 10**0.5) == pytest.approx(10**-0.5)
    assert [share_at(spectrum, rank) for rank in (1, 10, 100)] == [1.0, 0.1, 0.0]


def test_cuts_at_different_ranks_are_points_on_the_lines(report: Report) -> None:
    first, *rest = report.layers
    _, figures = spectra_figures(replace(report, layers=(replace(first, rank=16), *rest)), PAGE)
    marks = [
        [part["mark"]["type"] for part in figure.chart.to_dict()["layer"]]
        for figure in figures
        if figure.chart is not None
    ]
    assert marks == [["line", "point"], ["line", "rule"], ["line", "rule"]]
    assert [figure.told for figure in figures] == ["ranks 8 to 16 of 32"] + ["rank 8 of 32"] * 2


@pytest.mark.parametrize(("key", "sign"), [("kl", 1), ("perplexity", 1), ("accuracy", -1)])
def test_the_front_is_what_no_other_beats(key: str, sign: int) -> None:
    points = [
        Point(n, str(n), "m", float(7 * n % 11), float(5 * n % 13), None) for n in range(1, 11)
    ]
    beaten = {
        one.number
        for one, other in itertools.permutations(points, 2)
        if other.megabytes <= one.megabytes
        and sign * other.value <= sign * one.value
        and (other.megabytes, other.value) != (one.megabytes, one.value)
    }
    found = front(points, METRICS[key])
    assert {it.number for it in found} == {it.number for it in points} - beaten
    assert [it.megabytes for it in found] == sorted(it.megabytes for it in found)


def test_names_lie_on_no_other_name_where_there_is_room() -> None:
    points = [(100.0 + 40 * (n % 4), 60.0 + 45 * (n // 4)) for n in range(12)]
    names = [f"run-{n}" for n in range(12)]
    found = placed(points, names, (640, 400))
    labels = found.labels
    assert found.covered == 0
    boxes = []
    for (x, y), name, label in zip(points, names, labels, strict=True):
        width = LETTER * len(name)
        left = x + label.dx - {"left": 0, "right": width, "center": width / 2}[label.align]
        boxes.append((left, y + label.dy - LINE / 2, left + width, y + label.dy + LINE / 2))
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert all(abs(label.dx) > 0 or abs(label.dy) > RADIUS for label in labels)


def test_a_comparison_has_gaps_for_what_was_not_measured(report: Report) -> None:
    text = Read(comparison_page(compare_runs(compared(report), Differences.REFUSE))).text
    assert "2 b eora on gptq 90.0 MB 7.80 - - - - - - -" in text
    assert "1 of 2 runs do not have this metric: 2." in text


def test_the_best_at_each_size_is_a_table_of_a_sweeps_page(report: Report) -> None:
    comparison = compare_runs(compared(report), Differences.REFUSE)
    budgets = ["200MB", "95MB", "1MB"]
    table = best_table(best_at(budgets, comparison.figures, KL), comparison, KL)
    text = Read(comparison_page(comparison, table)).text
    none = "none that was evaluated fits; the smallest of all is b, 90.0 MB - -"
    assert "at most no. run size KL 200MB 1 a 101.3 MB 0.0600 ± 0.0010" in text
    assert f"95MB {none} 1MB {none}" in text
    assert best_table([], comparison, KL) is None
    assert "Best at each size" not in Read(comparison_page(comparison)).text


def test_methods_are_told_apart_by_colour_and_by_shape() -> None:
    marks = list(marks_of([f"method {n}" for n in range(56)], PAGE).values())
    assert len({(mark.color, mark.shape) for mark in marks}) == 56
    assert len({mark.color for mark in marks[:7]}) == len({mark.shape for mark in marks[:7]}) == 7


def many(report: Report, n_runs: int) -> list[Run]:
    """Runs of three methods on a lattice of four by five."""
    assert report.scores is not None and report.scores.after.fidelity is not None
    fidelity, found = report.scores.after.fidelity, []
    for n in range(n_runs):
        after = replace(report.scores.after, fidelity=replace(fidelity, kl=0.05 + 0.01 * (n % 4)))
        size = replace(report.totals, tensor_bytes_after=100_000_000 + 400_000 * (n % 5))
        recipe = report.recipe | {"method": {"name": f"method{n % 3}"}}
        scores = replace(report.scores, after=after)
        label = f"eora, base.bits {n}, method.rank 64"
        one = replace(report, recipe=recipe, scores=scores, totals=size)
        found.append(Run(label=label, folder=Path(label), report=one))
    return found


def run_away(runs: list[Run], perplexity: float) -> list[Run]:
    """The last of the runs has lost all it knew."""
    *others, last = runs
    scores = last.report.scores
    assert scores is not None and scores.after.fidelity is not None
    fidelity = replace(scores.after.fidelity, perplexity=perplexity, perplexity_stderr=None)
    worse = replace(scores, after=replace(scores.after, fidelity=fidelity))
    return [*others, replace(last, report=replace(last.report, scores=worse))]


def test_a_run_that_ran_away_is_told_and_squeezes_no_plot(report: Report) -> None:
    comparison = compare_runs(run_away(many(report, 5), 2.5e8), Differences.REFUSE)
    page = comparison_page(comparison)
    assert "Too far above to be drawn: 5 (2.50e+08)." in Read(page).text
    assert "do not have this metric" not in Read(page).text
    values = [
        [
            row["value"]
            for layer in chart["layer"]
            for row in layer.get("data", {}).get("values", ())
        ]
        for chart in drawn(page)[:3]
    ]
    assert [max(shown, default=0) < 1e6 for shown in values] == [True] * 3
    pictures = pareto_pictures(comparison, PICTURE, (640, 400))
    assert "(2.50e+08)" in json.dumps(pictures["pareto-perplexity"].to_dict())
    assert "Too far" not in json.dumps(pictures["pareto-kl"].to_dict())


def test_divergences_of_every_size_are_drawn() -> None:
    """That of a model in 16 bits is a hundred-thousandth of one in 2 bits, and both are what a plot is for."""
    points = [Point(n, str(n), "m", 1.0 + n, value, None) for n, value in enumerate((5e-5, 14.0))]
    ticks = Frame.around(points, None, KL).y("value", "").to_dict()["axis"]["values"]
    assert ticks == [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
    assert [it.key for it in METRICS.values() if math.isfinite(it.far)] == ["perplexity"]


@pytest.mark.parametrize(("low", "high", "last"), [(0.02, 7.0, 5.0), (12.0, 9e6, 1e7)])
def test_a_wide_plot_has_ticks_up_to_its_end(low: float, high: float, last: float) -> None:
    points = [Point(n, str(n), "m", 1.0 + n, value, None) for n, value in enumerate((low, high))]
    axis = Frame.around(points, None, KL).y("value", "").to_dict()["axis"]
    assert axis["values"][-1] == last
    assert axis["values"] == sorted(set(axis["values"]))


def test_the_page_tells_how_sure_a_change_of_the_perplexity_is(report: Report) -> None:
    (found,) = [it for it in headline(report) if it.label == "Perplexity"]
    assert (found.value, found.was) == ("29.10", "27.80")
    assert found.change == "×1.047 (1.046 to 1.047)"


def test_a_mark_in_the_table_is_that_of_the_plots(report: Report) -> None:
    page = comparison_page(compare_runs(many(report, 5), Differences.REFUSE))
    scales = [
        layer["encoding"]["shape"]["scale"]
        for layer in drawn(page)[0]["layer"]
        if "shape" in layer["encoding"]
    ]
    assert [scale["domain"] for scale in scales] == [["method0", "method1", "method2"]]
    paths = [attributes["d"] for name, attributes in Read(page).elements if name == "path"]
    rows = [paths[n % 3] for n in range(5)]
    assert paths == [*rows, *scales[0]["range"]]
    assert scales[0]["range"] == paths[:3]


def test_a_picture_without_room_for_names_has_numbers_and_a_key(report: Report) -> None:
    few, crowded = (
        pareto_pictures(compare_runs(many(report, n), Differences.REFUSE), PICTURE, (640, 400))
        for n in (2, 20)
    )
    plain, keyed = few["pareto-kl"].to_dict(), crowded["pareto-kl"].to_dict()
    assert "vconcat" not in plain
    texts = [it["encoding"]["text"]["field"] for it in plain["layer"] if "text" in it["encoding"]]
    assert set(texts) == {"label"}
    plot, key = keyed["vconcat"]
    texts = [it["encoding"]["text"]["field"] for it in plot["layer"] if "text" in it["encoding"]]
    assert set(texts) == {"number"}
    assert all(run.label in json.dumps(key) for run in many(report, 20))


def test_numbers_lie_on_no_words_that_are_there_already() -> None:
    words = (110.0, 90.0, 300.0, 110.0)
    (label,) = placed([(100.0, 100.0)], ["12"], (300, 200), [words]).labels
    assert (label.dx, label.align) == (-RADIUS - 3, "right")


def test_a_comparison_tells_only_the_options_that_differ(report: Report) -> None:
    found = recipe_differences(compare_runs(compared(report), Differences.REFUSE))
    assert [label for label, _ in found] == ["a", "b"]
    assert [dict(options) for _, options in found] == [
        {"seed": "3", "limit": "40"},
        {"seed": "4", "limit": "none"},
    ]


def test_pictures_are_drawn_of_what_there_is(report: Report, tmp_path: Path) -> None:
    written = write_pictures(report, tmp_path)
    assert [path.name for path in written] == [
        f"{name}.{kind}" for name in ("bytes", "errors", "spectra") for kind in ("svg", "png")
    ]
    for path in written:
        if path.suffix == ".svg":
            assert ElementTree.fromstring(path.read_text(encoding="utf-8")).tag.endswith("svg")
        else:
            width, height = struct.unpack(">II", path.read_bytes()[16:24])
            assert width > 1000 and height > 100
    bare = replace(report, layers=(layer("odd", None),))
    assert [path.stem for path in write_pictures(bare, tmp_path / "bare")] == ["bytes", "bytes"]


def test_the_card_shows_the_pictures_that_are_drawn(report: Report, tmp_path: Path) -> None:
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", model_card(report))
    assert len(shown) == 3
    write_pictures(report, tmp_path)
    assert all((tmp_path / path).is_file() for path in shown)


def test_a_comparison_has_a_picture_for_each_measure(report: Report, tmp_path: Path) -> None:
    comparison = compare_runs(compared(report), Differences.REFUSE)
    written = write_comparison_pictures(comparison, tmp_path)
    assert {path.stem for path in written} == {f"pareto-{it.key}" for it in shown_in(Shown.PARETO)}
    unmeasured = compare_runs(compared(report)[1:], Differences.REFUSE)
    assert write_comparison_pictures(unmeasured, tmp_path) == []


def test_the_readmes_pictures_are_drawn_of_a_finished_sweep(
    report: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    points = []
    for run, state in zip(many(report, 3), ("done", "failed", "done"), strict=True):
        name = run.label.partition(" ")[2]
        points.append({"name": name, "where": "", "state": state, "error": ""})
        if state == "done":
            (tmp_path / "sweep" / name).mkdir(parents=True)
            (tmp_path / "sweep" / name / "report.json").write_text(run.report.to_json())
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"schema": 1, "points": points}))
    script = str(Path(__file__).parent.parent / "scripts" / "readme_pictures")
    out = tmp_path / "pictures"
    monkeypatch.setattr("sys.argv", [script, str(tmp_path / "sweep"), "--out", str(out)])
    runpy.run_path(script, run_name="__main__")
    names = {"bytes", "errors", "spectra", *(f"pareto-{it.key}" for it in shown_in(Shown.PARETO))}
    assert {path.name for path in out.iterdir()} == {f"{name}.svg" for name in names}
    assert len(capsys.readouterr().out.splitlines()) == len(names)
    for path in out.iterdir():
        assert 'fill="#ffffff"' in path.read_text(encoding="utf-8")  # so that it reads in the dark
    monkeypatch.setattr("sys.argv", [script, str(tmp_path / "sweep"), "--show", "nix"])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert "--show: nix is none of base.bits 0, method.rank 64, base" in capsys.readouterr().err


def test_durations_are_written_for_people() -> None:
    times = (0.0, 0.02, 3.21, 250.0, 7300.0)
    assert [duration(it) for it in times] == [
        "0.0 s",
        "under 0.1 s",
        "3.2 s",
        "4 min 10 s",
        "2 h 1 min",
    ]
