"""Tables of comparisons in one file or in shards: the same rows, counted without reading them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jpo_ray import records, shards


def pairs(count: int, split: str) -> pa.Table:
    rows = [
        {"pair_id": f"p{n}", "item_a": f"a{n % 3}", "item_b": f"b{n}", "similarity": 0.5, "strategy": "random"}
        | {"protocol": "conditional" if n < 2 else "joint", "split": split}
        for n in range(count)
    ]
    return pa.Table.from_pylist(rows, records.PAIRS)


def test_a_folder_of_shards_reads_like_one_file(tmp_path: Path) -> None:
    whole = pa.concat_tables([pairs(5, "train"), pairs(3, "validation")])
    one, many = tmp_path / "one.parquet", tmp_path / "many.parquet"
    shards.write_shard(shards.shard_path(one, None), whole, records.PAIRS)
    for number, part in enumerate((pairs(5, "train"), pairs(3, "validation"))):
        shards.write_shard(shards.shard_path(many, shards.numbered_name(number)), part, records.PAIRS)
    for path in (one, many):
        assert records.read_table(path, records.PAIRS).equals(whole)
        assert pq.read_table(path).num_rows == shards.row_count(path) == 8
        assert shards.kinds_of_all(shards.files_of(path)) == {
            ("train", "conditional"): 2, ("train", "joint"): 3,
            ("validation", "conditional"): 2, ("validation", "joint"): 1,
        }  # fmt: skip
        assert sorted(shards.distinct_values(shards.files_of(path), ["item_a", "item_b"]).to_pylist()) == [
            "a0", "a1", "a2", "b0", "b1", "b2", "b3", "b4",
        ]  # fmt: skip
    assert shards.shard_names(one) == [None]
    assert shards.shard_names(many) == ["00000.parquet", "00001.parquet"]


def test_a_file_of_another_program_is_counted(tmp_path: Path) -> None:
    pq.write_table(pairs(4, "train"), tmp_path / "pairs.parquet")
    assert shards.kinds_of(tmp_path / "pairs.parquet") == {("train", "conditional"): 2, ("train", "joint"): 2}
