"""A figure's file is read without the page: its title, and what colours, markers and styles of lines mean."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from jpo_ray.evaluation.looks import color_of, series_of, style_of
from jpo_ray.evaluation.report import make_report
from jpo_ray.runs import open_run
from tests.evaluation import synthetic_run as synthetic

# The eighth trained model has the first one's colour; one name has no room in its row.
NAMES = ["jpo", "dpo", "third", "fourth", "fifth", "sixth", "seventh", "joint-only-with-a-small-beta"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    with open_run(folder / "run") as run:
        synthetic.put_everything(run, NAMES, tests=3, steps=10)
        make_report(run, synthetic.make_config(NAMES), folder)
    return folder


def texts(path: Path) -> list[str]:
    return ["".join(each.itertext()) for each in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_win_rates_name_models_and_temperatures(report: Path) -> None:
    said = texts(report / "figures" / "win-rates.svg")
    keys = ["temperature 0.001", "temperature 0.5", "temperature 1.0", "mean over temperatures", "as good as gold"]
    for text in ("Win rate per model and temperature", "sft", *NAMES, *keys, "95 % interval"):
        assert text in said, text


def test_curves_name_models_and_what_is_faint_or_dashed(report: Path) -> None:
    measure = texts(report / "figures" / "measure-0.svg")
    for text in ("Loss", *NAMES, "training (averaged)", "validation"):
        assert measure.count(text) == 1, text
    margin = texts(report / "figures" / "margin-7.svg")
    for text in (f"Margin of {NAMES[7]}", "response part", "instruction part", "training (averaged)", "validation"):
        assert margin.count(text) == 1, text
    assert {"training (averaged)", "validation"} <= set(texts(report / "figures" / "sft-loss.svg"))
    band = " ".join(texts(report / "figures" / "similarity.svg"))
    assert "60 joint pairs, strategy similar, band 0.2 to 0.85" in band


def test_the_pages_charts_have_no_second_legend(report: Path) -> None:
    said = re.findall(r"<text[^>]*>([^<]*)</text>", (report / "index.html").read_text())
    assert said.count("fourth") == 1  # the row of its win rates
    assert not {"temperature 0.5", "training (averaged)", "validation", NAMES[7], "Loss"} & set(said)


def test_models_of_one_color_differ_by_their_lines(report: Path) -> None:
    drawn = (report / "figures" / "measure-0.svg").read_text()
    first = re.findall(r'style="fill: none;([^"]*)stroke: #0072b2;([^"]*)"', drawn)
    dashed = ["stroke-dasharray" in "".join(style) for style in first]
    # In the legend, then training and validation: of `jpo` solid, of the eighth model dashed.
    assert sorted(dashed) == [False] * 3 + [True] * 3
    html = (report / "index.html").read_text()
    assert re.search(rf'class="name style-1" style="--c: var\(--series-1\)">{NAMES[7]}<', html)
    assert re.search(r'class="name" style="--c: var\(--series-1\)">jpo<', html)


def test_colors_and_styles_tell_28_models_apart_and_sft_from_all() -> None:
    series = series_of(["a", "sft", *(f"m{number}" for number in range(27))])
    looks = {name: (color_of(number), style_of(number)) for name, number in series.items()}
    assert len(set(looks.values())) == 29
    assert looks["sft"] == (0, 0)
    assert [looks[name] for name in ("a", "m0", "m5", "m6", "m26")] == [(1, 0), (2, 0), (7, 0), (1, 1), (7, 3)]
