"""`jpo evaluate --samples FILE --gold FILE --out DIR`: win rates of a file of samples, without a run directory."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from jpo_ray import records
from jpo_ray.config_file import FilesConfig
from jpo_ray.data.sources import read_rows
from jpo_ray.errors import InputError
from jpo_ray.evaluation.length_control import controlled_win_rates
from jpo_ray.evaluation.win_rates import judge_samples, win_rate_table
from jpo_ray.feedback.judge import judgment_counts
from jpo_ray.files import output_folder, write_json
from jpo_ray.pipeline.annotating import open_file_annotator
from jpo_ray.pipeline.console import progress_bar

BOOTSTRAP_SAMPLES = 2000
MODEL = "samples"  # where no row names its generator
# The formats that the paper's authors train with: their samples carry them around the instruction.
TEMPLATES = (
    re.compile(
        r"### Instructions: You are given a social media post, summarize it accordingly\. ?\nPost: (.*)\n\n"
        r"### Response:\s*",
        re.DOTALL,
    ),
    re.compile(r"### Instructions: (.*)\n\n### Response:\s*", re.DOTALL),
)


def evaluate_file(
    samples: Path, gold: Path, out: Path, config: FilesConfig, console: Console, *, by_order: bool = False
) -> None:
    """Judge each sample against the gold response of its instruction; `out` gets win rates and judgments.

    Samples are `{instruction, outputs}` or AlpacaEval's `{instruction, output, generator}`, gold is `{instruction,
    gold_response}`; they are matched by instruction, or by order. Raises `InputError` for what does not match.
    """
    rows, golds = _matched(samples, gold, by_order=by_order)
    with (
        open_file_annotator(config.judge, config.cluster) as annotator,
        progress_bar(console, f"judging {samples.name}") as bar,
    ):
        bar.begin(len(rows))
        judged = judge_samples(
            pa.Table.from_pylist(rows), golds, annotator, lambda share, note: bar.to(int(share * len(rows)), note=note)
        )
    table = pa.Table.from_pylist(judged, records.SAMPLE_JUDGMENTS)
    found = controlled_win_rates(table, pa.Table.from_pylist(rows), golds, BOOTSTRAP_SAMPLES, seed=0)
    with output_folder(out):
        records.write_table(out / "judgments.parquet", judged, records.SAMPLE_JUDGMENTS)
        write_json(out / "win_rate.json", _summary(found, judged))
    console.print(win_rate_table(found))
    console.print(f"{out}: win_rate.json, judgments.parquet", highlight=False, soft_wrap=True)


def _summary(found: Mapping[str, Any], judged: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the samples; of each generator under its name where there are several."""
    of_model = {}
    for model, entry in found["models"].items():
        counts = judgment_counts([row for row in judged if row["model"] == model])
        of_model[model] = {
            "win_rate": entry["win_rate"]["mean"],
            **{name: entry[name] for name in ("wins", "ties", "losses", "invalid", "n", "ci95")},
            "length_controlled": entry["length_controlled"],
            "flip_rate": counts["flip_rate"],
            "flip_rate_ci95": counts["flip_rate_ci95"],
            "tokens": counts["tokens"],
            "cost": counts["cost"],
        }
    return next(iter(of_model.values())) if len(of_model) == 1 else of_model


def _matched(samples: Path, gold: Path, *, by_order: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of samples, and gold responses by the id of the instruction."""
    golds: dict[str, str] = {}
    in_order = []
    for where, row in read_rows(gold):
        instruction, response = bare(_text(row, "instruction", where)), _text(row, "gold_response", where)
        in_order.append(instruction)
        if golds.setdefault(records.instruction_id(instruction), response) != response:
            raise InputError(f"{where}: another gold response for an instruction that stands there already")
    rows = []
    for number, (where, row) in enumerate(read_rows(samples)):
        asked, generator = _text(row, "instruction", where), row.get("generator") or MODEL
        if by_order:
            if number >= len(in_order):
                raise InputError(f"{where}: --by-order: {gold} has only {len(in_order)} rows")
            instruction = in_order[number]
        else:
            instruction = bare(asked)
            if records.instruction_id(instruction) not in golds:
                raise InputError(
                    f"{where}: {gold} has no gold response for the instruction {instruction[:60]!r}; if the rows of "
                    "both files belong together in their order, use --by-order"
                )
        rows.append(
            {
                "instruction_id": records.instruction_id(instruction),
                "instruction": instruction,
                "model": str(generator),
                "temperature": 0.0,
                "seed": 0,
                "response": _text(row, "outputs" if "outputs" in row else "output", where),
            }
        )
    return rows, golds


def bare(instruction: str) -> str:
    """Without the blanks and the training template around it."""
    text = instruction.strip()
    return next((found[1].strip() for form in TEMPLATES if (found := form.fullmatch(text))), text)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    """A text, or the only one of a list."""
    value = row.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise InputError(f"{where}: `{name}` is {'missing' if name not in row else 'no text'}")
    return value
