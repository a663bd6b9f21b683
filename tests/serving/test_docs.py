"""The programs and commands of docs/serving.md, on a running server."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.endpoint import KEY, Endpoint

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
HERE = "http://127.0.0.1:8000"


def requests() -> list[tuple[str, str, dict[str, str], str | None]]:
    """Method, path, headers and body of every `curl` command of the page."""
    found = []
    lines = iter(PAGE.read_text().splitlines())
    for line in lines:
        if not line.startswith("    curl "):
            continue
        command = line.strip()
        while command.endswith("\\") or command.count("'") % 2:
            command = command.removesuffix("\\") + next(lines).strip()
        words = shlex.split(command)[1:]
        given: dict[str, list[str]] = {"-X": [], "-H": [], "-d": [], "": []}
        while words:
            flag = words.pop(0) if words[0] in given else ""
            given[flag].append(words.pop(0))
        headers = dict(header.replace("$JPO_API_KEYS", KEY).split(": ", 1) for header in given["-H"])
        method = given["-X"][0] if given["-X"] else "POST"
        found.append((method, given[""][0].removeprefix(HERE), headers, given["-d"][0] if given["-d"] else None))
    return found


def test_the_page_has_its_commands() -> None:
    assert [(method, path) for method, path, *_ in requests()] == [
        ("POST", "/v1/score"), ("POST", "/v1/compare"), ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/new"),
    ]  # fmt: skip


@pytest.mark.ray
@pytest.mark.vllm
def test_what_the_page_says_can_be_asked(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(program.replace(HERE, endpoint.url).replace('api_key="none"', f'api_key="{KEY}"'), {})
    models, *answers = capsys.readouterr().out.splitlines()
    assert sorted(ast.literal_eval(models)) == ["dpo.one", "jpo", "sft"]
    assert "".join(answers)
    for method, path, headers, body in requests():
        with httpx.Client(base_url=endpoint.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
            content = body.replace("jpo2", "extra") if body else None  # a folder of the tests' store
            reply = client.request(method, path, headers=headers, content=content)
        assert reply.status_code in (200, 201), (path, reply.text)
        answer: dict[str, Any] = reply.json()
        if path == "/v1/compare":
            assert 0 < answer["data"][0]["probability"] < 1
