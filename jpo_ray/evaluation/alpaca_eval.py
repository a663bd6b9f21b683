"""Samples to AlpacaEval (github.com/tatsu-lab/alpaca_eval), and its annotations back.

AlpacaEval compares two files of outputs to the same instructions. Gold responses are its reference, `output_1`; a
model at a temperature is a generator, `output_2`. Files lie as in its own folder of results, so that each run of

    alpaca_eval --model_outputs OUT/GENERATOR/model_outputs.json --reference_outputs OUT/reference_outputs.json \\
        --output_path OUT/GENERATOR

leaves its annotations beside the outputs that it judged, and overwrites no others.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from jpo_ray.config_base import NAME_PATTERN
from jpo_ray.data.sources import read_rows
from jpo_ray.errors import InputError
from jpo_ray.files import write_json
from jpo_ray.records import content_id

GOLD = "gold"  # the reference's name as a generator
# A preference is 1 where the reference is better, 2 where the model is, or between; these two are from its older files.
OLD_TIE, NO_ANSWER = 0.0, -1.0
SAMPLE_COLUMNS = ["instruction_id", "instruction", "model", "temperature", "seed", "response"]

Key = tuple[str, str, str]  # generator, instruction, output


def generator_name(model: str, temperature: float) -> str:
    """AlpacaEval's name of a model at a temperature; a folder's too, so a model of another form gets a hash."""
    stem = model
    if not re.fullmatch(NAME_PATTERN, model):
        readable = re.sub(r"[^A-Za-z0-9._-]+", "_", model)[:40].strip("._-")
        stem = f"{readable}-{content_id('generator', model)[:8]}".lstrip("-")
    return f"{stem}-t{float(temperature)!r}"


def write_outputs(samples: pa.Table, golds: Mapping[str, str], out: Path) -> list[Path]:
    """Write samples (`records.SAMPLES`) as AlpacaEval's model outputs, one file per model and temperature.

    Rows are `{instruction, output, generator}`. `golds` maps instruction ids to texts; those of the sampled
    instructions go to `out/reference_outputs.json`. Returns the files of outputs, in the order of the samples. Raises
    `InputError` where an instruction has no gold response.
    """
    outputs: dict[str, list[dict[str, str]]] = {}
    reference: dict[str, dict[str, str]] = {}
    rows = samples.select(SAMPLE_COLUMNS).to_pylist()
    _require_golds(rows, golds)
    for row in rows:
        generator, instruction, response = _key(row)
        gold = golds[row["instruction_id"]]
        reference[instruction] = {"instruction": instruction, "output": gold, "generator": GOLD}
        entry = {"instruction": instruction, "output": response, "generator": generator}
        outputs.setdefault(generator, []).append(entry)
    paths = []
    for generator, entries in outputs.items():
        paths.append(out / generator / "model_outputs.json")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        write_json(paths[-1], entries)
    write_json(out / "reference_outputs.json", list(reference.values()))
    return paths


def read_annotations(paths: Sequence[Path], samples: pa.Table, golds: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of `records.SAMPLE_JUDGMENTS` (a = sample, b = gold) from AlpacaEval's files of annotations.

    One row for each sample of the generators that the files name, in the samples' order. An annotation is of the
    samples that have its `generator_2`, `instruction` and `output_2`; equal ones share it, and the first carries its
    price. AlpacaEval shows each pair in one order, drawn at random, so `verdict_ba` is null; it does not count tokens,
    which are 0. Raises `InputError` for an annotation that cannot be read, is of no sample or is repeated, and for a
    sample that has none.
    """
    rows = samples.select(SAMPLE_COLUMNS).to_pylist()
    _require_golds(rows, golds)
    keyed = [(_key(row), row) for row in rows]
    wanted = {key: golds[row["instruction_id"]] for key, row in keyed}
    found: dict[Key, dict[str, Any]] = {}
    for path in paths:
        _collect(path, wanted, found)
    generators = {generator for generator, _, _ in found}
    covered = [(key, row) for key, row in keyed if key[0] in generators]
    lacking = [key for key, _ in covered if key not in found]
    if lacking:
        generator, instruction, _ = lacking[0]
        raise InputError(
            f"{', '.join(map(str, paths))}: {len(lacking)} of {len(covered)} samples have no annotation, the first is "
            f"{generator}'s of the instruction {instruction[:60]!r}; let AlpacaEval annotate all of each file"
        )
    judged = []
    for key, row in covered:
        judged.append({name: row[name] for name in ("instruction_id", "model", "temperature", "seed")} | found[key])
        found[key] = found[key] | {"cost": 0.0}
    return judged


def _collect(path: Path, wanted: Mapping[Key, str], found: dict[Key, dict[str, Any]]) -> None:
    """Put a file's judgments into `found`; raises for the first that cannot be used, and counts the others."""
    generators = {generator for generator, _, _ in wanted}
    first = ""
    count = unmatched = repeated = 0
    for where, annotation in read_rows(path):
        count += 1
        names = ("generator_2", "instruction", "output_2", "output_1")
        generator, instruction, output, baseline = (_text(annotation, name, where) for name in names)
        key = (generator, instruction, output)
        if wanted.get(key) == baseline and key not in found:
            found[key] = _judgment(annotation, where)
            continue
        if generator not in generators:
            trouble = f"no sample is of `generator_2` {generator!r}"
        elif key not in wanted:
            trouble = f"{generator} has no sample of this `instruction` and `output_2`"
        elif wanted[key] != baseline:
            trouble = "`output_1` is not the gold response"
        else:
            trouble = f"a second annotation of {generator}'s sample of this instruction"
        unmatched += wanted.get(key) != baseline
        repeated += wanted.get(key) == baseline
        first = first or f"{where}: {trouble}: {instruction[:60]!r}"
    if first:
        raise InputError(f"{first} (of {count} annotations {unmatched} match no sample, {repeated} are repeated)")


def _judgment(annotation: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The columns of a judgment, but for what names the sample."""
    if "preference" not in annotation:
        raise InputError(f"{where}: `preference` is missing")
    preference = _number(annotation, "preference", where)
    probability = None
    if preference is None or preference == NO_ANSWER:
        verdict = "invalid"
    elif preference == OLD_TIE:
        verdict = "tie"
    elif 1 <= preference <= 2:
        verdict = "tie" if preference == 1.5 else "a" if preference > 1.5 else "b"
        probability = None if preference.is_integer() else preference - 1
    else:
        raise InputError(f"{where}: `preference` is {preference:g}; it goes from 1 (output_1) to 2 (output_2)")
    answer = annotation.get("raw_completion")
    return {
        "annotator": str(annotation.get("annotator") or "alpaca_eval"),
        "verdict": verdict,
        "verdict_ab": verdict,
        "verdict_ba": None,
        "probability": probability,
        "gap": None,
        "text_ab": answer if isinstance(answer, str) else "" if answer is None else json.dumps(answer),
        "text_ba": None,
        "tokens": 0,
        "cost": _number(annotation, "price_per_example", where) or 0.0,
        "reason": "AlpacaEval has no preference" if verdict == "invalid" else "",
    }


def _key(row: Mapping[str, Any]) -> Key:
    return generator_name(row["model"], row["temperature"]), row["instruction"], row["response"]


def _require_golds(rows: Sequence[Mapping[str, Any]], golds: Mapping[str, str]) -> None:
    lacking = {row["instruction_id"]: row["instruction"] for row in rows if row["instruction_id"] not in golds}
    if lacking:
        total = len({row["instruction_id"] for row in rows})
        raise InputError(
            f"no gold response for the instruction {next(iter(lacking.values()))[:60]!r} ({len(lacking)} of {total} "
            "lack one); AlpacaEval needs it as its reference: mark one response of each instruction as gold in the "
            "test source"
        )


def _text(annotation: Mapping[str, Any], name: str, where: str) -> str:
    value = annotation.get(name)
    if not isinstance(value, str):
        raise InputError(f"{where}: `{name}` is {'no text' if name in annotation else 'missing'}")
    return value


def _number(annotation: Mapping[str, Any], name: str, where: str) -> float | None:
    """A number; None where it is null, not a number (pandas' null) or missing."""
    value = annotation.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InputError(f"{where}: `{name}` is no number")
    return None if value is None or math.isnan(value) else float(value)
