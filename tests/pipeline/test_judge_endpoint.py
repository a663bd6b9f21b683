"""A run judged by an endpoint: estimated first, paid once, and its key nowhere to be found."""

from pathlib import Path

import pytest
from feedback.serving import endpoint

import jpo_ray
from jpo_ray.errors import InputError
from jpo_ray.files import read_json
from jpo_ray.pipeline import dry_run_judge
from pipeline.inline import Cluster, run, small_config

CANARY = "sk-canary-0123456789"
STAGES = ["items", "pairs", "judge", "report"]


def test_a_run_is_estimated_judged_and_reported_without_the_key(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))
    with endpoint(key=CANARY, faults={"500": 0.1, "refusal": 0.1, "wrong": 0.1}) as server:
        judge = {"annotator": "openai", "base_url": server.url, "prompt_price": 0.5, "completion_price": 1.5}
        selection = {"selection": {"strategy": "random", "budget": 10, "rounds": 2}}
        config = small_config(judge=judge | selection, sample=None, evaluate=None)
        run(config, tmp_path / "run", STAGES[:2])
        dry_run_judge(config, tmp_path / "run")
        assert server.counts() == {}
        estimate = capsys.readouterr().out
        shown = run(config, tmp_path / "run", STAGES)
        counts = read_json(tmp_path / "run" / "judge" / "manifest.json")["counts"]
        assert f"{counts['judgments']} comparisons in both orders: {2 * counts['judgments']} requests" in estimate
        assert "cost $0." in estimate
        asked = server.counts()["requests"]
        run(
            small_config(judge=judge | selection | {"concurrency": 3}, sample=None, evaluate=None),
            tmp_path / "run",
            STAGES,
        )
        assert server.counts()["requests"] == asked
    assert counts["invalid"] > 0
    assert counts["cost"] > 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if b"canary" in path.read_bytes()]
    assert "canary" not in shown + estimate
    assert cluster.calls[:2] == ["embed", "tiles"]


def test_a_missing_key_is_found_before_any_stage(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = small_config(judge={"annotator": "sandbox", "also": [{"annotator": "openai"}]})
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        run(config, tmp_path / "run")
    assert cluster.calls == []


def test_a_dry_run_needs_pairs(tmp_path: Path, cluster: Cluster) -> None:
    with pytest.raises(InputError, match="jpo items"):
        dry_run_judge(small_config(), tmp_path / "run")
    assert cluster.calls == []


def test_an_outage_is_no_judgment(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage does not end with verdicts that nobody gave; the next run asks for all that is missing."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))
    with endpoint(key=CANARY, faults={"500": 0.5}) as server:
        judge = {"annotator": "openai", "base_url": server.url, "max_attempts": 1, "concurrency": 4}
        config = small_config(judge=judge, sample=None, evaluate=None)
        with pytest.raises(InputError, match=r"prompts got no answer .*run the same command again"):
            run(config, tmp_path / "run", STAGES[:3])
        assert not (tmp_path / "run" / "judge").exists()
        answered = server.counts()["answers"]
        patient = small_config(judge=judge | {"max_attempts": 40}, sample=None, evaluate=None)
        monkeypatch.setattr("jpo_ray.feedback.endpoint.LONGEST_PAUSE_S", 0.05)
        run(patient, tmp_path / "run", STAGES[:3])
        counts = read_json(tmp_path / "run" / "judge" / "manifest.json")["counts"]
        assert server.counts()["answers"] == 2 * counts["judgments"] > answered
    assert counts["invalid"] == 0
    assert cluster.calls == ["embed", "tiles"]


def test_other_prompts_are_other_judgments(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text((Path(jpo_ray.__file__).parent / "feedback" / "prompts" / "paper.yaml").read_text())
    with endpoint(key=CANARY) as server:
        judge = {"annotator": "openai", "base_url": server.url, "prompts": str(prompts)}
        config = small_config(judge=judge, sample=None, evaluate=None)
        run(config, tmp_path / "run", STAGES[:3])
        asked = server.counts()["requests"]
        prompts.write_text(prompts.read_text().replace("assistant", "helper"))
        run(config, tmp_path / "run", STAGES[:3])
        assert server.counts()["requests"] == 2 * asked
    assert cluster.calls == ["embed", "tiles"]
