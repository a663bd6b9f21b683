"""Where the cache is on an object store a judge's answers are too: a lost machine does not take them with it."""

import os
import shutil
import time

import pytest
from s3 import S3

from jpo_ray.cache import cache_folder
from jpo_ray.feedback import answer_log
from jpo_ray.feedback.answer_log import AnswerLog, Reply
from jpo_ray.store import StoreError

KEYS = ("first", "second", "third", "fourth")


def test_another_machine_has_the_answers(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent while they come and at the end; what a killed process had not sent goes there with the next one."""
    monkeypatch.setenv("JPO_CACHE", s3_server.uri())
    monkeypatch.setattr(answer_log, "SEND_EVERY_S", -1.0)
    log = AnswerLog(cache_folder(), {"model": "m"})
    log.append("first", Reply("(a)", 3, 1))
    deadline = time.monotonic() + 30
    while answers_there(monkeypatch) != {"first"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setattr(answer_log, "SEND_EVERY_S", 3600.0)
    log.append("second", Reply("(b)", share_a=0.25))
    log.append("third", Reply("(a)"))
    log.send()
    log.send()
    log.append("fourth", Reply("(b)"))
    assert answers_there(monkeypatch) == {"first", "second", "third"}
    assert AnswerLog(cache_folder(), {"model": "m"}).get("fourth") == Reply("(b)")
    assert answers_there(monkeypatch) == {"first", "second", "third"}  # its process may still write
    for path in cache_folder().glob("answers/*/*.jsonl"):
        os.utime(path, (time.time() - 100, time.time() - 100))
    AnswerLog(cache_folder(), {"model": "m"})
    assert answers_there(monkeypatch) == set(KEYS)
    assert AnswerLog(cache_folder(), {"model": "another"}).get("first") is None


def answers_there(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What a machine without a copy finds."""
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", os.environ["XDG_CACHE_HOME"] + "-there")
        shutil.rmtree(cache_folder(), ignore_errors=True)
        log = AnswerLog(cache_folder(), {"model": "m"})
        return {key for key in KEYS if log.get(key)}


def test_a_store_that_says_no_for_a_while_loses_nothing(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers go on coming; the end of asking says so, and the next sending has all."""
    monkeypatch.setenv("JPO_CACHE", s3_server.uri())
    monkeypatch.setattr(answer_log, "SEND_EVERY_S", -1.0)
    log = AnswerLog(cache_folder(), {"model": "m"})
    s3_server.deny(0)
    try:
        log.append("first", Reply("(a)"))
        log.append("second", Reply("(b)"))
        with pytest.raises(StoreError):
            log.send()
    finally:
        s3_server.deny(float("inf"))
    log.append("third", Reply("(a)"))
    log.send()
    assert answers_there(monkeypatch) == {"first", "second", "third"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg") / "here"))
