"""Serves a run's report on loopback and follows the run while it trains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from autotune.errors import LogFormatError
from autotune.report.page import content, page, script_json
from autotune.report.reading import Run, find_log, read_run

#: Names by which a browser on this machine reaches the server. Any other Host header belongs to a foreign page
#: whose name was made to resolve to loopback, and is refused.
_LOCAL_NAMES = frozenset({"127.0.0.1", "localhost"})


class ReportServer(ThreadingHTTPServer):
    """Serves the report of ``paths`` on 127.0.0.1 only.

    Args:
        paths: Run directories or logs; they need not hold anything yet.
        port: 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, paths: Sequence[str], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.paths = list(paths)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves while it is answered is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def first_page(self) -> None:
        """Makes a page and throws it away: what would fail then fails before anyone looks."""
        page(self.runs(), live=True)

    def runs(self) -> list[Run]:
        """The runs as they are now; one that cannot be shown yet is an empty run that says so."""
        found = []
        for path in self.paths:
            try:
                found.append(read_run(path))
            except LogFormatError as error:
                found.append(Run(str(path), Path(path), (), {}, (f"Nothing to show yet: {error}",)))
        return found

    def version(self) -> str:
        """Changes whenever a file that the report is made of does."""
        parts = []
        for path in self.paths:
            try:
                folder = find_log(path)[0].parent
                files = [*folder.glob("*.jsonl"), *folder.glob("*.csv"), *folder.glob("events.out.tfevents.*")]
                parts += [f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in sorted(files)]
            except (LogFormatError, OSError):
                parts.append("none")
        return "|".join(parts)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        """``/`` is the page, ``/news?have=VERSION`` what has changed since."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host not in _LOCAL_NAMES:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "this server speaks to this machine only\n")
            return
        where = urlsplit(self.path)
        if where.path == "/":
            self._answer(HTTPStatus.OK, "text/html", page(self.server.runs(), live=True))
        elif where.path == "/news":
            self._news(parse_qs(where.query).get("have", [""])[0])
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is only the report, at /\n")

    def _news(self, have: str) -> None:
        version = self.server.version()
        if have == version:
            self._answer(HTTPStatus.NOT_MODIFIED, "application/json", "")
            return
        body, figures = content(self.server.runs())
        news = {"version": version, "body": body, "figures": figures}
        self._answer(HTTPStatus.OK, "application/json", script_json(news))

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        payload = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed for a request: the terminal belongs to the person."""
