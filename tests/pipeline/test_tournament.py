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
    rates = found["matrix"]["win_rate"]
    assert all(rates[i][j] + rates[j][i] == pytest.approx(100) for i in range(3) for j in range(i))
    assert set(found["ranking"]["both"]["models"]) == {"sft", "dpo", "jpo"}
    page = (run_dir / "report" / "index.html").read_text()
    assert "Models against each other" in page
    assert cluster.calls == []


def test_one_model_has_no_rival(run_dir: Path, cluster: Cluster) -> None:
    sample = {"engine": "transformers", "temperatures": [0.7], "max_new_tokens": 16, "models": ["sft"]}
    with pytest.raises(InputError, match="needs two models"):
        run(small_config(sample=sample, evaluate={"tournament": {}}), run_dir)
    assert [call for call in cluster.calls if not call.startswith("sample")] == []
