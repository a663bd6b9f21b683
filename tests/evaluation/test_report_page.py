"""The report in a real browser."""

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jpo_ray.evaluation.report import make_report
from jpo_ray.runs import open_run
from tests.evaluation import synthetic_run as synthetic
from tests.evaluation.test_report import put_attack

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

LONG_NAME = "joint-only-" + "x" * 53


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    names = ["jpo", "dpo", LONG_NAME]
    with open_run(folder / "run") as run:
        synthetic.put_everything(run, names, tests=12)
        make_report(run, synthetic.make_config(names), folder)
    return folder / "index.html"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked")
    with open_run(folder / "run") as run:
        make_report(run, put_attack(run), folder)
    return folder / "index.html"


def opened(browser: "Browser", path: Path, width: int = 1400, **options: Any) -> tuple["Page", list[str]]:
    """The page, and a list that collects its errors and every request but that for itself."""
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: problems.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    return page, problems


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_no_error_no_request_no_overflow(browser: "Browser", report: Path, width: int, scheme: str) -> None:
    page, problems = opened(browser, report, width, color_scheme=scheme)
    assert problems == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_text_of_figure_files_neither_overlaps_nor_is_cut(browser: "Browser", report: Path) -> None:
    page = browser.new_page()
    boxes_of_text = """() => [...document.querySelectorAll("text")].map(element => {
        const {left, top, right, bottom} = element.getBoundingClientRect();
        return [element.textContent, left, top, right, bottom];
    })"""
    for path in sorted((report.parent / "figures").iterdir()):
        page.goto(path.as_uri())
        width, height = page.evaluate("['width', 'height'].map(name => +document.documentElement.getAttribute(name))")
        boxes = page.evaluate(boxes_of_text)
        assert len(boxes) > 5, path
        for text, left, top, right, bottom in boxes:
            assert 0 <= left < right <= width, (path.name, text)
            assert 0 <= top < bottom <= height + 1, (path.name, text)
        for (text, left, top, right, bottom), (other, *box) in combinations(boxes, 2):
            apart = right <= box[0] or box[2] <= left or bottom <= box[1] + 2 or box[3] <= top + 2
            assert apart, (path.name, text, other)
    page.close()


def test_colors_follow_the_scheme(browser: "Browser", report: Path) -> None:
    colors = []
    for scheme in ("light", "dark"):
        page, _ = opened(browser, report, color_scheme=scheme)
        colors.append(page.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
        page.close()
    assert colors[0] != colors[1]


def test_filter_and_temperature(browser: "Browser", report: Path) -> None:
    page, problems = opened(browser, report)
    shown, answers = page.locator(".sample-card:visible"), page.locator(".answers > div:visible")
    assert (shown.count(), answers.count()) == (12, 12 * 4)
    assert page.locator("#shown").inner_text() == "12 of 12 shown"
    page.fill("#filter", "OTHER THAN PEAR")  # instructions 61 and 71 of the synthetic run
    assert shown.count() == 2
    assert page.locator("#shown").inner_text() == "2 of 12 shown"
    page.fill("#filter", "no such text")
    assert shown.count() == 0
    page.fill("#filter", "")
    page.select_option("#temperature", "")
    assert answers.count() == 12 * 4 * 3
    page.select_option("#temperature", "1.0")
    assert answers.count() == 12 * 4
    assert set(page.locator(".answers > div:visible .tag > span:nth-child(2)").all_inner_texts()) == {"1.0"}
    assert problems == []
    page.close()


def test_differences_are_marked_on_both_sides(browser: "Browser", report: Path) -> None:
    page, problems = opened(browser, report)
    card = page.locator(".sample-card").first
    page.select_option("#models", "jpo")
    page.select_option("#base", "sft")
    assert page.locator(".answers > div:visible").count() == 12 * 2
    texts = [synthetic.texts(60, model, 0.001) for model in ("sft", "jpo")]
    for model, text, other in zip(("sft", "jpo"), texts, reversed(texts), strict=True):
        answer = card.locator(f".answers > div:visible[data-model={model}] .text")
        assert answer.evaluate("element => element.textContent") == text
        marked = answer.locator("mark").all_inner_texts()
        assert bool(marked) == (text != other)
        assert all(mark in text for mark in marked)
    page.select_option("#base", "")
    assert page.locator("mark").count() == 0
    page.select_option("#models", "")
    page.select_option("#base", "\t")  # gold
    assert page.locator(".answers mark").count() > 0
    assert page.locator(".gold mark").count() == 0
    assert problems == []
    page.close()


def test_filtering_compares_no_texts_again(browser: "Browser", report: Path) -> None:
    page, problems = opened(browser, report)
    page.evaluate("""() => {
        const own = common;
        window.compared_texts = 0;
        window.common = (...texts) => (window.compared_texts++, own(...texts));
    }""")
    page.select_option("#models", "jpo")
    page.select_option("#base", "sft")
    assert page.evaluate("compared_texts") == 12 * 2
    marked = page.locator(".answers").first.inner_html()
    for text in ("xyzzy", "f", "", "fo", ""):
        page.fill("#filter", text)
    assert page.evaluate("compared_texts") == 12 * 2
    assert page.locator(".answers").first.inner_html() == marked
    page.select_option("#base", "dpo")
    assert page.evaluate("compared_texts") > 12 * 2
    assert problems == []
    page.close()


def test_what_is_common_is_not_marked(browser: "Browser", report: Path) -> None:
    page, _ = opened(browser, report)
    compare = """([text, other]) => {
        const element = document.createElement("div");
        element.textContent = text;
        mark(element, other, false);
        return element.innerHTML;
    }"""
    found = page.evaluate(compare, ["fig,  plum and <b>pear</b>.", "plum, fig and pear."])
    assert found == "<mark>fig,</mark>  plum and <mark>&lt;b&gt;</mark>pear<mark>&lt;/b&gt;</mark>."
    assert page.evaluate(compare, ["", "plum"]) == ""
    assert page.evaluate(compare, ["same\n", "same\n"]) == "same\n"
    page.close()


@pytest.mark.parametrize("width", [390, 1400])
def test_hostile_texts_do_nothing(browser: "Browser", attacked: Path, width: int) -> None:
    page, problems = opened(browser, attacked, width)
    page.select_option("#temperature", "")
    assert problems == []
    assert page.locator("img").count() == 0
    assert "<script>alert('x')</script>" in page.locator(".sample-card").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
