"""Judging shard by shard: pairs in, judgments and preferences out, never all of them in memory."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records, shards
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.feedback.annotators import Annotator
from jpo_ray.feedback.by_scores import ByScores, Scores, judge_by_scores
from jpo_ray.feedback.judge import comparisons, preferences, texts_of
from jpo_ray.feedback.tally import Tally, tally
from jpo_ray.pipeline.annotating import judge_with_bar
from jpo_ray.pipeline.console import Bar

AT_ONCE = 2**16  # comparisons that annotators who are asked one by one get at a time
JUDGMENTS, PREFERENCES, OTHERS = "judgments.parquet", "preferences.parquet", "others"


@dataclass(frozen=True)
class Judged:
    """What judging some pairs gave: files' contents, and what they say together."""

    judgments: pa.Buffer
    preferences: pa.Buffer
    tally: Tally
    decisive: int
    joint: int  # joint pairs, and those of them with a valid verdict
    joint_valid: int


@dataclass
class Sums:
    """Of all shards."""

    tally: Tally = field(default_factory=Tally)
    decisive: int = 0
    joint: int = 0
    joint_valid: int = 0

    def add(self, judged: Judged) -> None:
        self.tally += judged.tally
        self.decisive += judged.decisive
        self.joint += judged.joint
        self.joint_valid += judged.joint_valid


def judged(pairs: pa.Table, judgments: pa.Table) -> Judged:
    """From a shard of pairs and its judgments (`records.JUDGMENTS`)."""
    decisive = preferences(pairs, judgments)
    joint = pairs["pair_id"].filter(pc.equal(pairs["protocol"], "joint"))
    valid = judgments["pair_id"].filter(pc.not_equal(judgments["verdict"], "invalid"))
    return Judged(
        shards.shard_bytes(judgments, records.JUDGMENTS),
        shards.shard_bytes(decisive, records.PREFERENCES),
        tally(judgments),
        len(decisive),
        len(joint),
        pc.sum(pc.is_in(valid, value_set=joint)).as_py() or 0,
    )


def judge_shards(
    ray: Callable[[], Any],
    cluster: ClusterConfig,
    annotator: Annotator,
    pairs: Path,
    items: pa.Table,
    out: Path,
    bar: Bar,
) -> Sums:
    """Judge all pairs of a table, and write judgments and preferences in shards of the same names.

    An annotator that decides by scores gets each item once; where there are more than `shards.FEW` comparisons, they
    follow in Ray tasks, for which `cluster` is `judge`'s. Others are asked from here.
    """
    files, names = shards.files_of(pairs), shards.shard_names(pairs)
    bar.begin(shards.row_count(pairs))
    used = items.filter(pc.is_in(items["item_id"], value_set=shards.distinct_values(files, ["item_a", "item_b"])))
    if annotator.by_scores:
        found = _scored(ray, cluster, annotator, files, used, bar)
    else:
        found = _asked(annotator, files, used, bar)
    sums = Sums()
    for name, of_shard in zip(names, found, strict=True):
        write_judged(out, name, of_shard)
        sums.add(of_shard)
    return sums


def write_judged(out: Path, name: str | None, of_shard: Judged) -> None:
    shards.shard_path(out / JUDGMENTS, name).write_bytes(of_shard.judgments)
    shards.shard_path(out / PREFERENCES, name).write_bytes(of_shard.preferences)


def add_judgments(out: Path, others: Sequence[Path]) -> None:
    """Append what other annotators said, shard by shard, to the judgments in `out`; `others` are deleted."""
    for name in shards.shard_names(out / JUDGMENTS):
        path = shards.shard_path(out / JUDGMENTS, name)
        more = [shards.read_shard(shards.shard_path(other / JUDGMENTS, name), records.JUDGMENTS) for other in others]
        shards.write_shard(
            path, pa.concat_tables([shards.read_shard(path, records.JUDGMENTS), *more]), records.JUDGMENTS
        )
    for other in others:
        shutil.rmtree(other)


def add_preferences(out: Path, more: pa.Table) -> None:
    """Append preferences: to the file where there is one, else as more shards."""
    path = out / PREFERENCES
    if not path.is_dir():
        whole = pa.concat_tables([shards.read_shard(path, records.PREFERENCES), more])
        shards.write_shard(path, whole, records.PREFERENCES)
        return
    there = len(shards.files_of(path))
    for number, start in enumerate(range(0, len(more), shards.ROWS), start=there):
        part = more.slice(start, shards.ROWS)
        shards.write_shard(shards.shard_path(path, shards.numbered_name(number)), part, records.PREFERENCES)


def _asked(annotator: Annotator, files: Sequence[Path], items: pa.Table, bar: Bar) -> Iterator[Judged]:
    texts = texts_of(items)
    for file in files:
        pairs = shards.read_shard(file, records.PAIRS)
        yield judged(pairs, ask(annotator, pairs, texts, bar))


def ask(annotator: Annotator, pairs: pa.Table, texts: Mapping[str, tuple[str, str]], bar: Bar) -> pa.Table:
    """Rows of `records.JUDGMENTS`, in order, of an annotator that sees comparisons."""
    parts = [pairs.slice(start, AT_ONCE) for start in range(0, len(pairs), AT_ONCE)]
    answered = (judge_with_bar(comparisons(part, texts), annotator, bar) for part in parts)
    tables = [pa.Table.from_pylist(rows, records.JUDGMENTS) for rows in answered]
    return pa.concat_tables([records.JUDGMENTS.empty_table(), *tables])


def _scored(
    ray: Callable[[], Any],
    cluster: ClusterConfig,
    annotator: Annotator,
    files: Sequence[Path],
    items: pa.Table,
    bar: Bar,
) -> Iterator[Judged]:
    assert annotator.score_items is not None
    assert annotator.by_scores is not None
    whole = sum(shards.row_count(file) for file in files)

    def show(share: float, note: str) -> None:
        bar.to(int(share * whole), note=note)

    scores = Scores.of(annotator.score_items(texts_of(items), show))
    arguments = ((shards.file_buffer(file),) for file in files)
    if len(files) == 1 and whole <= shards.FEW:
        found: Iterator[Judged] = (by_scores(scores, annotator.by_scores, *each) for each in arguments)
    else:
        from jpo_ray.cluster.shards import map_shards

        found = map_shards(ray(), cluster, "judge", by_scores, arguments, scores, annotator.by_scores)
    yield from found
    bar.to(whole)


def by_scores(scores: Scores, how: ByScores, file: pa.Buffer) -> Judged:
    pairs = shards.read_shard(file, records.PAIRS)
    return judged(pairs, judge_by_scores(pairs, scores, how))
