"""The report of complete, partial and odd runs."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pytest

from jpo_ray import records
from jpo_ray.config import RunConfig
from jpo_ray.evaluation import sample_cards
from jpo_ray.evaluation.length_control import LengthControlled
from jpo_ray.evaluation.pages import duration_text
from jpo_ray.evaluation.report import make_report
from jpo_ray.evaluation.run_facts import funnel, standing_manifests
from jpo_ray.runs import RunDir, open_run
from tests.evaluation import synthetic_run as synthetic

ATTACK = "<script>alert('x')</script>\"'><img src=http://evil.example/x onerror=alert(1)>"


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with open_run(tmp_path / "run") as opened:
        yield opened


def report(run: RunDir, config: RunConfig) -> tuple[dict[str, Any], str]:
    """The summary and the page, as files."""
    out = run.root.parent / "report"
    out.mkdir(exist_ok=True)
    make_report(run, config, out)
    assert sorted(path.name for path in out.iterdir()) == ["figures", "index.html", "report.md", "summary.json"]
    return json.loads((out / "summary.json").read_text()), (out / "index.html").read_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report of a finished run."""
    with open_run(tmp_path_factory.mktemp("full") / "run") as opened:
        synthetic.put_everything(opened)
        return report(opened, synthetic.make_config())


def test_full_run(full: tuple[dict[str, Any], str]) -> None:
    summary, html = full
    assert set(summary) == {
        "models", "seconds", "spent", "counts", "trainings", "judges", "policies", "tournament", "lengths", "raised",
        "missing", "config", "versions",
    }  # fmt: skip
    assert set(summary["models"]) == {"sft", "jpo", "dpo"}
    for entry in summary["models"].values():
        assert set(entry["win_rate"]) == {"0.001", "0.5", "1.0", "mean"}
        assert entry["ci95"][0] <= entry["win_rate"]["mean"] <= entry["ci95"][1]
        assert entry["n"] + entry["invalid"] == 40 * 3
    stages = [
        "items",
        "embeddings",
        "pairs",
        "judge",
        "sft",
        "reference",
        "train",
        "train/jpo",
        "train/dpo",
        "sample",
        "evaluate",
    ]
    assert set(summary["seconds"]) == set(stages)
    parts = summary["seconds"]["train/jpo"] + summary["seconds"]["train/dpo"]
    assert summary["seconds"]["train"] == pytest.approx(parts, abs=1e-6)
    assert summary["counts"]["pairs"] == {"pairs": 120, "skipped_similar": 3}
    assert summary["versions"]["pyarrow"] == pa.__version__
    page = Page(html)
    assert f"{summary['models']['jpo']['win_rate']['mean']:.1f} %" in page.text
    for heading in ("Win rates", "SFT loss", "What the margin is made of", "From pairs to preferences", "Samples"):
        assert heading in page.text
    # Win rates, SFT, measures, margins of two models, similarity, interplay.
    assert page.count("svg") == 1 + 1 + 4 + 2 + 1 + 2
    assert page.count("article") == 40
    assert ", seed " not in page.text
    assert not re.search(r"not evaluated|not sampled|no pairs yet", page.text)


def test_the_summary_and_the_markdown_say_what_the_page_says(run: RunDir) -> None:
    """Every number of the tables, two annotators' agreement and what judging cost among them."""
    synthetic.put_everything(run, tests=12)
    judgments = records.read_table(run.path("judge") / "judgments.parquet", records.JUDGMENTS).to_pylist()
    for row in judgments:
        row |= {"tokens": 10, "cost": 0.01}
    other = [row | {"annotator": "second", "verdict": "a"} for row in judgments]
    preferences = records.read_table(run.path("judge") / "preferences.parquet", records.PREFERENCES)
    tables = {
        "judgments.parquet": ([*judgments, *other], records.JUDGMENTS),
        "preferences.parquet": (preferences, records.PREFERENCES),
    }
    shutil.rmtree(run.path("judge"))
    synthetic.put(run, "judge", tables)
    summary, html = report(run, synthetic.make_config())
    text = (run.root.parent / "report" / "report.md").read_text()
    page = Page(html).text
    assert summary["spent"]["judge"] == {"judgments": 240, "tokens": 2400, "cost": pytest.approx(2.4)}
    assert [row["step"] for row in summary["counts"]["funnel"]["steps"]] == [
        "items", "pairs", "judged", "decisive", "preferences", "used by jpo", "used by dpo",
    ]  # fmt: skip
    (conditional, joint) = summary["judges"]["agreements"]
    assert (conditional["one"], conditional["other"], joint["protocol"]) == ("sandbox", "second", "joint")
    numbers = [f"{row['score']:.1f}" for row in (conditional, joint)]
    numbers += [f"{share:.1f}" for row in summary["judges"]["interplay"] for share in row["shares"].values() if share]
    numbers += [f"{entry['win_rate']['mean']:.1f}" for entry in summary["models"].values()]
    numbers += [f"{row['train_loss']:.3f}" for row in summary["trainings"]] + ["2,400", "2.40"]
    for number in numbers:
        assert number in page, number
        assert number.replace(",", "") in text.replace(",", ""), number
    assert "used by jpo" in text
    figures = sorted(path.name for path in (run.root.parent / "report" / "figures").iterdir())
    assert sorted(re.findall(r"\(figures/(.*?)\)", text)) == figures
    assert len(figures) == Page(html).count("svg")


def test_warnings_and_reasons_are_in_the_markdown_too(run: RunDir) -> None:
    """Of artifacts that judge; raised temperatures; the ranking beside the win rates; what is absent."""
    synthetic.put_everything(run, tests=3)
    ranked = {"win_rate": 50.0, "win_rate_ci95": [40.0, 60.0], "n": 3333, "invalid": 44}
    found = {
        "matrix": {
            "models": ["sft", "jpo"],
            "win_rate": [[None, 40.0], [60.0, None]],
            "ci95": [[None, [30.0, 50.0]], [[50.0, 70.0], None]],
            "n": [[None, 1234], [1234, None]],
            "invalid": [[None, 21], [21, None]],
        },
        "ranking": {
            kind: {"reason": "dpo is not ranked" if kind == "both" else "", "models": {"sft": ranked, "jpo": ranked}}
            for kind in ("both", "joint", "conditional")
        },
        "agreement": {"both": {"models": 3, "kendall_tau": 0.33, "pearson": 0.4, "same_order_share": 0.625}},
    }
    counts = {"warning": "half of it is invalid", "invalid because": "no answer (7)"}
    counts |= {"further samples not played": 1500}
    synthetic.put(run, "tournament", {}, json={"tournament.json": found}, counts=counts)
    config = synthetic.make_config(evaluate={"tournament": {}, "policies": True})
    summary, html = report(run, config)
    assert summary["missing"] == {"policies": "no scores under the models yet: run `jpo evaluate`"}
    assert summary["raised"] == [{"temperature": 0.001, "effective_temperature": 0.01, "engine": "vllm"}]
    text = (run.root.parent / "report" / "report.md").read_text()
    for said in (
        "half of it is invalid", "Invalid: no answer (7)", "Temperature 0.001 ran as 0.01 (vllm).", "dpo is not ranked",
        "Kendall's tau +0.33; the same order in 62.5 % of resamples", "no scores under the models yet",
        "n 1,234, invalid 21", "plays; 1,500 further ones do not.",
    ):  # fmt: skip
        assert said in text, said
        assert said in Page(html).text, said
    assert "| sft | 50.0 | 40.0 to 60.0 | 50.0 | 50.0 | 3333 | 44 |" in text
    assert "| jpo | 60.0 (50.0 to 70.0), n 1,234, invalid 21 | – |" in text
    assert "<td>3,333</td><td>44</td>" in html
    shutil.rmtree(run.path("tournament"))
    missing = report(run, config)[0]["missing"]
    assert missing["tournament"] == "models not compared with each other yet: run `jpo evaluate`"
    assert "policies" not in report(run, synthetic.make_config())[0]["missing"]


def test_that_shards_are_not_analysed_is_said(run: RunDir) -> None:
    synthetic.put_everything(run, tests=3)
    for table in ("pairs/pairs.parquet", "judge/judgments.parquet", "judge/preferences.parquet"):
        path = run.root / table
        one = path.rename(path.with_name("one"))
        path.mkdir()
        one.rename(path / "00000.parquet")
    summary, html = report(run, synthetic.make_config())
    assert summary["judges"] is None
    assert "kept in shards" in summary["missing"]["judges"]
    for text in (Page(html).text, (run.root.parent / "report" / "report.md").read_text()):
        assert summary["missing"]["judges"] in text


def test_figures_are_images_of_their_own(run: RunDir) -> None:
    synthetic.put_everything(run, tests=3)
    report(run, synthetic.make_config())
    for path in (run.root.parent / "report" / "figures").iterdir():
        drawn = path.read_text()
        root = ElementTree.fromstring(drawn)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(root.attrib["width"]) > 300
        assert "var(" not in drawn


def test_models_are_in_the_order_of_the_config(run: RunDir) -> None:
    synthetic.put_everything(run, ["zeta", "alpha"], tests=3)
    out = run.root.parent / "report"
    out.mkdir()
    summary = make_report(run, synthetic.make_config(["zeta", "alpha"]), out)
    assert list(summary["models"]) == ["sft", "zeta", "alpha"]


def test_funnel_counts_add_up(run: RunDir) -> None:
    synthetic.put_data(run, 60, 40)
    counts = funnel(run, standing_manifests(run, synthetic.make_config()))
    assert counts["instructions"] == {"train": 54, "validation": 6, "test": 40}
    assert counts["items"] == {"train": 108, "validation": 12, "test": 40}
    assert counts["gold_items"] == {"train": 0, "validation": 0, "test": 40}
    rows = {(row["protocol"], row["split"]): row for row in counts["comparisons"]}
    assert {kind: row["pairs"] for kind, row in rows.items()} == {
        ("conditional", "train"): 54,
        ("conditional", "validation"): 6,
        ("joint", "train"): 54,
        ("joint", "validation"): 6,
    }
    for row in rows.values():
        assert row["decisive"] + row["ties"] + row["invalid"] == row["judged"] == row["pairs"]
        assert row["preferences"] == row["decisive"]
        assert row["flipped"] <= row["ties"]
    assert sum(row["flipped"] for row in rows.values()) > 0


def test_evaluate_off_is_said_and_never_shown_as_numbers(run: RunDir) -> None:
    synthetic.put_everything(run, tests=5)  # an earlier config's evaluation stands in the run directory
    summary, html = report(run, synthetic.make_config(evaluate=None))
    assert summary["models"] == {}
    assert "evaluate" not in summary["seconds"]
    page = Page(html)
    assert "not evaluated: `evaluate` is off in the config" in page.text
    assert "better than gold" not in page.text
    assert "against sft" not in page.text
    assert page.count("article") == 5


def test_sample_off(run: RunDir) -> None:
    synthetic.put_data(run, 20, 5)
    summary, html = report(run, synthetic.make_config(sample=None, evaluate=None, sft=None))
    assert summary["models"] == {}
    text = Page(html).text
    assert "not sampled: `sample` is off in the config" in text
    assert "not evaluated: `evaluate` is off in the config" in text
    assert "no SFT: `sft` is off in the config" in text
    assert "jpo is not trained yet: run `jpo train`" in text


def test_empty_run(run: RunDir) -> None:
    summary, html = report(run, synthetic.make_config())
    nothing = {"models": {}, "seconds": {}, "spent": {}, "counts": {"funnel": {}}, "trainings": [], "versions": {}}
    nothing |= {"judges": None, "policies": None, "tournament": None, "lengths": []}
    assert {name: summary[name] for name in nothing} == nothing
    assert "not evaluated yet: run `jpo evaluate`" in Page(html).text


def test_ready_made_labels_and_no_joint_pairs(run: RunDir) -> None:
    """One order only, nothing judged twice: no flips; a run without joint pairs has no histogram."""
    item = synthetic.item_row(1, "pear", "train", sft=True), synthetic.item_row(1, "fig", "train")
    ids = item[0]["item_id"], item[1]["item_id"]
    pair = {"pair_id": "p", "item_a": ids[0], "item_b": ids[1], "protocol": "conditional", "similarity": 1.0}
    label = [{"item_a": ids[0], "item_b": ids[1], "verdict": "a"}]
    synthetic.put(run, "items", {"items.parquet": (item, records.ITEMS), "labels.parquet": (label, records.LABELS)})
    synthetic.put(run, "pairs", {"pairs.parquet": ([pair | {"strategy": "all", "split": "train"}], records.PAIRS)})
    judged = [synthetic.judgment({"pair_id": "p"}, "a") | {"verdict_ba": None, "text_ba": None}]
    tables = {"judgments.parquet": (judged, records.JUDGMENTS), "preferences.parquet": ([], records.PREFERENCES)}
    synthetic.put(run, "judge", tables)
    summary, html = report(run, synthetic.make_config(pairs={"joint": None}))
    assert summary["counts"]["funnel"]["labels"] == 1
    expected = {"judged": 1, "decisive": 1, "ties": 0, "flipped": 0, "invalid": 0, "preferences": 0}
    kind = {"protocol": "conditional", "split": "train", "pairs": 1}
    assert summary["counts"]["funnel"]["comparisons"] == [kind | expected]
    assert "Similarity of the instructions" not in html


def test_odd_histories_do_not_break(run: RunDir) -> None:
    states: dict[str, dict[str, Any]] = {
        "none": {"log_history": []},
        "one": {"global_step": 1, "log_history": [{"step": 1, "loss": 0.69}]},
        "nan": {"global_step": 2, "log_history": [{"step": 1, "loss": float("nan")}, {"step": 2}]},
        "long": synthetic.preference_state(5000, 0),
    }
    for name, state in states.items():
        synthetic.put(run, f"train/{name}", {}, json={"trainer_state.json": state})
    _, html = report(run, synthetic.make_config([*states, "missing"]))
    page = Page(html)
    assert "missing is not trained yet" in page.text
    assert "0.690" in page.text
    assert len(html) < 400_000  # 5,000 logged steps are thinned


def test_thirty_models_and_one(run: RunDir, tmp_path: Path) -> None:
    names = [f"model-{index}-with-a-name-as-long-as-names-may-be-{'x' * 16}" for index in range(30)]
    synthetic.put_everything(run, names, tests=2, steps=5)
    _, html = report(run, synthetic.make_config(names))
    assert all(name in html for name in names)
    with open_run(tmp_path / "single") as single:
        synthetic.put_everything(single, ["jpo"], tests=1, steps=1)
        assert set(report(single, synthetic.make_config(["jpo"]))[0]["models"]) == {"sft", "jpo"}


def test_model_without_a_valid_verdict(run: RunDir) -> None:
    rows = [synthetic.sample_row(0, "sft", 0.5, "pear")]
    synthetic.put(run, "sample", {"samples.parquet": (rows, records.SAMPLES)})
    identity = {name: rows[0][name] for name in sample_cards.SAMPLE_KEY}
    judged = pa.Table.from_pylist([synthetic.judgment(identity, "invalid")], records.SAMPLE_JUDGMENTS)
    rates = synthetic.win_rates(judged, 10, 0)
    tables = {"judgments.parquet": (judged, records.SAMPLE_JUDGMENTS)}
    synthetic.put(run, "evaluate", tables, json={"win_rates.json": rates})
    summary, html = report(run, synthetic.make_config())
    assert summary["models"]["sft"]["win_rate"] == {"0.5": None, "mean": None}
    assert "no valid verdict" in Page(html).text


def test_why_rates_are_not_length_controlled_is_on_the_pages(run: RunDir) -> None:
    """Of the models with a rate what it leaves out, of the others why they have none."""
    samples = synthetic.put_samples(run, ["sft", "jpo"], 0, 3)
    synthetic.put_evaluation(run, samples)
    path = run.path("evaluate") / "win_rates.json"
    rates = json.loads(path.read_text())
    few, note = (
        "3 instructions with a valid judgment, needs 50",
        "no difficulty term: it takes judgments of other models",
    )
    fitted = LengthControlled(rate=41.5, ci95=[30.0, 50.0], raw_rate=40.0, length_effect=0.1, note=note)
    for name, controlled in (("sft", LengthControlled(reason=few)), ("jpo", fitted)):
        rates["models"][name]["length_controlled"] = asdict(controlled)
    path.write_text(json.dumps(rates))
    _, html = report(run, synthetic.make_config())
    assert few in Page(html).text
    assert f"jpo: {note}." in Page(html).text
    text = (run.root.parent / "report" / "report.md").read_text()
    assert f"| sft | – | – | {few} |" in text
    assert f"| jpo | 41.5 | 30.0 to 50.0 | {note} |" in text


def test_seeds_are_shown_where_they_tell_samples_apart(run: RunDir) -> None:
    rows = [synthetic.sample_row(0, "sft", 0.5, f"answer {seed}") | {"seed": seed} for seed in (5, 6)]
    synthetic.put(run, "sample", {"samples.parquet": (rows, records.SAMPLES)})
    synthetic.put_evaluation(run, rows)
    text = Page(report(run, synthetic.make_config())[1]).text
    assert "0.5, seed 5" in text
    assert "0.5, seed 6" in text


def put_attack(run: RunDir) -> RunConfig:
    """Every place that text can come from holds markup."""
    rows = [
        synthetic.sample_row(0, model, 0.5, text) | {"instruction": ATTACK, "engine": ATTACK}
        for model, text in (("sft", ATTACK), (ATTACK, "😀" * 20_000), ("jpo", "}} {{ 7 * 7 }} </script> \x00 \u202e"))
    ]
    gold = synthetic.item_row(0, ATTACK, "test", gold=True)
    synthetic.put(run, "items", {"items.parquet": ([gold], records.ITEMS)}, counts={ATTACK: ATTACK})
    synthetic.put(run, "sample", {"samples.parquet": (rows, records.SAMPLES)})
    synthetic.put_evaluation(run, rows)
    return synthetic.make_config(model={"model_name_or_path": ATTACK}, items={"train": [{"path": ATTACK}]})


def test_text_is_escaped_everywhere(run: RunDir) -> None:
    _, html = report(run, put_attack(run))
    page = Page(html)
    assert page.count("script") == 1  # the page's own
    assert page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("alert('x')") >= 8
    assert "14,000 more characters" in page.text
    assert "7 * 7" in page.text


def test_page_is_self_contained(full: tuple[dict[str, Any], str]) -> None:
    _, html = full
    for tag, attributes in Page(html).tags:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "default-src 'none'" in html
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert "http" not in without_namespaces.replace("http-equiv", "")


def test_ids_of_charts_do_not_collide(full: tuple[dict[str, Any], str]) -> None:
    """A clip path of another chart would cut this one."""
    _, html = full
    tags = Page(html).tags
    paths = [attributes["id"] for tag, attributes in tags if tag == "clippath"]
    assert paths
    assert len(set(paths)) == len(paths)
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= ids
    assert "var(--series-0)" in html
    assert "#0202" not in html


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3600, "1 h 00 min"),
        (7599, "2 h 07 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_import_needs_neither_torch_nor_ray_nor_matplotlib() -> None:
    check = (
        "import sys, jpo_ray.evaluation.report, jpo_ray.evaluation.win_rates\n"
        "sys.exit(', '.join({'torch', 'ray', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
