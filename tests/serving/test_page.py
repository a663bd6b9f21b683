"""The page: two models chosen, one instruction typed, both answers streamed side by side."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.endpoint import BEARER, KEY, Endpoint

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.browser]

WATCH = """() => {
  const answer = document.querySelector("#answer-b");
  window.lengths = [];
  new MutationObserver(() => window.lengths.push(answer.textContent.length))
    .observe(answer, {childList: true, characterData: true, subtree: true});
}"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("JPO_PICTURES") or tmp_path_factory.getbasetemp() / "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def expect() -> Any:
    return pytest.importorskip("playwright.sync_api").expect


@pytest.fixture
def page(browser: Any, endpoint: Endpoint) -> Iterator[Any]:
    context = browser.new_context(http_credentials={"username": "any", "password": KEY})
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.goto(endpoint.url)
    yield opened
    context.close()
    assert [text for text in complaints if "404" not in text] == []


def whole_answer(endpoint: Endpoint, model: str, instruction: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": instruction}], "temperature": 0, "max_tokens": 24}
    reply = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, headers=BEARER, timeout=60)
    return str(reply.json()["choices"][0]["message"]["content"])


def test_both_answers_stream_side_by_side(page: Any, endpoint: Endpoint, expect: Any, pictures: Path) -> None:
    instruction = "List four fruits other than apple."
    expect(page.locator("#model-a option")).to_have_count(3)
    assert [page.locator(f"#model-{side}").input_value() for side in "ab"] == ["sft", "dpo.one"]
    page.select_option("#model-b", "jpo")
    page.fill("#instruction", instruction)
    page.fill("#tokens", "24")
    page.evaluate(WATCH)
    page.keyboard.press("Control+Enter")
    for side in "ab":
        expect(page.locator(f"#facts-{side}")).to_contain_text("all after", timeout=30_000)
    for side, model in (("a", "sft"), ("b", "jpo")):
        assert page.locator(f"#answer-{side}").text_content() == whole_answer(endpoint, model, instruction)
    assert len(set(page.evaluate("window.lengths"))) >= 3  # it grew under the reader's eyes
    left, right = (page.locator(f"#answer-{side}").bounding_box() for side in "ab")
    assert left["x"] + left["width"] <= right["x"]
    assert left["y"] == right["y"]
    answers = [
        {"instruction": instruction, "response": page.locator(f"#answer-{side}").text_content()} for side in "ab"
    ]
    body = {"model": "jpo", "pairs": [{"a": answers[0], "b": answers[1]}]}
    reply = httpx.post(f"{endpoint.url}/v1/compare", json=body, headers=BEARER, timeout=60).json()
    sft = reply["data"][0]["probability"]
    verdict = f"jpo prefers the answer of {'sft' if sft >= 0.5 else 'jpo'} ({round(100 * max(sft, 1 - sft))} %)"
    expect(page.locator("#verdict")).to_contain_text(verdict, timeout=30_000)
    page.screenshot(path=str(pictures / "serve.png"))


def test_what_goes_wrong_is_said(page: Any, expect: Any) -> None:
    expect(page.locator("#model-a option")).to_have_count(3)
    page.fill("#instruction", "Name a fruit.")
    page.fill("#tokens", "60")
    page.locator("#model-a").evaluate("select => select.add(new Option('gone', 'gone'))")
    page.select_option("#model-a", "gone")
    page.click("#send")
    expect(page.locator("#answer-a.failed")).to_contain_text("there is no model `gone`", timeout=30_000)
    expect(page.locator("#facts-b")).to_contain_text("all after", timeout=30_000)


def test_without_the_key_there_is_no_page(browser: Any, endpoint: Endpoint) -> None:
    context = browser.new_context()
    assert context.request.get(endpoint.url).status == 401
    context.close()
