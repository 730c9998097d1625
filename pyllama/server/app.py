"""The application: all endpoints, static files, who may ask, and errors as JSON."""

from __future__ import annotations

import hmac
import mimetypes
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from bottle import Bottle, HTTPError, HTTPResponse, request, response, static_file

from pyllama.server import native, openai
from pyllama.server.errors import JSON, ApiError, dump, error_body, error_object
from pyllama.server.service import LOADING, Service

__all__ = ["PUBLIC", "create_app"]

PUBLIC = next(
    (
        folder
        for folder in (Path(__file__).parents[1] / "public", Path(__file__).parents[2] / "public")
        if folder.is_dir()
    ),
    Path(__file__).parents[1] / "public",
)
"""The pages that come with pyllama: inside the installed package, or beside it in a source tree."""

for _suffix in (".js", ".mjs"):
    mimetypes.add_type("text/javascript", _suffix)


class _App(Bottle):
    """Bottle, with JSON for whatever goes wrong."""

    def default_error_handler(self, error: HTTPError) -> bytes:
        response.content_type = JSON
        message = error.message if isinstance(error, ApiError) else HTTPStatus(error.status_code).phrase
        return error_body(error.status_code, message)


def create_app(service: Service, static: Path | None = None) -> Callable[..., Iterable[bytes]]:
    """The WSGI application.

    Args:
        service: the model, present or to come.
        static: a folder whose files go before those of :data:`PUBLIC`.
    """
    app = _App()
    folders = [folder for folder in (static, PUBLIC) if folder is not None]

    @app.hook("before_request")
    def prepare() -> None:
        response.content_type = JSON
        if request.method == "POST":
            _check_key(service.defaults.api_keys)

    @app.get("/health")
    def health() -> bytes:
        if not service.is_ready:
            response.status = 503
            return dump({"status": "loading model", **error_object(503, LOADING)})
        engine = service.engine
        busy = engine.n_running
        return dump(
            {
                "status": "ok",
                "slots_idle": engine.n_slots - busy,
                "slots_processing": busy,
                "requests_waiting": engine.n_waiting,
            }
        )

    native.add_routes(app, service)
    openai.add_routes(app, service)
    methods = _methods_by_path(app)

    # Bottle tries this route last, whatever the method.
    @app.route("/", method="ANY")
    @app.route("/<path:path>", method="ANY")
    def anything_else(path: str = "index.html") -> HTTPResponse | str:
        if request.method == "OPTIONS":
            return ""
        known = methods.get(request.path)
        if known:
            raise ApiError(405, f"{request.path} is for {' and '.join(known)}", Allow=", ".join(known))
        if request.method not in ("GET", "HEAD"):
            raise ApiError(404, f"there is nothing at {request.path}")
        return _file(folders, path)

    return _with_cors(app)


def _methods_by_path(app: Bottle) -> dict[str, list[str]]:
    methods: dict[str, list[str]] = {}
    for route in app.routes:
        methods.setdefault(route.rule, []).append(route.method)
    return methods


def _check_key(keys: Sequence[str]) -> None:
    """Refuses a request that brings none of the keys, if there are any."""
    if not keys:
        return
    scheme, _, given = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    key = given.strip().encode("latin-1")
    # All are compared, each in constant time: how long it takes tells nothing.
    matches = [hmac.compare_digest(key, known.encode()) for known in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise ApiError(
            401, "this server wants the header 'Authorization: Bearer KEY' with its key", WWW_Authenticate="Bearer"
        )


def _file(folders: list[Path], path: str) -> HTTPResponse:
    """A file below one of the folders, the first that has it. Browsers ask again each time whether it has changed, or modules of
    two versions would meet in one page."""
    for folder in folders:
        if not _is_below(folder, path):
            continue
        found = static_file(path, root=str(folder), headers={"Cache-Control": "no-cache"})
        if found.status_code in (200, 206, 304):
            return found
    raise ApiError(404, f"there is no file {path}")


def _is_below(folder: Path, path: str) -> bool:
    """Is that a place in the folder, also when links have been followed?"""
    try:
        return (folder / path.strip("/\\")).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
        return False


def _with_cors(app: Bottle) -> Callable[..., Iterable[bytes]]:
    """Lets pages of any origin use the server, for errors and streams as well."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        headers = [
            ("Access-Control-Allow-Origin", environ.get("HTTP_ORIGIN") or "*"),
            ("Access-Control-Allow-Credentials", "true"),
            ("Access-Control-Allow-Methods", "GET, POST, OPTIONS"),
            ("Access-Control-Allow-Headers", environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS") or "*"),
            ("Vary", "Origin"),
        ]

        def start(status: str, own: list[tuple[str, str]], exc_info: Any = None) -> Any:
            return start_response(status, [*own, *headers], exc_info)

        return app(environ, start)

    return application
