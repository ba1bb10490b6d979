"""What `twofour registry` prints: tables of versions and of differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from twofour.cli.output import printable, short

if TYPE_CHECKING:
    from rich.console import RenderableType

    from twofour.registry.catalog import Catalog
    from twofour.registry.diff import Difference
    from twofour.registry.promote import Promotion
    from twofour.serve.repository.manifest import Manifest

_NAME, _VALUE, _METRICS = 30, 24, 3


def plain_manifest(manifest: Manifest) -> dict[str, Any]:
    """A manifest as documents have it."""
    from twofour.core.records import to_plain

    plain: dict[str, Any] = to_plain(manifest)
    return plain


def promotion_document(
    promotion: Promotion, aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What was promoted."""
    event = promotion.event
    return {
        "action": event.action,
        "version": event.version,
        "changed": promotion.changed,
        "before": event.before,
        "serves": event.serves,
        "by": event.by,
        "when": event.when,
        "message": event.message,
        "config": promotion.config,
        "aliases": dict(aliases) if aliases is not None else None,
    }


def promotion_lines(promotion: Promotion | None) -> list[str]:
    """What is served now, and what was before."""
    if promotion is None:
        return []
    event = promotion.event
    if not promotion.changed:
        return [f"nothing changed: it serves {_shares(event.serves)}"]
    return [f"serves {_shares(event.serves)}; before {_shares(event.before)}: {promotion.config}"]


def versions_parts(found: Catalog, *, history: bool) -> list[RenderableType]:
    """The table of versions, and the history."""
    table = _table("version", "serves", "published", "MiB", "state", "engines", "metrics")
    for row in found.rows:
        manifest = row.manifest
        targets = sorted({engine.title for engine in manifest.engines}) if manifest else []
        table.add_row(
            str(row.version),
            f"{row.percent:g} %" if row.percent else "",
            printable(manifest.created[:16].replace("T", " ")) if manifest else "",
            f"{row.size_bytes / 2**20:.2f}",
            row.state,
            printable("\n".join(targets)),
            printable(_some(manifest.metrics) if manifest else ""),
        )
    parts: list[RenderableType] = [found.place, table]
    if history:
        told = _table("when", "what", "version", "serves", "by", "message")
        for event in found.events:
            told.add_row(
                event.when,
                event.action,
                str(event.version),
                _shares(event.serves) if event.serves else "",
                printable(short(event.by, _NAME)),
                printable(event.message),
            )
        parts.append(told)
    return parts


def diff_parts(found: Difference) -> list[RenderableType]:
    """Tables of files, metrics and lineage."""
    old, new = f"version {found.old}", f"version {found.new}"
    files = _table("file", "change", f"{old}, bytes", f"{new}, bytes", "SHA-256")
    for file in found.files:
        sides = ((file.old_sha256, file.old_bytes), (file.new_sha256, file.new_bytes))
        hashes = [hash_[:8] if hash_ else "?" for hash_, size in sides if size is not None]
        files.add_row(
            printable(short(file.name, _NAME)),
            file.change,
            _bytes(file.old_bytes),
            _bytes(file.new_bytes),
            hashes[0] if file.change == "same" else " -> ".join(hashes),
        )
    figures = _table("of", "metric", old, new, "change")
    for name, pair in found.metrics.items():
        figures.add_row("the model", printable(short(name, _NAME)), *_pair(pair))
    for engine in found.engines:
        title = f"{engine.new or engine.old} ({engine.target})"
        for name, pair in engine.metrics.items():
            figures.add_row(printable(title), printable(short(name, _NAME)), *_pair(pair))
    made = _table("made from", old, new)
    for path, texts in found.lineage.items():
        cells = [printable(short(text or "", _VALUE)) for text in texts]
        made.add_row(printable(short(path, 44)), *cells)
    targets = _table("target", old, new)
    for engine in found.engines:
        targets.add_row(engine.target, printable(engine.old or ""), printable(engine.new or ""))
    return [table for table in (files, targets, figures, made) if table.row_count]


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _shares(serves: Mapping[str, float]) -> str:
    """`version 3`, or `3: 90 %, 4: 10 %`; of nothing, `no version`."""
    if len(serves) == 1:
        return f"version {next(iter(serves))}"
    return ", ".join(f"{n}: {share:g} %" for n, share in serves.items()) or "no version"


def _some(metrics: Mapping[str, float]) -> str:
    """The first few; --json has all."""
    lines = [f"{short(name, _VALUE)} {value:.6g}" for name, value in metrics.items()]
    more = [f"and {len(lines) - _METRICS} more"] if len(lines) > _METRICS else []
    return "\n".join([*lines[:_METRICS], *more])


def _pair(pair: tuple[float | None, float | None]) -> tuple[str, str, str]:
    old, new = pair
    change = f"{new - old:+.6g}" if old is not None and new is not None else ""
    return _number(old), _number(new), change


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _bytes(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
