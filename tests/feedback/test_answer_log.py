"""Where the cache is on an object store a judge's answers are too: a lost machine does not take them with it."""

import shutil

import pytest
from s3 import S3

from jpo_ray.cache import cache_folder
from jpo_ray.feedback import answer_log
from jpo_ray.feedback.answer_log import AnswerLog, Reply


def test_another_machine_has_the_answers(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent while they come and at the end, each once; what was not sent yet is on this machine alone."""
    monkeypatch.setenv("JPO_CACHE", s3_server.uri())
    monkeypatch.setattr(answer_log, "SEND_EVERY_S", -1.0)
    log = AnswerLog(cache_folder(), {"model": "m"})
    log.append("first", Reply("(a)", 3, 1))
    monkeypatch.setattr(answer_log, "SEND_EVERY_S", 3600.0)
    log.append("second", Reply("(b)", share_a=0.25))
    log.append("third", Reply("(a)"))
    log.send()
    log.send()
    log.append("fourth", Reply("(b)"))
    here = AnswerLog(cache_folder(), {"model": "m"})
    assert here.get("fourth") == Reply("(b)")

    shutil.rmtree(cache_folder())
    there = AnswerLog(cache_folder(), {"model": "m"})
    assert [there.get(key) for key in ("first", "second", "third", "fourth")] == [
        Reply("(a)", 3, 1), Reply("(b)", share_a=0.25), Reply("(a)"), None
    ]  # fmt: skip
    files = sorted(path.name for path in cache_folder().glob("answers/*/*.jsonl"))
    assert [name.rsplit("-", 1)[1] for name in files] == ["0.jsonl", "1.jsonl"]
    assert AnswerLog(cache_folder(), {"model": "another"}).get("first") is None
