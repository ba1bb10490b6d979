"""Rows are found by name; what is made once is made again when anything it depends on changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from twofour.bench.suite.cache import code_sha256, once
from twofour.bench.suite.rows import SUITES, select
from twofour.core.errors import InputError
from twofour.train.networks.catalog import NETWORKS


def test_all_rows_or_some_in_the_order_of_the_suite() -> None:
    assert select("cpu") == SUITES["cpu"]
    assert [row.name for row in select("cpu", ["minilm_b8", "resnet18_b1"])] == [
        "resnet18_b1",
        "minilm_b8",
    ]


def test_every_row_has_a_network_and_its_own_name() -> None:
    for rows in SUITES.values():
        assert {row.network for row in rows} <= set(NETWORKS)
        assert len({row.name for row in rows}) == len(rows)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="no suite 'gpu'"):
        select("gpu")
    with pytest.raises(InputError, match="no row 'resnet19_b1'"):
        select("cpu", ["resnet18_b1", "resnet19_b1"])


def test_a_file_is_made_once_for_what_it_is_made_from(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    made = []

    def make() -> dict[str, int]:
        made.append(1)
        path.write_text("content")
        return {"count": len(made)}

    assert once(path, {"a": 1}, make) == {"count": 1}
    assert once(path, {"a": 1}, make) == {"count": 1}, "made before"
    assert once(path, {"a": 2}, make) == {"count": 2}, "made from something else"
    path.unlink()
    assert once(path, {"a": 2}, make) == {"count": 3}, "lost"
    (tmp_path / "folder" / "file.from.json").write_text('{"origin": {"a":')
    assert once(path, {"a": 2}, make) == {"count": 4}, "its record was cut short"


def test_a_file_whose_making_failed_has_no_record(tmp_path: Path) -> None:
    path = tmp_path / "file"
    once(path, {}, lambda: path.write_text("whole") and None)

    def fail() -> None:
        path.write_text("half")
        raise InputError("no")

    with pytest.raises(InputError):
        once(path, {"new": 1}, fail)
    made = []
    once(path, {}, lambda: made.append(1))
    assert made, "the old record does not vouch for the half file"


def test_the_hash_of_code_tells_its_parts_apart() -> None:
    assert code_sha256(("core",)) == code_sha256(("core",))
    assert len({code_sha256(parts) for parts in (("core",), ("engine.py",), ("train",))}) == 3
