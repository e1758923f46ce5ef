"""GET /: the playground, a static page that talks to this server alone.

Its files are listed here, one route each: nothing that a client sends is ever joined to a path.
"""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

FOLDER = Path(__file__).parent.parent / "playground"
PAGE = "index.html"
FILES: Mapping[str, str] = {  # name to media type
    PAGE: "text/html",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        ("main.js", "examples.js", "steps.js", "thinking.js", "vote.js", "api.js", "dom.js"), "text/javascript"
    ),
}
PATHS: Mapping[str, str] = {"/": PAGE, **{f"/playground/{name}": name for name in FILES if name != PAGE}}
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a page and scripts of different versions would not fit
}

router = APIRouter(include_in_schema=False)


def _answer_with(name: str) -> Callable[[], Awaitable[FileResponse]]:
    async def file() -> FileResponse:
        return FileResponse(FOLDER / name, media_type=FILES[name], headers=HEADERS)

    return file


for path, name in PATHS.items():
    router.add_api_route(path, _answer_with(name))
