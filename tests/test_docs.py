"""What README and docs show works: commands parse, configs validate, Python runs, links lead somewhere."""

import argparse
import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from jpo_ray.cli_parser import build_parser
from jpo_ray.config import JointPairs, RunConfig
from jpo_ray.config_experiment import load_experiment, load_runs
from jpo_ray.config_file import apply_override, load_config, load_files_config, parse_config
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.config_serve import load_serve_config
from jpo_ray.errors import InputError
from jpo_ray.pipeline.plan import make_plan
from jpo_ray.planning.plan import Plan
from jpo_ray.planning.show import duration, number
from jpo_ray.planning.workers import JUDGING

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a section alone needs to be a config.
LEAST: dict[str, Any] = {"items": {"train": [{"path": "data.jsonl"}]}, "model": {"model_name_or_path": "sandbox"}}


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for found in re.finditer(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S):
            yield page, found[1]


def commands() -> Iterator[tuple[Path, str]]:
    """Every line of a code block that calls `jpo`; a backslash goes on with the next."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^(?: {4}|)(jpo [a-z].*)$", text, re.M):
            yield page, line


def parsed(page: Path, line: str) -> argparse.Namespace:
    """A shown command, less what stands for anything (`[section.key=value ...]`)."""
    words = shlex.split(re.sub(r" \[.*? \.\.\.\]", "", line), comments=True)[1:]
    try:
        found, rest = build_parser().parse_known_args(words)
    except SystemExit:
        pytest.fail(f"{page.name}: `{line}` does not parse")
    assert not any(word.startswith("-") for word in rest), f"{page.name}: `{line}`: unknown {rest}"
    return found


def test_commands_parse() -> None:
    shown = list(commands())
    assert len(shown) > 30
    for page, line in shown:
        parsed(page, line)


def check_overrides(found: argparse.Namespace, ones_own: Path) -> None:
    """Load what the command would load, with its overrides; `ones_own` stands for a config that only the reader has."""
    config = getattr(found, "config", None)
    if found.command == "serve":
        load_serve_config(config and ROOT / config, found.overrides, found.run_dir)
    elif found.command == "scale":
        load_experiment(ROOT / found.experiment, found.overrides)
    elif config is None:
        load_files_config(found.overrides)
    else:
        load_config(ROOT / config if (ROOT / config).exists() else ones_own, found.overrides)


def test_overrides_in_commands_are_keys_of_what_they_name(tmp_path: Path) -> None:
    """In the pages, and in what configs say of themselves."""
    ones_own = tmp_path / "mine.yaml"
    ones_own.write_text(yaml.safe_dump(LEAST))
    shown = [(page, line, parsed(page, line)) for page, line in (*commands(), *commands_of_configs())]
    shown = [each for each in shown if getattr(each[2], "overrides", None)]
    assert len(shown) > 10
    for page, line, found in shown:
        try:
            check_overrides(found, ones_own)
        except InputError as error:
            pytest.fail(f"{page.name}: `{line}`: {error}")


def test_overrides_within_a_sentence_are_keys() -> None:
    shown = [
        (page, text) for page in PAGES for text in re.findall(r"`([a-z_]+(?:\.[a-z0-9_*]+)*=[^`]*)`", page.read_text())
    ]
    shown = [(page, text) for page, text in shown if text.partition("=")[0].partition(".")[0] in RunConfig.model_fields]
    assert len(shown) > 5
    for page, text in shown:
        values = copy.deepcopy(LEAST)
        for override in text.split():
            apply_override(values, override)
        parse_config(values, f"{page.name}: `{text}`")


def commands_of_configs() -> Iterator[tuple[Path, str]]:
    for config in (ROOT / "configs").rglob("*.yaml"):
        text = re.sub(r"\\\n# *", "", config.read_text())
        for line in re.findall(r"^# +(jpo (?:run|plan|scale) .*--.*)$", text, re.M):
            yield config, line


def test_yaml_blocks_are_sections_of_a_config() -> None:
    shown = list(blocks("yaml"))
    assert len(shown) > 5
    for page, text in shown:
        values = yaml.safe_load(text)
        if {"kind", "cluster_name", "grid"} & set(values):  # of Kubernetes, of Ray's launcher, or an experiment (below)
            continue
        parse_config(LEAST | values, f"{page.name}: {text[:60]!r}")


def test_yaml_blocks_with_a_grid_are_experiments(tmp_path: Path) -> None:
    shown = [text for _, text in blocks("yaml") if "grid" in yaml.safe_load(text)]
    assert len(shown) == 2
    for config in (ROOT / "configs").glob("*.yaml"):
        (tmp_path / config.name).symlink_to(config)
    (tmp_path / "experiments").mkdir()
    for text in shown:
        (tmp_path / "experiments" / "shown.yaml").write_text(text)
        runs = load_experiment(tmp_path / "experiments" / "shown.yaml", []).runs
        assert len(runs) == (2 if "strategy: [random, similar]" in text else 1)


def test_no_config_or_program_hides_in_an_indented_block() -> None:
    """Only fenced ones are checked."""
    for page in PAGES:
        unfenced = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.M | re.S)
        assert not re.search(
            r"^ {4,}(def |import |from \w+ import |\w+:$|(base|grid|override|train): )", unfenced, re.M
        ), page.name


def test_the_quickstarts_lines_for_a_gpu() -> None:
    (text,) = [text for page, text in blocks("yaml") if page.name == "quickstart.md"]
    config = parse_config(yaml.safe_load(text), "quickstart.md")
    assert (config.cluster.gpus_per_worker, config.model.dtype) == (0, "float32")
    config = parse_config(yaml.safe_load(re.sub(r"# (dtype|cluster):", r"\1:", text)), "quickstart.md")
    assert (config.cluster.gpus_per_worker, config.model.dtype) == (1, "bfloat16")


def rows_of_recipes(cells: int) -> dict[str, list[str]]:
    """Those of the table with so many columns, by the first one."""
    lines = (ROOT / "docs" / "recipes.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0]: row[1:] for row in rows if len(row) == cells}


def test_what_recipes_train() -> None:
    names = [name for cell in rows_of_recipes(5) for name in re.findall(r"`(\w+\.yaml)`", cell)]
    assert len(names) == 10
    for name in names:
        config = load_config(ROOT / "configs" / name)
        assert {entry.objective for entry in config.train} == {"jpo", "dpo", "kto"}, name
        if "tldr" in name or name.endswith(("helpful_mistral7b.yaml", "helpful_released.yaml")):
            assert config.items.max_instruction_tokens == 900, name


def estimated(plan: Plan) -> list[str]:
    """A row of the table in docs/recipes.md, its numbers rounded to the digits that stand there."""
    stages = {cost.name: cost for cost in plan.stages}
    requests, dollars = (sum(getattr(cost, key) for cost in plan.judging) for key in ("requests", "cost"))
    known = [cost.seconds for cost in plan.stages if cost.stage not in JUDGING]
    assert plan.run_dir_gib is not None
    return [
        number(sum(filter(None, plan.counts.preferences.values()))),
        f"{requests:,}, {dollars:.0f}" if requests else "-",
        *(
            f"{stages[name].memory_gib:.0f}, {duration(stages[name].seconds)}" if name in stages else "-"
            for name in ("sft", next(name for name in stages if name.startswith("train/jpo")))
        ),
        duration(sum(seconds for seconds in known if seconds is not None)),
        f"{plan.run_dir_gib:,.0f} GiB" if plan.run_dir_gib >= 1 else "below 1 GiB",
        f"{plan.hub_gib:.2g} GiB",
        f"{plan.host_memory_gib:.0f} GiB" if plan.host_memory_gib else "-",
    ]


@pytest.mark.parametrize("name", [name.strip("`") for name in rows_of_recipes(9)])
def test_a_recipes_estimate_is_the_plans(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the table, and again where the file begins; on two cores where it has no GPUs, with nothing downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    path = ROOT / "configs" / f"{name}.yaml"
    [config] = load_runs(path, []).values()
    if not config.cluster.gpus_per_worker:
        [config] = load_runs(path, ["plan.peak_tflops=0.2"]).values()
    row = rows_of_recipes(9)[f"`{name}`"]
    assert row == estimated(make_plan(config))
    _, _, sft, jpo, stages, disk, models, host = row
    parts = [(stage, *cell.split(", ")) for stage, cell in (("SFT", sft), ("JPO", jpo)) if cell != "-"]
    said = ", ".join(f"{stage} {gib} GiB a worker and {time}" for stage, gib, time in parts)
    header = re.split(r"^(?:seed|base):", path.read_text(), maxsplit=1, flags=re.M)[0]
    assert f"\n# By `jpo plan`, an estimate: {said}; all stages {stages}.\n" in header
    memory = "" if host == "-" else f"; host memory: {host}"
    assert f"\n# Disk: {disk}, and {models} of models from the Hub{memory}.\n" in header


def test_every_recipe_with_an_estimate_is_in_the_table() -> None:
    folder = ROOT / "configs"
    named = [path.relative_to(folder) for path in folder.rglob("*.yaml") if "By `jpo plan`" in path.read_text()]
    assert sorted(f"`{path.with_suffix('')}`" for path in named) == sorted(rows_of_recipes(9))
    assert len(named) == 9


def test_what_the_limit_of_characters_leaves_of_tldr_is_the_plans() -> None:
    """With the recipe's limit, and without one."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    few, many = plans_of_both("tldr_released")
    left, of = (plan.counts.preferences for plan in (few, many))
    for protocol in ("conditional", "joint"):
        assert f"{left[protocol]} of {of[protocol]:,} {protocol}" in text
    (some, in_some), (all_, in_all) = map(training_of, (few, many))
    assert f"JPO has {all_:,} steps in {in_all} instead of {some} in {in_some}" in text
    whole = [duration(sum(cost.seconds or 0 for cost in plan.stages)) for plan in (many, few)]
    assert f"all stages {whole[0]} instead of {whole[1]}" in text
    (some, _), (all_, _) = map(training_of, plans_of_both("tldr_mistral7b"))
    assert f"ten epochs of all are {all_:,} steps of JPO instead of {some}" in text


def plans_of_both(name: str) -> list[Plan]:
    path = ROOT / "configs" / f"{name}.yaml"
    return [make_plan(load_config(path, overrides)) for overrides in ([], ["pairs.max_item_characters=null"])]


def training_of(plan: Plan) -> tuple[int | None, str]:
    [jpo] = [cost for cost in plan.stages if cost.name == "train/jpo"]
    return jpo.steps, duration(jpo.seconds)


def test_variables_of_the_environment_are_listed() -> None:
    read = {
        name
        for file in (ROOT / "jpo_ray").rglob("*.py")
        for name in re.findall(r"environ(?:\.get\(|\[)\"([A-Z_]+)\"\)?(?! *=)", file.read_text())
    }
    ours = {"LOCAL_WORLD_SIZE", "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"}  # Ray Train's
    page = (ROOT / "docs" / "config.md").read_text()
    assert not [name for name in read - ours if f"`{name}`" not in page]


def test_json_lines_blocks_are_rows_that_can_be_read(tmp_path: Path) -> None:
    from jpo_ray.config import Source
    from jpo_ray.data.sources import read_source

    for _, text in blocks("json"):
        (tmp_path / "rows.jsonl").write_text(text)
        assert read_source(Source(path=str(tmp_path / "rows.jsonl")), "fail").rows


@pytest.mark.parametrize(("page", "text"), [case for case in blocks("python") if case[0].name == "quickstart.md"])
def test_python_of_the_quickstart_runs(page: Path, text: str) -> None:
    exec(compile(text, str(page), "exec"), {})


def test_examples_of_contributing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block defines one function; it is used as the page says."""
    import numpy as np
    import torch

    from jpo_ray.config import Source
    from jpo_ray.data import formats, sources
    from jpo_ray.feedback.annotators import Annotator, Answer, Comparison, Progress
    from jpo_ray.feedback.judge import judge
    from jpo_ray.objectives import Outcome
    from jpo_ray.objectives.losses import Edges, Items, ItemScores, of_margins
    from jpo_ray.pairs.sides import Side
    from jpo_ray.pairs.strategies import Tile

    space: dict[str, Any] = {"Sequence": tuple, "Priorities": Any}
    space |= {kind.__name__: kind for kind in (Items, Edges, Outcome, Annotator, Answer, Comparison, Tile)}
    space |= {"of_margins": of_margins, "Progress": Progress, "Row": formats.Row, "_text": formats._text}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for block in re.findall(r"^( *)```python\n(.*?)^ *```$", text, re.M | re.S):
        lines = [line.removeprefix(block[0]) for line in block[1].splitlines()]
        exec("from __future__ import annotations\n" + "\n".join(lines), space)

    scores = ItemScores(torch.tensor([0.0, 0.0]), torch.tensor([2.0, 1.5]))
    zero = ItemScores(torch.zeros(2), torch.zeros(2))
    ones = torch.ones(2, dtype=torch.int64)
    items = Items(scores, zero, ones, ones, ones)
    edges = Edges(*map(torch.tensor, ([0], [1], [False], [1.0], [float("nan")])))
    assert space["my_loss"](items, edges, beta=0.4).loss_E.item() == pytest.approx((1 - 0.4 * 0.5) ** 2)

    comparison = Comparison("k", "1", "2", "I", "a longer one", "I", "short")
    assert judge([comparison], space["annotator"])[0]["verdict"] == "a"

    side = Side(np.arange(2, dtype=np.uint64), np.arange(2, dtype=np.int64))
    cosine = np.array([[1.0, 0.2], [0.2, 1.0]], dtype=np.float32)
    assert space["distant"](Tile(side, side, cosine, 0)).argmax(axis=1).tolist() == [1, 0]

    monkeypatch.setitem(formats.REQUIRED, "thumbs", ("question", "good", "bad"))  # the line, the branch
    monkeypatch.setattr(sources, "row_of", lambda values, _, where: space["thumbs_row"](values, where))
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?", "good": "So.", "bad": 3}\n' * 2)
    with pytest.raises(InputError, match=r"rows\.jsonl line 1: .*`bad`.*set items\.on_bad_rows: skip"):
        sources.read_source(Source(path=str(tmp_path / "rows.jsonl")), "fail")
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?", "good": "So.", "bad": "No."}\n')
    (row,) = sources.read_source(Source(path=str(tmp_path / "rows.jsonl")), "fail").rows
    assert (row.items, row.verdict, row.kind) == ((("Why?", "So."), ("Why?", "No.")), "a", "thumbs")


def test_contributing_names_the_places_that_list_what_is_added() -> None:
    """The names of strategies, annotators and formats stand where it says: in the tables and in the reference."""
    text, reference = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "configs" / "reference.yaml").read_text()
    tables = {"An annotator": "judging.md", "A strategy": "pairs.md", "A reader": "data.md"}
    for heading, page in tables.items():
        section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        assert f"`docs/{page}`" in section
        assert "`configs/reference.yaml`" in section
    for model, key, page in ((AnnotatorConfig, "annotator", "judging.md"), (JointPairs, "strategy", "pairs.md")):
        for name in get_args(model.model_fields[key].annotation):
            assert f"`{name}`" in (ROOT / "docs" / page).read_text(), name
            assert re.search(rf"^ +{key}: .*\b{name}\b", reference, re.M), name


def test_links_within_the_repository_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
