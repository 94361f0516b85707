"""`gi watch` without a browser: two answers, to this machine alone."""

import http.client
import json
import os
import threading
from contextlib import contextmanager

import pytest

from tests.trainer.report.test_report import make_run
from trainer.__main__ import main
from trainer.report import serve
from trainer.report.runs import Reader


@contextmanager
def served(*folders):
    server = serve.server(folders)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(port, path="/data", method="GET", **headers):
    connection = http.client.HTTPConnection(serve.ADDRESS, port, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer, answer.read()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("served"), "run")


@pytest.fixture(scope="module")
def port(folder):
    with served(folder) as port:
        yield port


def test_on_loopback_alone(folder):
    server = serve.server([folder])
    assert server.server_address[0] == "127.0.0.1"
    second = serve.server([folder])  # the first port is taken
    assert second.server_address[1] != server.server_address[1]
    server.server_close(), second.server_close()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example:1",
                                  "", "10.0.0.1:8421", "[::]:8421"])  # fmt: skip
def test_another_host_is_refused(port, host):
    for path in ("/", "/data"):
        answer, body = ask(port, path, Host=host)
        assert answer.status == 403 and b"run" not in body


def test_this_host_is_answered_and_another_site_is_not(port):
    for host in (f"127.0.0.1:{port}", "localhost:9000", "localhost"):
        assert ask(port, Host=host)[0].status == 200
    assert ask(port, Sec_Fetch_Site="cross-site")[0].status == 403
    assert ask(port, Sec_Fetch_Site="same-origin")[0].status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../metrics.jsonl", "/config.yaml", "/..%2f..%2fetc/passwd", "//etc/passwd",
        "/data/../config.yaml", "/plots/x.png", "/%00", "/data/",
    ],
)  # fmt: skip
def test_no_path_is_a_file(port, path):
    answer, body = ask(port, path)
    assert answer.status == 404 and body == b"no such page\n"


def test_the_page_and_what_is_new(port, folder):
    answer, body = ask(port, "/")
    assert answer.status == 200 and b"default-src 'none'" in body
    assert answer.getheader("X-Frame-Options") == "DENY"
    assert answer.getheader("Access-Control-Allow-Origin") is None
    assert ask(port, "/", "HEAD")[1] == b""
    said = json.loads(ask(port)[1])
    seen = said["live"]["version"]
    assert said["live"]["stage"] == "ppo" and said["live"]["step"] == 20
    assert said["live"]["running"] is False
    assert ask(port, f"/data?seen={seen}")[0].status == 204
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"stage": "ppo", "step": 21, "objective/kl": 3}\n')
    (folder / ".lock").write_text(f"{os.getpid()}\n")
    said = json.loads(ask(port, f"/data?seen={seen}")[1])
    assert said["live"]["step"] == 21 and said["live"]["running"] is True
    assert ask(port, "/data", "POST")[0].status == 501


def test_a_reader_takes_what_is_new(tmp_path):
    path, reader = tmp_path / "metrics.jsonl", Reader()
    assert reader.metrics(path) == []
    path.write_text('{"stage": "a", "step": 1}\n{"stage": "a", "st')
    assert [line["step"] for line in reader.metrics(path)] == [1]
    with path.open("a") as file:
        file.write('ep": 2}\n{"stage": "a", "step": 3}')
    assert [line["step"] for line in reader.metrics(path)] == [1, 2, 3]
    with path.open("a") as file:
        file.write("\n")
    assert [line["step"] for line in reader.metrics(path)] == [1, 2, 3]
    path.write_text('{"stage": "b", "step": 9}\n')  # begun again
    assert [line["step"] for line in reader.metrics(path)] == [9]


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("ppo: {steps: 4}\n")
    watched = serve.Watched([tmp_path])
    said = watched.document()
    assert said["live"] == {"version": watched.version(), "running": False}
    assert said["sections"] == [] and said["runs"][0]["settings"] == "ppo:\n  steps: 4\n"
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ppo", "step": 1, "perf/step_seconds": 3}\n')
    live = watched.document(said["live"]["version"])["live"]
    assert (live["stage"], live["step"], live["steps"], live["seconds"]) == ("ppo", 1, 4, 3.0)


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 2
    assert "config.yaml is not there" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").touch()
    assert main(["watch", str(tmp_path), "--port", "70000"]) == 2
    assert "--port: is 70000" in capsys.readouterr().err
