"""The page at ``/``: the files of ``app/web``, as a browser may use them and no more.

Owns which files there are, their types and how long a browser keeps them. What the page
does is the page's own business; it uses the same routes as any other client.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from app.errors import NotFoundError

PAGE_PREFIX = "/page/"
INDEX = "index.html"
HTML_TYPE = "text/html"
WEB = Path(__file__).parents[1] / "web"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}
PAGE_HEADERS = {
    # Asked for again each time, so that a new version of the service brings its own page;
    # what has not changed is not sent again.
    "Cache-Control": "no-cache",
    "Vary": "Accept",
    # Scripts and styles from here only, none in the page itself, and no text becomes markup.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file, ready to be sent."""

    data: bytes
    media_type: str
    etag: str

    def answer(self, request: Request) -> Response:
        """The file, or that the browser's copy still holds."""
        headers = {**PAGE_HEADERS, "ETag": self.etag}
        known = request.headers.get("if-none-match", "")
        if self.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.data, media_type=self.media_type, headers=headers)


def page_files() -> dict[str, PageFile]:
    """All files of the page, by name; they are small, and read once."""
    return {
        path.name: PageFile(
            data := path.read_bytes(),
            MEDIA_TYPES[path.suffix],
            f'"{hashlib.sha256(data).hexdigest()[:32]}"',
        )
        for path in sorted(WEB.iterdir())
    }


def page_routes(files: dict[str, PageFile]) -> APIRouter:
    """The routes of all files but the index, which ``/`` answers with."""
    router = APIRouter()

    @router.get(f"{PAGE_PREFIX}{{name}}", include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        """A file that the page loads."""
        # Its addresses are relative to "/".
        if name not in files or name == INDEX:
            raise NotFoundError("the page has no such file")
        return files[name].answer(request)

    return router


def wants_page(request: Request) -> bool:
    """Whether a browser asks. Programs do not name HTML in ``Accept``."""
    return HTML_TYPE in request.headers.get("accept", "")
