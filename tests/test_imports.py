"""Imports point one way, and the command line answers before anything heavy is loaded."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Imports point one way: each part may import what stands in an earlier row, and itself; never another of its own row.
ROWS = [
    ["__init__", "errors", "lease_holder"],
    ["files", "artifacts", "lease", "stopping", "store"],
    ["store_lease", "stored"],
    ["records", "config_base", "runs"],
    ["shards"],
    ["config_cluster", "config_judge", "config_objective", "config_plan", "config_rounds"],
    ["config_training"],
    ["config"],
    ["config_file", "cache"],
    ["config_experiment", "config_serve"],
    ["data", "objectives"],
    ["sandbox", "pairs", "feedback", "engine"],
    ["evaluation", "annotation", "planning"],
    ["cluster"],
    ["serving"],
    ["pipeline"],
    ["cli_parser", "cli_commands"],
    ["cli"],
    ["jobs", "serve"],
]
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}
MODULES = sorted(path for folder in ("jpo_ray", "jobs", "serve") for path in (ROOT / folder).rglob("*.py"))
HEAVY = {"torch", "ray", "transformers", "pyarrow", "peft", "vllm", "numpy", "datasets"}


def part_of(path: Path) -> str:
    """`jpo_ray/engine/step.py` -> engine, `jpo_ray/runs.py` -> runs, `jobs/train.py` -> jobs."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "jpo_ray" else parts[0]


def imported(path: Path) -> Iterator[str]:
    """Full names of all that a module imports, at its top or within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    """Parts of jpo_ray that a module imports; `from jpo_ray import __version__` is of `__init__`."""
    ours = [name.split(".")[1] for name in imported(path) if name.startswith("jpo_ray.")]
    return {part if (ROOT / "jpo_ray" / part).is_dir() or part in ROW_OF else "__init__" for part in ours}


def test_every_part_has_its_place() -> None:
    assert {part_of(path) for path in MODULES} <= set(ROW_OF)
    assert len(MODULES) > 50


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    here = part_of(path)
    wrong = {part for part in parts_imported(path) - {here} if ROW_OF[part] >= ROW_OF[here]}
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_rule_catches_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "def f():\n    from jpo_ray.engine import step\n    import jpo_ray.cluster.session\n    import os\n"
    )
    assert parts_imported(path) == {"engine", "cluster"}


def test_only_the_cluster_and_what_is_served_know_ray() -> None:
    """Engine and objectives run on a bare box, so neither they nor what they may import names Ray."""
    knowing = {part_of(path) for path in MODULES if any(name.split(".")[0] == "ray" for name in imported(path))}
    assert knowing <= {"cluster", "serving", "serve"}


def loaded_by(code: str) -> set[str]:
    """Heavy packages loaded after running `code` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint()\nprint(*{HEAVY!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "from jpo_ray.cli import build_parser; build_parser().format_help()",
        "import jpo_ray.config",
        "import jpo_ray.runs",
    ],
)
def test_light_modules_load_nothing_heavy(code: str) -> None:
    assert loaded_by(code) == set()


def test_engine_and_objectives_do_not_load_ray() -> None:
    assert "ray" not in loaded_by("import jpo_ray.engine.jobs, jpo_ray.engine.tasks, jpo_ray.objectives")


def test_help_answers_at_once() -> None:
    """The best of three starts, interpreter included, in under half a second."""
    jpo = Path(sys.executable).with_name("jpo")
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([jpo, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - started)
    assert "Align language models with joint preferences" in done.stdout
    assert min(seconds) < 0.5
