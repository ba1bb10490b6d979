"""Rows are found by name; what is made once is made again when anything it depends on changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from twofour.bench.suite import cache
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
        assert {row.network for row in rows if not row.file} <= set(NETWORKS)
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


def planted(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_code_is_what_is_imported_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "p"
    planted(
        package,
        a="from p.b import x\nimport p.c",
        b="import numpy",
        c="from p import d",
        d="import p.a",
        e="",
        kinds__one="from p import b",
        kinds__two="",
    )
    monkeypatch.setattr(cache, "PACKAGE", package)

    def names(*parts: str) -> list[str]:
        return sorted(str(path.relative_to(package)) for path in cache._closure(parts))

    assert names("a.py") == ["a.py", "b.py", "c.py", "d.py"]
    assert names("kinds") == ["b.py", "kinds/one.py", "kinds/two.py"]


def test_engines_are_made_of_kernels_and_models_are_not() -> None:
    def names(parts: tuple[str, ...]) -> set[str]:
        return {str(path.relative_to(cache.PACKAGE)) for path in cache._closure(parts)}

    models, engines = names(cache.MODEL_CODE), names(cache.ENGINE_CODE)
    assert {"core/numerics.py", "core/patterns.py", "train/networks/resnet.py"} <= models
    assert not {name for name in models if name.startswith(("compiler", "kernels", "runtime"))}
    assert {"kernels/cpu/conv_sparse.py", "runtime/session.py", "core/plan.py"} <= engines
    reports = {f"compiler/{name}.py" for name in ("explain", "roofline", "rates", "peak")}
    assert not reports & engines, "what only reports makes no engine anew"
