"""Rewards from elsewhere, on loopback: what they send, and everything that a server does wrong."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trainer.config import NAMED
from trainer.rewards.errors import RewardError
from trainer.rewards.functions import RewardFunction


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) -> (url, requests); reply(path, body) -> (code, text), called for each."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started = []

    def start(reply):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append((self.path, dict(self.headers), body))
                code, text = reply(self.path, body)
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # a client that has hung up is part of the test
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_port}", requests

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def reward(name, url, **options):
    more = {"model": "m"} if name == "judge" else {}
    entry = NAMED[name](function=name, url=url, backoff=0.01, **more, **options)
    return RewardFunction(entry, "reward.functions[0]")


def lengths(path, body):
    # later batches are quicker: the order of replies is not that of the requests
    time.sleep(0.05 if body["answers"][0] == "a" else 0)
    return 200, json.dumps({"scores": [len(answer) for answer in body["answers"]]})


def test_batches_in_order(serve, monkeypatch):
    url, requests = serve(lengths)
    monkeypatch.setenv("TOKEN", "secret")
    made = reward("http", url, batch=2, token="TOKEN")
    answers = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert made(["p"] * 5, answers, [{"k": i} for i in range(5)]).tolist() == [1, 2, 3, 4, 5]
    assert sorted(len(body["answers"]) for _, _, body in requests) == [1, 2, 2]
    last = next(body for _, _, body in requests if body["answers"] == ["eeeee"])
    assert last == {"prompts": ["p"], "answers": ["eeeee"], "meta": [{"k": 4}]}
    assert all(headers["Authorization"] == "Bearer secret" for _, headers, _ in requests)


def test_what_is_no_answer_is_tried_again(serve):
    codes = iter([503, 429, 200])
    url, requests = serve(lambda *_: (next(codes), '{"scores": [7]}'))
    assert reward("http", url)(["p"], ["a"], [{}]).tolist() == [7]
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("code", "text", "message", "tries"),
    [
        (500, "", "HTTP 500 Internal Server Error, after 3 tries", 3),
        (404, "", "HTTP 404 Not Found, after 1 try", 1),
        (200, "what?", "not JSON", 1),
        (200, "[1]", r"got \[1\]; want {scores: 1 numbers}", 1),
        (200, '{"scores": [1, 2]}', "want {scores: 1 numbers}", 1),
        (200, '{"scores": ["good"]}', "want {scores: 1 numbers}", 1),
        (200, '{"scores": [NaN]}', "want {scores: 1 numbers}", 1),
    ],
)
def test_a_scorer_that_fails(serve, code, text, message, tries):
    url, requests = serve(lambda *_: (code, text))
    with pytest.raises(RewardError, match=message) as error:
        reward("http", url, retries=2)(["my prompt"], ["an answer"], [{}])
    assert str(error.value).startswith("reward.functions[0]: http: ") and len(requests) == tries
    assert str(error.value).endswith("prompt 'my prompt', answer 'an answer'")
    skips = reward("http", url, retries=0, on_error="skip")
    assert math.isnan(skips(["p"], ["a"], [{}])[0])


def test_no_server_and_one_that_hangs(serve):
    with pytest.raises(RewardError, match=r"refused.*after 2 tries"):
        reward("http", "http://127.0.0.1:9", retries=1)(["p"], ["a"], [{}])
    url, _ = serve(lambda *_: (time.sleep(0.5), (200, "{}"))[1])
    with pytest.raises(RewardError, match="timed out, after 1 try"):
        reward("http", url, retries=0, timeout=0.1)(["p"], ["a"], [{}])
    with pytest.raises(RewardError, match="the environment has no MY_TOKEN"):
        reward("http", url, token="MY_TOKEN")(["p"], ["a"], [{}])


def said(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


def test_a_judge_marks_each_answer(serve):
    def reply(path, body):
        asked = body["messages"][0]["content"]
        return said(f"Mark: {asked.rpartition(' ')[2]}")

    url, requests = serve(reply)
    made = reward("judge", f"{url}/v1/", question="{prompt} {lang}: {answer}", parallel=3)
    got = made(["p"] * 4, ["0", "5", "20", "{lang} 10"], [{"lang": "en"}] * 4)
    assert got.tolist() == [0, 0.5, 1, 1]
    path, _, body = requests[0]
    assert path == "/v1/chat/completions" and body["temperature"] == 0 and body["model"] == "m"
    # what an answer says in braces fills in nothing
    assert "p en: {lang} 10" in [body["messages"][0]["content"] for _, _, body in requests]
    own = reward(
        "judge", url, pattern=r"Mark: (\d)", lowest=1.0, highest=5.0, question="x{answer} 3"
    )
    assert own(["p"], ["a"], [{}]).tolist() == [0.5]


@pytest.mark.parametrize(
    "reply", [said("I would rather not"), said(None), (200, "{}"), (200, "[]")]
)
def test_a_judge_that_gives_no_mark(serve, reply):
    url, _ = serve(lambda *_: reply)
    with pytest.raises(RewardError, match=r"no mark in .*; prompt 'p', answer 'a'"):
        reward("judge", url)(["p"], ["a"], [{}])
    assert math.isnan(reward("judge", url, on_error="skip")(["p"], ["a"], [{}])[0])
