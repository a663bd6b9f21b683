"""A finished run whose models are also compared with each other."""

from pathlib import Path

import pytest

from jpo_ray import records
from jpo_ray.errors import InputError
from jpo_ray.evaluation.tournament import TOURNAMENT
from jpo_ray.files import read_json
from pipeline.inline import Cluster, run, small_config


def test_models_are_compared_and_ranked(run_dir: Path, cluster: Cluster) -> None:
    """Three models, six test instructions, one temperature: 3 x 6 conditional comparisons, and 3 x 5 joint ones."""
    evaluate = {"tournament": {"instructions": None, "joint_per_pair": 5}}
    before = (run_dir / "evaluate" / "manifest.json").read_text()
    run(small_config(evaluate=evaluate), run_dir)
    assert (run_dir / "evaluate" / "manifest.json").read_text() == before  # nothing is judged anew against gold
    table = records.read_table(run_dir / "tournament" / "judgments.parquet", TOURNAMENT)
    kinds = table["protocol"].to_pylist()
    assert (kinds.count("conditional"), kinds.count("joint")) == (18, 15)
    found = read_json(run_dir / "tournament" / "tournament.json")
    assert found["matrix"]["models"] == ["sft", "dpo", "jpo"]
    assert read_json(run_dir / "tournament" / "manifest.json")["counts"]["further samples not played"] == 0
    rates = found["matrix"]["win_rate"]
    assert all(rates[i][j] + rates[j][i] == pytest.approx(100) for i in range(3) for j in range(i))
    assert set(found["ranking"]["both"]["models"]) == {"sft", "dpo", "jpo"}
    page = (run_dir / "report" / "index.html").read_text()
    assert "Models against each other" in page
    assert "further ones do not" not in page
    assert cluster.calls == []


def test_further_samples_are_counted_where_the_tournament_is_shown(run_dir: Path, cluster: Cluster) -> None:
    """Two samples of three models' six instructions: 18 of 36 play, each model in 12 comparisons on equal ones."""
    sample = {"engine": "transformers", "temperatures": [0.7], "max_new_tokens": 16, "samples_per_instruction": 2}
    shown = run(small_config(sample=sample, evaluate={"tournament": {"joint_per_pair": 5}}), run_dir)
    assert "further samples not played 18" in " ".join(shown.split())
    assert cluster.calls != []
    found = read_json(run_dir / "tournament" / "tournament.json")
    assert found["matrix"]["n"] == [[None, 6, 6], [6, None, 6], [6, 6, None]]
    said = "One sample of each model, temperature and instruction plays; 18 further ones do not."
    for page in ("index.html", "report.md"):
        assert said in (run_dir / "report" / page).read_text()


def test_one_model_has_no_rival(run_dir: Path, cluster: Cluster) -> None:
    sample = {"engine": "transformers", "temperatures": [0.7], "max_new_tokens": 16, "models": ["sft"]}
    with pytest.raises(InputError, match="needs two models"):
        run(small_config(sample=sample, evaluate={"tournament": {}}), run_dir)
    assert [call for call in cluster.calls if not call.startswith("sample")] == []
