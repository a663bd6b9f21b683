"""The command line of `jpo`: its commands and their flags. What they do is in `cli.py` and `cli_commands.py`."""

import argparse
from pathlib import Path

from jpo_ray import __version__
from jpo_ray.store import location

STAGE_HELP = {
    "items": "read the data into items",
    "pairs": "embed instructions and choose which items to compare",
    "judge": "compare each pair, in both orders; decisive verdicts become preferences",
    "sft": "fine-tune the base model on one response per instruction",
    "reference": "log-probs under the SFT model of every item that trainings read, cached across runs",
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
    plan = commands.add_parser("plan", help="what a run will take, and what is missing for it; nothing is downloaded")
    plan.add_argument("--config", type=Path, required=True, help="YAML file; see configs/ and configs/experiments/")
    plan.add_argument("--run-dir", type=location, help="where it would go, for its free space")
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="plan.train_instructions=12000, plan.mfu=0.4"
    )
    _add_annotate(commands.add_parser("annotate", help="a web page on which people compare"))
    serve = commands.add_parser("serve", help="an OpenAI-compatible endpoint for a run's models")
    serve.add_argument("--run-dir", type=location, help="folder of a run that has trained models")
    serve.add_argument("--config", type=Path, help="YAML file; see configs/serve/")
    serve.add_argument("overrides", nargs="*", metavar="key=value", help="override any key: port=8001, replicas=2")
    _add_export(commands.add_parser("export", help="a model of a run as a folder to use elsewhere, or to publish"))
    scaling = commands.add_parser("scale", help="an experiment: runs over a grid, with curves and tables")
    scaling.add_argument("--experiment", type=Path, required=True, help="YAML file; see configs/experiments/")
    scaling.add_argument("--run-dir", type=location, required=True, help="folder of the experiment's runs")
    scaling.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any key of all runs")
    alpaca = commands.add_parser("alpaca-eval", help="files for AlpacaEval, and win rates from its annotations")
    alpaca.add_argument("action", choices=("export", "import"))
    alpaca.add_argument("annotations", nargs="*", type=Path, metavar="FILE", help="import: its annotations.json files")
    alpaca.add_argument("--run-dir", type=location, required=True, help="folder of a run that has samples")
    alpaca.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    _add_submit(commands.add_parser("submit", help="run a command on a Ray cluster, as `ray job submit` does"))
    demo = commands.add_parser("demo", help="the whole pipeline on the embedded sandbox, a few minutes on two cores")
    demo.add_argument("--run-dir", type=location, default=Path("runs/demo"), help="default: runs/demo")
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


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", metavar="URL", help="http://HEAD:8265; default: RAY_API_SERVER_ADDRESS")
    parser.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR", help="folder to send, and to run in; default: this"
    )
    parser.add_argument("--runtime-env", type=Path, metavar="FILE", help="YAML file; see configs/cluster/")
    parser.add_argument("--no-wait", action="store_true", help="do not show its output until it ends")
    parser.add_argument("entrypoint", nargs="+", metavar="-- COMMAND", help="-- python jobs/align.py --config ...")


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--run-dir", type=location, help="folder of a run that is judged")
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
    of.add_argument("--run-dir", type=location, help="folder of a run that has pairs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the answers; gone on with")
    parser.add_argument("--annotators", nargs="+", default=[], metavar="NAME", help="each gets a link of their own")
    parser.add_argument("--per-comparison", type=int, metavar="K", help="people for each (default: as before, else 2)")
    parser.add_argument("--limit", type=int, metavar="N", help="draw so many (of a run: joint ones, with their items')")
    parser.add_argument("--guidelines", type=Path, metavar="FILE", help="text to show instead of the project's")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8420, help="default: 8420")
    parser.add_argument("--release-after", type=float, default=24, metavar="HOURS", help="of an open comparison")
    parser.add_argument("--export", action="store_true", help="only write what is answered, also beside a server")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", type=location, required=True, help="folder of a run that has trained models")
    parser.add_argument("--model", required=True, metavar="NAME", help="`sft` or an entry of `train`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the model")
    parser.add_argument("--adapter", action="store_true", help="leave an adapter one, instead of merging it")
    parser.add_argument("--base", metavar="ID", help="with --adapter: what its base is called where it will be used")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="also send it to the Hugging Face Hub")
    parser.add_argument("--public", action="store_true", help="make a new repository public; default: private")


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
    files.add_argument("--compare", type=location, nargs=2, metavar="RUN_DIR", help="two reported runs to compare")
    files.add_argument("--out", type=Path, metavar="DIR", help="folder for their comparison")


ADD_FILES = {"judge": _add_judge_files, "evaluate": _add_evaluate_files, "report": _add_report_files}


def _add_run(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--config", type=Path, required=required, help="YAML file; see configs/")
    parser.add_argument(
        "--run-dir",
        type=location,
        required=required,
        help="folder of the run's artifacts, or its URI on an object store (s3://BUCKET/PATH)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any key of the config")
