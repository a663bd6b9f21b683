"""The command line on bad input: exit code 2, one line that names the mend, no traceback, nothing half-written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jpo_ray import __version__, cli, lease, records
from jpo_ray.cli import main
from jpo_ray.cli_parser import STAGE_HELP
from jpo_ray.errors import InputError
from jpo_ray.files import read_json, write_json
from jpo_ray.lease_holder import this_process
from jpo_ray.pipeline import STAGES
from jpo_ray.runs import open_run

ROWS = [
    {"instruction": "Name a fruit.", "response_0": "An apple.", "response_1": "A chair.", "feedback": 0},
    {"instruction": "Name a colour.", "response_0": "Loud.", "response_1": "Blue.", "feedback": 1},
]
CONFIG = """\
items: {train: [{path: DATA}]}
model: {model_name_or_path: tiny}
train:
  - {name: first, beta: 0.2}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("DATA", str(data)))
    return path


@pytest.fixture
def jpo(tmp_path: Path, config: Path) -> Callable[..., int]:
    """`jpo STAGE --config ... --run-dir .../run OVERRIDES`."""
    return lambda stage, *more: main([stage, "--config", str(config), "--run-dir", str(tmp_path / "run"), *more])


@pytest.fixture
def refused(jpo: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command that is refused says: it ends with code 2 and one line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert jpo(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("jpo: ")
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.err
        return captured.err.removeprefix("jpo: ").rstrip("\n")

    return run


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def test_items_are_made_and_then_stand(
    jpo: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two instructions with two responses each: four items, two labels; the second time nothing is done."""
    assert jpo("items") == 0
    assert files(tmp_path / "run") == {
        "run.json", "items/manifest.json", "items/items.parquet", "items/labels.parquet", "items/ratings.parquet"
    }  # fmt: skip
    assert records.read_table(tmp_path / "run/items/items.parquet", records.ITEMS).num_rows == 4
    assert records.read_table(tmp_path / "run/items/labels.parquet", records.LABELS).num_rows == 2
    before = (tmp_path / "run/items/manifest.json").read_bytes()
    assert "stands already" not in capsys.readouterr().out
    assert jpo("items") == 0
    assert "stands already" in capsys.readouterr().out
    assert (tmp_path / "run/items/manifest.json").read_bytes() == before


def test_changed_data_are_read_again(jpo: Callable[..., int], data: Path, tmp_path: Path) -> None:
    jpo("items")
    data.write_text(json.dumps(ROWS[0]) + "\n")
    assert jpo("items") == 0
    assert records.read_table(tmp_path / "run/items/items.parquet", records.ITEMS).num_rows == 2


def test_a_missing_config(refused: Callable[..., str], config: Path, tmp_path: Path) -> None:
    config.unlink()
    assert refused("items") == f"--config {config}: no such file"
    assert not (tmp_path / "run").exists()


def test_bad_yaml(refused: Callable[..., str], config: Path) -> None:
    config.write_text("items:\n  train: [{path: a}\nmodel: 3\n")
    assert refused("items").startswith(f"{config} line 3: not valid YAML (")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.first.bata=1", "unknown key `train.0.bata`; did you mean `beta`?"),
        (
            "train.first.beta=much",
            "`train.0.beta`: Input should be a valid number, unable to parse string as a number, ",
        ),
        ("train.first.beta=-1", "`train.0.beta`: Input should be greater than 0, got -1"),
        ("items.train=[]", "`items.train`: List should have at least 1 item after validation, not 0"),
        ("sample.engine=magic", "`sample.engine`: Input should be 'auto', 'vllm' or 'transformers', got 'magic'"),
    ],
)
def test_bad_keys_and_values(
    override: str, message: str, refused: Callable[..., str], config: Path, tmp_path: Path
) -> None:
    assert refused("items", override).startswith(f"{config}: {message}")
    assert not (tmp_path / "run").exists()


def test_a_bad_override(refused: Callable[..., str]) -> None:
    assert refused("items", "beta") == "`beta`: an override is written section.key=value"


def no_items(run: Path) -> bool:
    """Neither an artifact nor what was being built of it."""
    return files(run) == {"run.json"} and not any((run / ".building").glob("*"))


def test_a_missing_data_file(refused: Callable[..., str], data: Path, tmp_path: Path) -> None:
    data.unlink()
    assert refused("items") == f"{data}: no such file (nor a Hugging Face dataset id)"
    assert no_items(tmp_path / "run")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "Name a', "line 2: broken JSON ("),
        (json.dumps({k: v for k, v in ROWS[1].items() if k != "instruction"}), "line 2: missing `instruction`"),
        (json.dumps(ROWS[1] | {"response_1": "  "}), "line 2: empty `response_1`"),
        (json.dumps(ROWS[1] | {"feedback": 7}), "line 2: `feedback` is 7, not 0"),
        (json.dumps(ROWS[1] | {"response_0": 4}), "line 2: `response_0` is 4, not text"),
    ],
    ids=["broken JSON", "missing column", "empty response", "bad label", "not text"],
)
def test_a_bad_row_is_named_by_its_line(
    line: str, message: str, refused: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    data.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    said = refused("items")
    assert said.startswith(f"{data} {message}")
    assert said.endswith("; mend it or set items.on_bad_rows: skip")
    assert no_items(tmp_path / "run")


def test_a_failed_stage_leaves_the_artifact_before_it(
    jpo: Callable[..., int], refused: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    jpo("items")
    before = files(tmp_path / "run")
    data.write_text("[]\n")
    assert "line 1: the row is [], not an object of columns" in refused("items")
    assert files(tmp_path / "run") == before
    assert records.read_table(tmp_path / "run/items/items.parquet", records.ITEMS).num_rows == 4


def test_a_run_directory_in_use(refused: Callable[..., str], tmp_path: Path) -> None:
    with open_run(tmp_path / "run"):
        said = refused("items")
    assert said.startswith(f"{tmp_path / 'run'}: in use by another run (process {os.getpid()} on ")
    assert "another --run-dir" in said


def test_a_run_directory_in_use_is_waited_for_where_that_is_asked(
    jpo: Callable[..., int],
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As by a job that is submitted again when its machine has died: what it held ends by itself."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.2)
    assert jpo("items") == 0
    held = tmp_path / "run" / "lease.json"
    write_json(held, this_process() | {"boot": "another", "host": "gone"})
    assert "in use by another run" in refused("items")
    assert "in use by another run" in refused("items", "cluster.lease_wait_s=0.5")
    (said,) = caplog.messages
    assert said.endswith(": waiting for up to 0 s")
    aged_s = held.stat().st_mtime - lease.LEASE_EXPIRES_S + 1
    os.utime(held, (aged_s, aged_s))
    assert jpo("items", "cluster.lease_wait_s=20") == 0
    assert not held.exists()


def test_run_directories_that_are_none(refused: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.write_text("a file")
    assert refused("items") == f"--run-dir {run}: is a file; name a folder"
    run.unlink()
    run.mkdir()
    (run / "thesis.tex").write_text("mine")
    assert refused("items") == f"--run-dir {run}: holds files that are not a run's; name an empty or new folder"
    assert files(run) == {"thesis.tex"}


def test_a_run_directory_of_another_version(
    jpo: Callable[..., int], refused: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "run.json", {"format": 99})
    assert "written by another version of jpo-ray (format 99, this one reads 1); use a new folder" in refused("items")
    write_json(run / "run.json", {"format": 1})
    jpo("items")
    manifest = run / "items" / "manifest.json"
    write_json(manifest, read_json(manifest) | {"format": 0})
    assert "manifest.json: written by another version of jpo-ray (format 0, this one reads 1)" in refused("pairs")


@pytest.mark.parametrize("stage", ["pairs", "judge", "sft", "reference", "train", "sample", "evaluate"])
def test_stages_before_their_inputs(stage: str, refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused(stage) == f"{tmp_path / 'run'}: no `items` yet; run `jpo items` first (or `jpo run` for all of it)"


def test_a_report_of_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused("report") == f"{tmp_path / 'run'}: nothing to report yet; run `jpo run` first"


def test_the_next_missing_input_is_named(jpo: Callable[..., int], refused: Callable[..., str]) -> None:
    jpo("items")
    assert "no `pairs` yet; run `jpo pairs` first" in refused("judge")
    assert "no `judge` yet; run `jpo judge` first" in refused("reference")  # it scores what is compared
    assert "no `sft` yet; run `jpo sft` first" in refused("sample")
    assert "no `judge` yet; run `jpo judge` first" in refused("train")


@pytest.mark.parametrize("how", ["config", "data"])
def test_an_input_made_otherwise(
    how: str, jpo: Callable[..., int], refused: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    """Items of another seed, and of data that have changed since."""
    jpo("items")
    if how == "data":
        data.write_text(json.dumps(ROWS[1]) + "\n")
    said = refused("pairs", *(["seed=5"] if how == "config" else []))
    assert said == (
        f"{tmp_path / 'run'}: `items` was made with another config or other input; run `jpo items` again (or `jpo run` "
        "for all that changed)"
    )
    assert not (tmp_path / "run" / "pairs").exists()


def test_a_model_that_is_not_there(jpo: Callable[..., int], refused: Callable[..., str], tmp_path: Path) -> None:
    jpo("items")
    said = refused("sft", f"model.model_name_or_path={tmp_path / 'nowhere'}")
    assert said == f"model.model_name_or_path: {tmp_path / 'nowhere'}: no such folder"


def test_evaluation_without_samples_is_refused_before_any_work(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused("items", "sample=null").endswith(
        "evaluate judges samples and `sample` is off; set evaluate: null too"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["itmes"], "invalid choice: 'itmes'"),
        (["items"], "the following arguments are required: --config, --run-dir"),
        (["items", "--run-dir", "r"], "the following arguments are required: --config"),
        (["sandbox"], "the following arguments are required: ACTION"),
        (["sandbox", "data", "--out", "x", "--split", "all"], "invalid choice: 'all'"),
    ],
)
def test_unknown_commands_and_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_version_and_help_of_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(STAGE_HELP) == list(STAGES)
    for arguments, text in (
        (["--version"], f"jpo-ray {__version__}"),
        (["--help"], "Joint"),
        (["train", "-h"], "section.key"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert text.lower() in capsys.readouterr().out.lower()


def test_sandbox_data_are_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    assert main(["sandbox", "data", "--out", str(out), "--count", "5", "--seed", "3"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5
    assert all(row["instruction"] and row["response_0"] and row["response_1"] for row in rows)
    assert [path.name for path in out.parent.iterdir()] == ["rows.jsonl"]
    assert capsys.readouterr().out == f"5 rows: {out}\n"


@pytest.mark.parametrize(
    "arguments", [["data", "--count", "-1"], ["data", "--count", "100000000"], ["pretrain", "--examples", "3"]]
)
def test_sandbox_counts_that_cannot_be(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sandbox", arguments[0], "--out", str(tmp_path / "out"), *arguments[1:]]) == 2
    assert capsys.readouterr().err.startswith(f"jpo: {arguments[1]} {arguments[2]}: ")
    assert not list(tmp_path.iterdir())


def test_sandbox_data_cannot_be_written_below_a_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sandbox", "data", "--out", str(data / "rows.jsonl"), "--count", "5"]) == 2
    assert capsys.readouterr().err.startswith(f"jpo: --out {data / 'rows.jsonl'}: cannot be written (")


def raising(error: BaseException) -> Callable[[object], None]:
    def run(_arguments: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("mend it"), 2, "jpo: mend it\n"),
        (
            KeyboardInterrupt(),
            130,
            "jpo: stopped; the same command goes on from the last finished stage or checkpoint\n",
        ),
        (OSError("first line\n\nno space left\n"), 1, "jpo: failed: OSError: no space left\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, said: str, jpo: Callable[..., int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """2 for bad input, 1 for a failure at work, whose traceback is in the run directory and not on the screen."""
    (tmp_path / "run").mkdir()
    monkeypatch.delenv("JPO_DEBUG", raising=False)
    monkeypatch.setattr(cli, "run_command", raising(error))
    assert jpo("items") == code
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert "Traceback" not in err
    log = tmp_path / "run" / "error.log"
    assert log.exists() == (code == 1)
    if code == 1:
        assert f"the whole of it: {log}" in err
        assert log.read_text().startswith("Traceback (most recent call last)")


def test_a_run_that_failed_goes_on(jpo: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log that a failure left does not make the folder a stranger's."""

    def full_disk(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("jpo_ray.pipeline.item_stage.build_items", full_disk)
        assert jpo("items") == 1
    assert files(tmp_path / "run") == {"run.json", "error.log"}
    assert jpo("items") == 0


def test_overrides_may_stand_between_flags(config: Path, tmp_path: Path) -> None:
    assert main(["items", "--config", str(config), "seed=1", "--run-dir", str(tmp_path / "run"), "sample.seed=3"]) == 0
    assert read_json(tmp_path / "run" / "items" / "manifest.json")["config"]["seed"] == 1
    with pytest.raises(SystemExit) as stopped:
        main(["items", "--config", str(config), "--run-dir", str(tmp_path / "run"), "--sed=1"])
    assert stopped.value.code == 2
