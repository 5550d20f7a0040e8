"""The page at `/`: four files of this package."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/engine.js": ("engine.js", "text/javascript"),
}


def router() -> APIRouter:
    """The endpoints."""
    made = APIRouter(include_in_schema=False)
    directory = files("flexmoe.serving") / "page"
    for path, (name, kind) in _FILES.items():
        data = (directory / name).read_bytes()
        made.add_api_route(path, _served(data, kind), methods=["GET"], name=name)
    return made


def _served(data: bytes, kind: str):  # type: ignore[no-untyped-def]
    def file() -> Response:
        return Response(data, media_type=f"{kind}; charset=utf-8")

    return file
