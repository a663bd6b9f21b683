"""Sources: JSON Lines, JSON and Parquet files and Hugging Face datasets, read into rows of one or two items.

Texts are kept exactly as they stand. A conversation becomes one instruction and one response: the response is its last
assistant message, the instruction all before it (what follows is left out). A lone user message is taken as it is;
anything longer, or with a system message, is written out as blocks `role: content` with an empty line between, since an
item's instruction is one text. The string `\\n\\nHuman: ...\\n\\nAssistant: ...` (Anthropic HH) is such a conversation.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jpo_ray.config import Source
from jpo_ray.errors import InputError
from jpo_ray.runs import hash_file

Item = tuple[str, str]  # instruction, response
LabelVerdict = Literal["a", "b", "tie"]
Record = tuple[str, object]  # where it stands, and the raw row (a `BadRow` where it could not even be read)

# Columns that a format cannot do without; where several formats fit, a format of pairs is taken before the others.
REQUIRED: dict[str, tuple[str, ...]] = {
    "dove": ("i_chosen", "r_chosen", "i_reject", "r_reject"),
    "dove_raw": ("instruction_0", "response_0", "instruction_1", "response_1"),
    "dove_single": ("instruction", "response_0", "response_1"),
    "trl_preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "gold": ("instruction", "gold_response"),
    "sft": ("instruction", "response"),
}
_WITHOUT_PAIRS = ("messages", "gold", "sft")
_ID_COLUMNS = ("id", "instruction_id", "row_id")
_COLUMNS = {*_ID_COLUMNS, "feedback", "prompt", "gold_response"}.union(*REQUIRED.values())
_FEEDBACK: dict[str, LabelVerdict] = {"0": "a", "1": "b", "2": "tie"}  # the better response by number, or equal
_FILE_SUFFIXES = {".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip"}
_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data: the items it holds and what it says about them."""

    items: tuple[Item, ...]  # one or two
    verdict: LabelVerdict | None  # of items[0] against items[1], where the data say
    gold: str | None  # gold response to items[0]'s instruction
    where: str  # "file.jsonl line 12" or "file.parquet row 12", for errors
    kind: str  # its format


@dataclass(frozen=True)
class SourceRows:
    """What one source holds."""

    name: str  # the path or dataset id, as the config writes it
    format: str
    rows: list[Row]
    skipped: dict[str, int]  # reason -> number of bad rows left out
    files: list[tuple[str, str]]  # (path, sha256); for a dataset its name and split, and the sha256 of the rows read


class BadRow(InputError):
    """A row that cannot be used; skipped rows are counted by `reason`."""

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{where}: {detail or reason}; mend it or set items.on_bad_rows: skip")
        self.reason = reason


def read_source(source: Source, on_bad_rows: Literal["fail", "skip"]) -> SourceRows:
    """Read a source's rows. Raises `InputError` that names file, row and key of what cannot be read."""
    path = Path(source.path).expanduser()
    if path.is_file():
        rows = parse_rows(_file_records(path, source.path), source, on_bad_rows)
        return replace(rows, files=[(source.path, hash_file(path))])
    if not path.is_dir() and _names_a_file(source.path):
        raise InputError(f"{source.path}: no such file (nor a Hugging Face dataset id)")
    dataset, label = _load_dataset(source)
    digest = hashlib.sha256()
    rows = parse_rows(_dataset_records(dataset, label, digest.update), source, on_bad_rows)
    return replace(rows, files=[(label, digest.hexdigest())])


def parse_rows(records: Iterable[Record], source: Source, on_bad_rows: Literal["fail", "skip"]) -> SourceRows:
    """Make raw rows into rows; also for rows that come from no file. Raises `InputError` as `read_source` does."""
    if unknown := sorted(set(source.columns) - _COLUMNS):
        raise InputError(f"{source.path}: columns: `{unknown[0]}` is none of {', '.join(sorted(_COLUMNS))}")
    rows: list[Row] = []
    skipped: Counter[str] = Counter()
    first_bad: BadRow | None = None
    kind = ""
    seen: dict[tuple[str, object], str] = {}
    for where, record in islice(records, source.limit):
        try:
            values = _values(record, source.columns, where)
            kind = kind or _format_of(values, source, where)
            row = _row(values, kind, where)
            _check_id(values, where, seen)
        except BadRow as bad:
            if on_bad_rows == "fail":
                raise
            first_bad = first_bad or bad
            skipped[bad.reason] += 1
        else:
            rows.append(row)
    if not rows:
        raise InputError(f"no usable row: {first_bad}" if first_bad else f"{source.path}: has no rows")
    return SourceRows(source.path, kind, rows, dict(skipped), [])


def _values(record: object, columns: dict[str, str], where: str) -> dict[str, Any]:
    """The raw row by our column names."""
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow(where, "not an object", f"the row is {shorten(record)}, not an object of columns")
    if not columns:
        return record
    renamed = {*columns, *columns.values()}
    kept = {name: value for name, value in record.items() if name not in renamed}
    return kept | {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}


def _format_of(values: dict[str, Any], source: Source, where: str) -> str:
    """The format that the columns fit; `BadRow` where none does, or several that mean different things."""
    missing = {kind: [name for name in names if name not in values] for kind, names in REQUIRED.items()}
    found = f"columns found: {', '.join(map(str, values)) or 'none'}"
    if source.format != "auto":
        for name in missing[source.format]:
            raise BadRow(where, f"missing `{name}`", f"`{name}` is missing, format {source.format} needs it; {found}")
        return source.format
    fitting = [kind for kind in REQUIRED if not missing[kind]]
    if not fitting:
        known = "; ".join(f"{kind} ({', '.join(names)})" for kind, names in REQUIRED.items())
        raise BadRow(where, "unknown columns", f"{found}; formats known: {known}; rename with the source's `columns`")
    if fitting[0] in _WITHOUT_PAIRS and len(fitting) > 1:
        raise BadRow(
            where, "ambiguous columns", f"{found}; they fit {' and '.join(fitting)}: set the source's `format`"
        )
    return fitting[0]


def _check_id(values: dict[str, Any], where: str, seen: dict[tuple[str, object], str]) -> None:
    for name in _ID_COLUMNS:
        value = values.get(name)
        if isinstance(value, str | int) and (first := seen.setdefault((name, value), where)) != where:
            raise BadRow(where, f"repeated `{name}`", f"`{name}` {shorten(value)} stands already at {first}")


def _row(values: dict[str, Any], kind: str, where: str) -> Row:
    verdict: LabelVerdict | None = "a" if kind in ("dove", "trl_preference") else None
    gold: str | None = None
    items: tuple[Item, ...]
    if kind == "trl_preference":
        items = (_trl_item(values, "chosen", where), _trl_item(values, "rejected", where))
    elif kind == "messages":
        items = (_item(_messages(values, "messages", where), "messages", where),)
    elif kind == "dove_single":
        instruction, *responses = [_text(values, name, where) for name in REQUIRED[kind]]
        items = ((instruction, responses[0]), (instruction, responses[1]))
        gold = None if values.get("gold_response") is None else _text(values, "gold_response", where)
    else:  # the columns come as instruction, response, instruction, response
        texts = [_text(values, name, where) for name in REQUIRED[kind]]
        items = tuple(zip(texts[::2], texts[1::2], strict=True))
    if kind in ("dove_raw", "dove_single"):
        verdict = _feedback(values.get("feedback"), where)
    elif kind == "gold":
        gold = items[0][1]
    return Row(items, verdict, gold, where, kind)


def _feedback(value: Any, where: str) -> LabelVerdict | None:
    if value is None or value != value:  # NaN is what pandas writes for an absent number
        return None
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    verdict = None if isinstance(number, bool) else _FEEDBACK.get(str(number))
    if verdict is None:
        detail = f"`feedback` is {shorten(value)}, not 0 (first better), 1 (second better) or 2 (equal)"
        raise BadRow(where, "bad `feedback`", detail)
    return verdict


def _trl_item(values: dict[str, Any], side: str, where: str) -> Item:
    """The item of one side; its instruction is `prompt` unless the side is a whole conversation."""
    prompt, answer = values.get("prompt"), values.get(side)
    if isinstance(answer, list):
        messages = _messages(values, side, where)
    elif prompt is None:
        messages = _hh_messages(_text(values, side, where))
    else:
        messages = [("assistant", _text(values, side, where))]
    if isinstance(prompt, list):
        messages = [*_messages(values, "prompt", where), *messages]
    elif prompt is not None and len(messages) == 1:  # else the prompt only repeats its start, as in UltraFeedback
        messages = [("user", _text(values, "prompt", where)), *messages]
    return _item(messages, side, where)


def _hh_messages(text: str) -> list[Item]:
    before, *turns = _HH_TURN.split(text)
    messages = [("user", before)] if before.strip() else []
    roles = ["user" if name == "Human" else "assistant" for name in turns[::2]]
    return messages + list(zip(roles, turns[1::2], strict=True))


def _messages(values: dict[str, Any], name: str, where: str) -> list[Item]:
    """(role, content) of each message in a column."""
    given = values.get(name)
    if not isinstance(given, list):
        raise BadRow(where, f"bad `{name}`", f"`{name}` is {shorten(given)}, not a list of messages")
    for message in given:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
            raise BadRow(where, f"bad `{name}`", f"`{name}` holds {shorten(message)}, not {{role, content}}")
    return [(message["role"], _string(message["content"], f"{name}.content", where)) for message in given]


def _item(messages: list[Item], name: str, where: str) -> Item:
    """Instruction and response of a conversation."""
    messages = [(role, content) for role, content in messages if role != "system" or content.strip()]
    last = max((index for index, (role, _) in enumerate(messages) if role == "assistant"), default=0)
    if last == 0:
        raise BadRow(where, f"bad `{name}`", f"`{name}` has no assistant message that answers another one")
    before, response = messages[:last], messages[last][1]
    lone = len(before) == 1 and before[0][0] == "user"
    instruction = before[0][1] if lone else "\n\n".join(f"{role}: {content}" for role, content in before)
    both = {f"{name} instruction": instruction, f"{name} response": response}
    return _text(both, f"{name} instruction", where), _text(both, f"{name} response", where)


def _text(values: dict[str, Any], name: str, where: str) -> str:
    if name not in values:
        raise BadRow(where, f"missing `{name}`")
    text = _string(values[name], name, where)
    if not text.strip():
        raise BadRow(where, f"empty `{name}`")
    return text


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(where, f"`{name}` is not text", f"`{name}` is {shorten(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell and no file can store
            raise BadRow(where, f"`{name}` is not Unicode") from error
    return value


def _file_records(path: Path, name: str) -> Iterator[Record]:
    """Rows of a file, by its suffix."""
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{name}: suffix `{path.suffix}` is not known; name it {', '.join(readers)} by what it holds")
    try:
        yield from reader(path, name)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{name}: cannot be read as {path.suffix} ({str(error).splitlines()[0]})") from error


def _jsonl(path: Path, name: str) -> Iterator[Record]:
    with path.open("rb") as file:  # as bytes: a line ends at a newline only, not at U+2028
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{name} line {number}", _parsed(line.rstrip(), name, number)


def _json(path: Path, name: str) -> Iterator[Record]:
    rows = _parsed(path.read_bytes(), name, 1)
    if not isinstance(rows, list):
        detail = f"the file holds {shorten(rows)}, not a list of objects (one object per line is .jsonl)"
        rows = [rows if isinstance(rows, BadRow) else BadRow(name, "not a list", detail)]
    yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, start=1))


def _parquet(path: Path, name: str) -> Iterator[Record]:
    with pq.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, start=1))


def _parsed(data: bytes, name: str, line: int) -> object:
    """The JSON value of `data`, which starts at `line` of a file; or a `BadRow` that says why there is none."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        return BadRow(f"{name} line {line}", "not UTF-8", f"not UTF-8 text (byte 0x{data[error.start]:02x})")
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        return BadRow(f"{name} line {line}", "broken JSON", f"broken JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets nested as deep
        return BadRow(f"{name} line {line}", "broken JSON", f"broken JSON ({str(error).split(';')[0]})")


def _names_a_file(path: str) -> bool:
    """Whether a path that does not exist was meant as one, and not as a dataset id (`name` or `owner/name`)."""
    first, *rest = path.split("/")
    own_folder = bool(rest) and Path(first).is_dir()
    return Path(path).suffix.lower() in _FILE_SUFFIXES or path[:1] in "./~" or len(rest) > 1 or own_folder


def _load_dataset(source: Source) -> tuple[Any, str]:
    """One split (`train` by default) of a Hugging Face dataset, from the Hub or a folder; and what to call it."""
    from datasets import load_dataset  # here, since it takes a second to import

    split = source.split or "train"
    try:
        return load_dataset(source.path, name=source.name, split=split), f"{source.path}[{split}]"
    except Exception as error:  # the library and the network raise dozens of kinds
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{source.path}: no Hugging Face dataset could be loaded, split {split} ({problem[:300]}); check the id, "
            "the source's `name` and `split`, the network and HF_TOKEN"
        ) from error


def _dataset_records(dataset: Any, label: str, feed: Callable[[bytes], None]) -> Iterator[Record]:
    """Rows of a dataset; `feed` is given their content, for the hash that stands for a file's."""
    for number, row in enumerate(dataset, start=1):
        feed(json.dumps(row, sort_keys=True, default=str).encode())
        yield f"{label} row {number}", row
