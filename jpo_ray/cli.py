"""`jpo`: every stage of the pipeline as a command.

Heavy packages are imported by the command that needs them, so that `jpo --help` answers at once.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

from jpo_ray.cli_commands import OWN_COMMANDS, require_lasting
from jpo_ray.cli_parser import ADD_FILES, build_parser
from jpo_ray.errors import InputError
from jpo_ray.runs import run_root
from jpo_ray.stopping import sigterm_stops

ERROR_LOG = "error.log"


def run_command(arguments: argparse.Namespace) -> int | None:
    """Carry out a parsed command line; returns an exit code that is not this process's own. Raises `InputError`."""
    if arguments.command == "sandbox":
        _sandbox(arguments)
        return None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.command in OWN_COMMANDS:
        return OWN_COMMANDS[arguments.command](arguments)
    if arguments.command in ADD_FILES and _works_on_files(arguments):
        return None
    from jpo_ray.config_file import load_config

    path = _demo_config() if arguments.command == "demo" else arguments.config
    config = load_config(path, arguments.overrides)
    require_lasting(arguments.run_dir)
    from jpo_ray.pipeline import STAGES, dry_run_judge, run_stages

    if arguments.command == "judge" and arguments.dry_run:
        dry_run_judge(config, arguments.run_dir)
        return None
    stages = list(STAGES) if arguments.command in ("run", "demo") else [arguments.command]
    run_stages(config, arguments.run_dir, stages)
    if arguments.command in ("run", "demo"):
        (run_root(arguments.run_dir) / ERROR_LOG).unlink(missing_ok=True)  # of an attempt that this one made good
    return None


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
    _add_rest(parser, arguments, rest)
    try:
        with sigterm_stops():
            code = run_command(arguments)
    except InputError as error:
        print(f"jpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jpo: stopped; the same command goes on from the last finished stage or checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(error, getattr(arguments, "run_dir", None))
    return code or 0


def _add_rest(parser: argparse.ArgumentParser, arguments: argparse.Namespace, rest: list[str]) -> None:
    """Words that stand after flags: argparse takes a list of them only where its first one stands."""
    if all("=" in text and not text.startswith("-") for text in rest) and hasattr(arguments, "overrides"):
        arguments.overrides = [*arguments.overrides, *rest]
    elif not any(text.startswith("-") for text in rest) and hasattr(arguments, "annotations"):
        arguments.annotations = [*arguments.annotations, *map(Path, rest)]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")


def _failed(error: Exception, where: Path | str | None) -> int:
    """One line for people, the traceback into the run directory for whoever mends it."""
    reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
    print(f"jpo: failed: {type(error).__name__}: {reason[:400]}", file=sys.stderr)
    run_dir = None if where is None else run_root(where)
    written = "".join(traceback.format_exception(error))
    again = "the same command goes on where this one stopped"
    if run_dir is None or not run_dir.is_dir() or os.environ.get("JPO_DEBUG"):
        print(written, end="", file=sys.stderr)
        return 1
    path = run_dir / ERROR_LOG
    try:
        path.write_text(written)
    except OSError:  # a full or read-only disk, which is then what failed
        print(f"jpo: {again}", file=sys.stderr)
    else:
        print(f"jpo: the whole of it: {path}; {again}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
