"""The status page in the browser: static files that show the document `/v2/status`.

They may be shown to everybody, since they hold nothing of the server; the document needs a token
where the server has tokens, and the page asks its reader for it. To be served below one folder, as
`/page/`, beside `/v2/status`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""Of every file: nothing is loaded from elsewhere, and no text becomes a script."""


@dataclass(frozen=True)
class Asset:
    """One file of the page.

    Attributes:
        content_type: for the header.
        body: of the file.
    """

    content_type: str
    body: bytes


def assets() -> dict[str, Asset]:
    """All files by their name below the folder; "" is the page itself."""
    found = {}
    for file in resources.files(__name__).iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in TYPES:
            name = "" if file.name == "index.html" else file.name
            found[name] = Asset(TYPES[suffix], file.read_bytes())
    return found
