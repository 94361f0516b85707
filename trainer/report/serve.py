"""`gi watch`: the report of runs that go on, on this machine's own address and no other.

Two answers, the page and its data, both made in memory: no request names a file. A request that was
meant for another host (a name that somebody points at 127.0.0.1) gets neither, nor does another
site's script.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from trainer.report import page
from trainer.report.document import Document, document, sections
from trainer.report.runs import Reader, Run, read_runs
from trainer.runs import lock
from trainer.runs.folder import RunFolder

ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")
PORT, TRIES = 8421, 20
"""The first port that is tried, and how many after it where it is taken."""
RECENT = 20
"""Steps whose mean says how long the rest will take."""


class Watched:
    """Run folders, and what the page is to say of them now."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [Path(folder) for folder in folders]
        self.lock = threading.Lock()
        self.reader = Reader()
        self.said: Document = {}

    def document(self, seen: str = "") -> Document | None:
        """None where nothing has changed since version `seen`."""
        with self.lock:
            version = self.version()
            if seen == version:
                return None
            if self.said.get("live", {}).get("version") != version:
                runs = read_runs(self.folders, self.reader)
                said = document(runs, page.title(self.folders), sections(runs))
                self.said = {**said, "live": {"version": version, **self.state(runs)}}
            return self.said

    def version(self) -> str:
        """Of all files that the page is made from, and of who is at work."""
        parts: list[Any] = [lock.holder(RunFolder(folder)) for folder in self.folders]
        for folder in self.folders:
            for pattern in ("", "baselines/*/", "rounds/*/"):
                for name in ("metrics.jsonl", "samples.jsonl", "answers.jsonl", "config.yaml"):
                    parts += map(_stamp, sorted(folder.glob(pattern + name)))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def state(self, runs: list[Run]) -> dict[str, Any]:
        """What the first run is doing: stage, steps, speed, and when it last said so."""
        folder = RunFolder(self.folders[0])
        out: dict[str, Any] = {"running": lock.holder(folder) is not None}
        lines = [line for line in runs[0].lines if line["stage"] != "eval"]
        if not lines:
            return out
        stage, step = lines[-1]["stage"], lines[-1]["step"]
        steps = runs[0].steps(stage)
        recent = [line for line in lines[-RECENT:] if line["stage"] == stage]
        seconds = [s for line in recent if (s := line.get("perf/step_seconds")) is not None]
        out |= {"stage": stage, "step": step, "changed": folder.metrics.stat().st_mtime}
        if steps:
            out["steps"] = steps
        if seconds:
            out["seconds"] = sum(seconds) / len(seconds)
        if (speed := lines[-1].get("perf/tokens_per_second")) is not None:
            out["tokens_per_second"] = speed
        return out


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        found = path.stat()
        return str(path), found.st_size, found.st_mtime_ns
    except OSError:  # replaced just now
        return str(path), 0, 0


class Handler(BaseHTTPRequestHandler):
    watched: Watched
    server_version, sys_version = "gi", ""
    timeout = 30

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        site = self.headers.get("Sec-Fetch-Site", "none")
        asked = urlsplit(self.path)
        if host not in NAMES or site not in ("none", "same-origin"):
            self.answer(HTTPStatus.FORBIDDEN, f"only as http://{ADDRESS}\n")
        elif asked.path == "/":
            self.answer(HTTPStatus.OK, page.html(self.watched.document() or {}), "text/html")
        elif asked.path == "/data":
            said = self.watched.document(parse_qs(asked.query).get("seen", [""])[0])
            if said is None:
                self.answer(HTTPStatus.NO_CONTENT, "")
            else:
                self.answer(HTTPStatus.OK, json.dumps(said, allow_nan=False), "application/json")
        else:
            self.answer(HTTPStatus.NOT_FOUND, "no such page\n")

    do_HEAD = do_GET

    def answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal says where the page is, and that is all."""


def server(folders: Sequence[Path], port: int = 0) -> ThreadingHTTPServer:
    """Bound, and not yet serving. Port 0: PORT, or one of those after it."""
    handler = type("Handler", (Handler,), {"watched": Watched(folders)})
    ports = [port] if port else range(PORT, PORT + TRIES)
    problem: OSError | None = None
    for each in ports:
        try:
            return ThreadingHTTPServer((ADDRESS, each), handler)
        except OSError as error:
            problem = error
    raise OSError(f"no port from {ports[0]} to {ports[-1]} is free ({problem})")
