"""`jpo`: every stage of the pipeline as a command.

Heavy packages are imported by the command that needs them, so that `jpo --help` answers at once.
"""

import argparse
import os
import re
import sys
import traceback
from pathlib import Path

from jpo_ray import __version__
from jpo_ray.errors import InputError

ERROR_LOG = "error.log"
STAGE_HELP = {
    "items": "read the data into items",
    "pairs": "embed instructions and choose which items to compare",
    "judge": "compare each pair, in both orders; decisive verdicts become preferences",
    "sft": "fine-tune the base model on one response per instruction",
    "reference": "log-probs of every item under the SFT model, cached across runs",
    "train": "train every entry of `train`: jpo, dpo, kto or another objective",
    "sample": "generate responses to test instructions",
    "evaluate": "win rates of the samples against the gold responses",
    "report": "tables and one self-contained HTML page",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jpo", description="Align language models with joint preferences (JPO, arXiv 2404.00530) on Ray."
    )
    parser.add_argument("--version", action="version", version=f"jpo-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="the whole pipeline; finished stages are skipped"))
    for stage, text in STAGE_HELP.items():
        command = commands.add_parser(stage, help=text)
        _add_run(command, required=stage not in ADD_FILES)
        if stage in ADD_FILES:
            ADD_FILES[stage](command.add_argument_group("without a config"))
    analyze = commands.add_parser(
        "analyze", help="agreement of annotators, and what conditional and joint verdicts share"
    )
    _add_analyze(analyze)
    _add_annotate(commands.add_parser("annotate", help="a web page on which people compare"))
    serve = commands.add_parser("serve", help="an OpenAI-compatible endpoint for a run's models")
    serve.add_argument("--run-dir", type=Path, help="folder of a run that has trained models")
    serve.add_argument("--config", type=Path, help="YAML file; see configs/serve/")
    serve.add_argument("overrides", nargs="*", metavar="key=value", help="override any key: port=8001, replicas=2")
    scaling = commands.add_parser("scale", help="an experiment: runs over a grid, with curves and tables")
    scaling.add_argument("--experiment", type=Path, required=True, help="YAML file; see configs/experiments/")
    scaling.add_argument("--run-dir", type=Path, required=True, help="folder of the experiment's runs")
    scaling.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any key of all runs")
    alpaca = commands.add_parser("alpaca-eval", help="files for AlpacaEval, and win rates from its annotations")
    alpaca.add_argument("action", choices=("export", "import"))
    alpaca.add_argument("annotations", nargs="*", type=Path, metavar="FILE", help="import: its annotations.json files")
    alpaca.add_argument("--run-dir", type=Path, required=True, help="folder of a run that has samples")
    alpaca.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    demo = commands.add_parser("demo", help="the whole pipeline on the embedded sandbox, a few minutes on two cores")
    demo.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    demo.add_argument("overrides", nargs="*", metavar="section.key=value")
    sandbox = commands.add_parser("sandbox", help="the embedded world").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    pretrain = sandbox.add_parser("pretrain", help="make the sandbox's base model")
    pretrain.add_argument("--out", type=Path, required=True, help="folder for the model")
    pretrain.add_argument("--examples", type=int, default=None, help="texts to train on")
    pretrain.add_argument("--seed", type=int, default=0)
    data = sandbox.add_parser("data", help="write instructions and responses as JSON Lines")
    data.add_argument("--out", type=Path, required=True, help="file to write")
    data.add_argument("--split", choices=("train", "validation", "test"), default="train")
    data.add_argument("--count", type=int, default=3000)
    data.add_argument("--seed", type=int, default=0)
    return parser


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--run-dir", type=Path, help="folder of a run that is judged")
    of.add_argument("--pairs", type=Path, metavar="FILE", help="comparisons, as for `jpo judge` and `jpo annotate`")
    parser.add_argument(
        "--judgments", type=Path, nargs="+", default=[], metavar="FILE", help="judgments.parquet of people or judges"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN_DIR/analysis")
    parser.add_argument(
        "--people", nargs="+", default=[], metavar="NAME", help="annotators who are people: together they have a gold"
    )
    parser.add_argument(
        "--list", metavar="CELL", help='comparisons behind a cell of the interplay, for example "C < R"'
    )


def _add_annotate(parser: argparse.ArgumentParser) -> None:
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--pairs", type=Path, metavar="FILE", help="comparisons: DOVE's raw formats, or preferences")
    of.add_argument("--run-dir", type=Path, help="folder of a run that has pairs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the answers; gone on with")
    parser.add_argument("--annotators", nargs="+", default=[], metavar="NAME", help="each gets a link of their own")
    parser.add_argument("--per-comparison", type=int, metavar="K", help="people for each (default: as before, else 2)")
    parser.add_argument("--limit", type=int, metavar="N", help="draw so many (of a run: joint ones, with their items')")
    parser.add_argument("--guidelines", type=Path, metavar="FILE", help="text to show instead of the project's")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8420, help="default: 8420")
    parser.add_argument("--release-after", type=float, default=24, metavar="HOURS", help="of an open comparison")
    parser.add_argument("--export", action="store_true", help="only write what is answered, also beside a server")


def _add_judge_files(files: "argparse._ArgumentGroup") -> None:
    files.add_argument("--pairs", type=Path, metavar="FILE", help="comparisons: DOVE's raw formats, or preferences")
    files.add_argument("--out", type=Path, metavar="DIR", help="folder for the judgments")
    files.add_argument("--dry-run", action="store_true", help="only say how many requests, tokens and dollars it takes")


def _add_evaluate_files(files: "argparse._ArgumentGroup") -> None:
    files.add_argument("--samples", type=Path, metavar="FILE", help="rows of instruction, outputs (or AlpacaEval's)")
    files.add_argument("--gold", type=Path, metavar="FILE", help="rows of instruction, gold_response")
    files.add_argument("--out", type=Path, metavar="DIR", help="folder for the win rate")
    files.add_argument("--by-order", action="store_true", help="match rows by their order, not by instruction")


def _add_report_files(files: "argparse._ArgumentGroup") -> None:
    files.add_argument("--compare", type=Path, nargs=2, metavar="RUN_DIR", help="two reported runs beside each other")
    files.add_argument("--out", type=Path, metavar="DIR", help="folder for their comparison")


ADD_FILES = {"judge": _add_judge_files, "evaluate": _add_evaluate_files, "report": _add_report_files}


def _add_run(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--config", type=Path, required=required, help="YAML file; see configs/")
    parser.add_argument("--run-dir", type=Path, required=required, help="folder of the run's artifacts")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any key of the config")


def run_command(arguments: argparse.Namespace) -> None:
    """Carry out a parsed command line. Raises `InputError` on bad input."""
    if arguments.command == "sandbox":
        _sandbox(arguments)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.command in OWN_COMMANDS:
        OWN_COMMANDS[arguments.command](arguments)
        return
    if arguments.command in ADD_FILES and _works_on_files(arguments):
        return
    from jpo_ray.config_file import load_config

    path = _demo_config() if arguments.command == "demo" else arguments.config
    config = load_config(path, arguments.overrides)
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(arguments.run_dir)):
        raise InputError(
            f"--run-dir {arguments.run_dir}: object stores are not supported yet; name a folder that all nodes see"
        )
    from jpo_ray.pipeline import STAGES, dry_run_judge, run_stages

    if arguments.command == "judge" and arguments.dry_run:
        dry_run_judge(config, arguments.run_dir)
        return
    stages = list(STAGES) if arguments.command in ("run", "demo") else [arguments.command]
    run_stages(config, arguments.run_dir, stages)
    if arguments.command in ("run", "demo"):
        (arguments.run_dir / ERROR_LOG).unlink(missing_ok=True)  # of an attempt that this one made good


def _analyze(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jpo_ray.pipeline.analyze import analyze

    source = arguments.run_dir or arguments.pairs
    if arguments.out is None and arguments.run_dir is None:
        raise InputError("analyze: --pairs needs --out, a folder for the page")
    out = arguments.out or arguments.run_dir / "analysis"
    analyze(source, arguments.judgments, out, arguments.people, arguments.list, Console())


def _annotate(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jpo_ray.annotation.serve import annotate, export_folder
    from jpo_ray.pipeline.annotate import comparisons_to_annotate

    if arguments.export:
        export_folder(arguments.out, Console())
        return
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"--limit {arguments.limit}: at least one comparison is needed")
    annotate(
        comparisons_to_annotate(arguments.pairs, arguments.run_dir, arguments.limit),
        arguments.out,
        arguments.annotators,
        per_comparison=arguments.per_comparison,
        host=arguments.host,
        port=arguments.port,
        guidelines=arguments.guidelines,
        release_after_hours=arguments.release_after,
        console=Console(),
    )


def _serve(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jpo_ray.config_serve import load_serve_config
    from jpo_ray.serving.run import serve_run

    serve_run(load_serve_config(arguments.config, arguments.overrides, arguments.run_dir), Console())


def _scale(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jpo_ray.config_experiment import load_experiment
    from jpo_ray.pipeline.scale import scale

    experiment = load_experiment(arguments.experiment, arguments.overrides)
    scale(experiment, arguments.run_dir, arguments.experiment.stem, Console())


def _alpaca_eval(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jpo_ray.pipeline.alpaca import export_outputs, import_annotations

    if (arguments.action == "import") != bool(arguments.annotations):
        needs = "needs the files of annotations" if arguments.action == "import" else "takes no files"
        raise InputError(f"alpaca-eval {arguments.action}: {needs}")
    if arguments.action == "export":
        export_outputs(arguments.run_dir, arguments.out, Console())
    else:
        import_annotations(arguments.run_dir, arguments.annotations, arguments.out, Console())


OWN_COMMANDS = {
    "analyze": _analyze,
    "annotate": _annotate,
    "serve": _serve,
    "scale": _scale,
    "alpaca-eval": _alpaca_eval,
}


def _works_on_files(arguments: argparse.Namespace) -> bool:
    """Judge or evaluate files where they are given. Raises `InputError` for flags that do not go together."""
    if arguments.command == "report":
        return _compares(arguments)
    judging = arguments.command == "judge"
    needed = ["pairs", "out"] if judging else ["samples", "gold", "out"]
    dry_run = judging and arguments.dry_run
    files = [name for name in needed if getattr(arguments, name)]
    run = [name for name in ("config", "run_dir") if getattr(arguments, name)]
    complete = files == needed or (dry_run and files[:1] == ["pairs"])
    if not files and len(run) == 2:
        return False
    if run or not complete:
        flags = " and ".join(f"--{name}" for name in needed)
        raise InputError(f"{arguments.command}: takes --config and --run-dir, or {flags}")
    from rich.console import Console

    from jpo_ray.config_file import load_files_config

    config = load_files_config(arguments.overrides)
    if judging:
        from jpo_ray.pipeline.judge_files import judge_file

        judge_file(arguments.pairs, arguments.out, config, Console(), dry_run=dry_run)
    else:
        from jpo_ray.pipeline.evaluate_files import evaluate_file

        by_order = arguments.by_order
        evaluate_file(arguments.samples, arguments.gold, arguments.out, config, Console(), by_order=by_order)
    return True


def _compares(arguments: argparse.Namespace) -> bool:
    """Compare two runs where they are given."""
    compared, run = arguments.compare and arguments.out, arguments.config and arguments.run_dir
    if bool(compared) == bool(run) or (arguments.compare is None) != (arguments.out is None):
        raise InputError("report: takes --config and --run-dir, or --compare and --out")
    if not compared:
        return False
    from rich.console import Console

    from jpo_ray.evaluation.comparison import compare_runs
    from jpo_ray.files import output_folder

    with output_folder(arguments.out):
        compare_runs(tuple(arguments.compare), arguments.out)
    Console().print(f"Comparison: {arguments.out / 'index.html'}", highlight=False, soft_wrap=True)
    return True


def _demo_config() -> Path:
    return Path(__file__).parent / "sandbox" / "demo.yaml"


def _sandbox(arguments: argparse.Namespace) -> None:
    if arguments.action == "data":
        import json

        from jpo_ray.sandbox import make_rows

        try:
            rows = make_rows(arguments.split, arguments.count, arguments.seed)
        except ValueError as error:
            raise InputError(f"--count {arguments.count}: {error}") from error
        try:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            staged = arguments.out.with_name(f".{arguments.out.name}.part")
            staged.write_text("".join(json.dumps(row) + "\n" for row in rows))
            staged.replace(arguments.out)
        except OSError as error:
            raise InputError(f"--out {arguments.out}: cannot be written ({error.strerror})") from error
        print(f"{len(rows)} rows: {arguments.out}")
        return
    from jpo_ray.sandbox.pretrain import pretrain

    options = {} if arguments.examples is None else {"examples": arguments.examples}
    try:
        facts = pretrain(arguments.out, seed=arguments.seed, **options)
    except ValueError as error:
        raise InputError(f"--examples {arguments.examples}: {error}") from error
    print(", ".join(f"{name} {value:.4g}" for name, value in facts.items()))


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 where all went well, 2 on bad input, 1 on a failure at work."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") or "=" not in text for text in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides may stand between flags
        arguments.overrides = [*arguments.overrides, *rest]
    try:
        run_command(arguments)
    except InputError as error:
        print(f"jpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jpo: stopped; the same command goes on from the last finished stage or checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(error, getattr(arguments, "run_dir", None))
    return 0


def _failed(error: Exception, run_dir: Path | None) -> int:
    """One line for people, the traceback into the run directory for whoever mends it."""
    reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
    print(f"jpo: failed: {type(error).__name__}: {reason[:400]}", file=sys.stderr)
    if run_dir is None or not run_dir.is_dir() or os.environ.get("JPO_DEBUG"):
        traceback.print_exception(error)
    else:
        path = run_dir / ERROR_LOG
        path.write_text("".join(traceback.format_exception(error)))
        print(f"jpo: the whole of it: {path}; the same command goes on where this one stopped", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
