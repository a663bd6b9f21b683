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


def test_distinct_values_are_those_of_whole_columns_in_order(tmp_path: Path) -> None:
    """Also where a column's values do not fit the dictionary, and stand in several row groups."""
    table = pairs(50, "train")
    pq.write_table(table, tmp_path / "plain.parquet", use_dictionary=False, row_group_size=7)
    pq.write_table(table, tmp_path / "some.parquet", dictionary_pagesize_limit=20, row_group_size=30)
    expected = [*table["item_b"].to_pylist(), "a0", "a1", "a2"]
    for name in ("plain", "some"):
        found = shards.distinct_values([tmp_path / f"{name}.parquet"], ["item_b", "item_a"])
        assert found.type == pa.string()
        assert found.to_pylist() == expected


def test_a_file_is_read_where_it_is_not(tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "pairs.parquet", pairs(4, "train"), records.PAIRS)
    buffer = shards.file_buffer(tmp_path / "pairs.parquet")
    (tmp_path / "pairs.parquet").unlink()
    assert shards.read_shard(buffer, records.PAIRS).equals(pairs(4, "train"))
    assert shards.read_shard(buffer, records.PAIRS, ["item_b", "item_a"]).column_names == ["item_b", "item_a"]
