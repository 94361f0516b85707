"""The page in a browser: it opens, answers, updates, and texts of a run stay text."""

import json

import pytest

from tests.trainer.report.browser import PATH, WITHOUT, Browser
from tests.trainer.report.test_report import make_run, undrawn  # noqa: F401
from tests.trainer.report.test_serve import served
from trainer import report
from trainer.report import document, page, runs

pytestmark = pytest.mark.skipif(PATH is None, reason=WITHOUT)

EVIL = [
    "<img src=x onerror=window.hacked=1>", "</script><script>window.hacked=1</script>",
    "<!--<script>", "<svg onload=window.hacked=1>", "'\"><b>bold</b>", "${window.hacked=1}",
    "&lt;i&gt; &amp;", "javascript:window.hacked=1", "\u2028\u2029line\u2028",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def write_samples(folder, texts):
    lines = [
        {"stage": "eval", "step": 20, "prompt": f"{i} {text}", "response": text, "domain": text,
         "score": i / 10, "gold": None, "kl": 0.5, "group": i % 2}
        for i, text in enumerate(texts)
    ]  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def texts_of(browser, selector):
    return browser.value(f"[...document.querySelectorAll({selector!r})].map((x) => x.textContent)")


def choose(browser, name, value, event="change"):
    browser.value(
        f"document.getElementById({name!r}).value = {value!r};"
        f"document.getElementById({name!r}).dispatchEvent(new Event({event!r}))"
    )


def test_a_run_is_seen(tmp_path, browser, undrawn):  # noqa: F811
    folder = make_run(tmp_path, "run")
    make_run(folder / "baselines", "ppo", groups=False, offset=-0.1)
    path = report.write([folder])
    browser.console.clear(), browser.requests.clear()
    browser.open(path.as_uri())
    assert browser.requests == [path.as_uri()] and browser.console == []
    first = "document.querySelector('.chart')"
    browser.until(f"{first}.querySelectorAll('path.curve').length === 2")
    assert texts_of(browser, ".tile h3")[0] == "worst domain, gold"
    assert "1.100" in texts_of(browser, "table.figures td b")
    browser.size(390, 800)
    assert browser.value("document.documentElement.scrollWidth") == 390  # nothing sticks out
    browser.size(1280, 900)

    # a run is switched off, and on
    browser.value("document.querySelectorAll('.chip')[1].click()")
    assert browser.value(f"{first}.querySelectorAll('path.curve').length") == 1
    assert not [t for t in texts_of(browser, ".answer small") if t.startswith("ppo")]
    browser.value("document.querySelectorAll('.chip')[1].click()")
    assert browser.value(f"{first}.querySelectorAll('path.curve').length") == 2

    # hover, and a range that all charts over these steps take
    browser.value(f"{first}.scrollIntoView({{block: 'center'}})")
    box = browser.value(
        f"(({{x, y, width, height}}) => [x, y, width, height])({first}.querySelector('svg')"
        ".getBoundingClientRect())"
    )
    x, y = box[0] + box[2] / 2, box[1] + box[3] / 2
    browser.mouse("mouseMoved", x, y)
    tip = browser.value(f"{first}.querySelector('.tip').innerText")
    assert tip.startswith("PPO step 10") and "group-invariant PPO" in tip and "0.5" in tip
    whole = browser.value(f"{first}.querySelector('path.curve').getAttribute('d')")
    browser.mouse("mousePressed", x, y, button="left", clickCount=1)
    browser.mouse("mouseMoved", x + 80, y, buttons=1)
    browser.mouse("mouseReleased", x + 80, y, button="left", clickCount=1)
    assert browser.value(f"{first}.querySelector('path.curve').getAttribute('d')") != whole
    assert browser.value("[...view.zoom.keys()]") == ["PPO step"]
    low, high = browser.value("view.zoom.get('PPO step')")
    assert 8 < low < 12 < high < 20
    browser.value("document.getElementById('whole').click()")
    assert browser.value(f"{first}.querySelector('path.curve').getAttribute('d')") == whole
    assert browser.console == []


def test_samples_are_filtered(tmp_path, browser, undrawn):  # noqa: F811
    folder = make_run(tmp_path, "run")
    samples = runs.read_lines(folder / "samples.jsonl")
    browser.open(report.write([folder]).as_uri())

    def shown():
        return browser.value("samples.chosen().flatMap(([, of]) => of).map((row) => row[5])")

    def expected(keep):
        return sorted(float(f"{x['score']:.5g}") for x in samples if keep(x))

    assert sorted(shown()) == expected(lambda x: True)
    choose(browser, "domain", "1")
    assert sorted(shown()) == expected(lambda x: x["domain"] == "sort")
    choose(browser, "group", "0")
    assert sorted(shown()) == expected(lambda x: x["domain"] == "sort" and x["group"] == 0)
    choose(browser, "low", "0.5", "input")
    choose(browser, "order", "down")
    found = expected(lambda x: x["domain"] == "sort" and x["group"] == 0 and x["score"] >= 0.5)
    assert shown() == found[::-1] and len(found) == 2
    assert texts_of(browser, "#count")[0].startswith("2 answers to 2 prompts; mean proxy 0.714")
    assert len(texts_of(browser, ".sample")) == 2
    choose(browser, "words", "SORT 6", "input")
    assert texts_of(browser, ".sample pre.prompt") == ["sort 6"]
    choose(browser, "words", "nowhere", "input")
    assert texts_of(browser, ".sample") == []


def test_texts_stay_text(tmp_path, browser, undrawn):  # noqa: F811
    folder = make_run(tmp_path, "run")
    write_samples(folder, EVIL)
    (folder / "config.yaml").write_text(json.dumps({"groups": {"x": EVIL}}))
    other = make_run(tmp_path, "</title><script>window.hacked=1<|script>")
    with (folder / "metrics.jsonl").open("a") as file:
        for i, text in enumerate(EVIL):
            for step in (22, 24):
                each = {"stage": "eval", "step": step, "policy": "policy", f"domain/{text}/gold": i}
                file.write("\n" + json.dumps(each) + "\n")
                file.write(json.dumps({"stage": text, "step": step, text: i}) + "\n")
    path = report.write([folder, other])
    with served(folder, other) as port:
        for url in (path.as_uri(), f"http://127.0.0.1:{port}/"):
            browser.console.clear(), browser.requests.clear()
            browser.open(url)
            browser.value(
                "document.querySelectorAll('details').forEach((each) => each.open = true)"
            )
            browser.value(
                "for (const chart of charts.values()) { chart.seen = true; chart.draw(); }"
            )
            assert browser.value("window.hacked === undefined")
            assert (
                browser.value("document.querySelectorAll('main img, main script, main b b').length")
                == 0
            )
            prompts = texts_of(browser, ".sample pre.prompt")
            for i, text in enumerate(EVIL[:-1]):
                assert f"{i} {text}" in prompts
            assert any("<img src=x" in title for title in texts_of(browser, ".chart h4"))
            assert all(url.startswith(("http://127.0.0.1", "file:")) for url in browser.requests)
            assert browser.console == []


def test_it_follows_a_run(tmp_path, browser):
    folder = make_run(tmp_path, "run")
    with served(folder) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.value("window.same = true; document.querySelector('.chip').click()")
        choose(browser, "domain", "1")
        assert "ppo 20" in browser.value("document.getElementById('state').textContent")
        with (folder / "metrics.jsonl").open("a") as file:
            for line in (
                {"stage": "ppo", "step": 21, "objective/kl": 9.0, "perf/step_seconds": 2.0},
                {"stage": "eval", "step": 25, "policy": "policy", "eval/gold": 0.9},
            ):
                file.write("\n" + json.dumps(line) + "\n")
        browser.until("document.getElementById('state').textContent.includes('ppo 21')")
        text = browser.value("document.getElementById('state').textContent")
        assert "not running" in text and "2 s a step" in text
        assert browser.value(
            "data.sections[0].charts.some((c) => c.series.some((s) => s.x && s.x.at(-1) === 25))"
        )
        # not loaded again, and what the reader had chosen stays
        kept = "[window.same, view.off.size, document.getElementById('domain').value]"
        assert browser.value(kept) == [True, 1, "1"]
        assert texts_of(browser, ".chip[aria-pressed=false]") == ["group-invariant PPO"]
        browser.console.clear()
    browser.until("document.getElementById('state').textContent.includes('no longer answers')")


def test_a_long_run_opens_at_once(tmp_path, browser):
    """5,000 steps of 60 metrics and 20,000 samples of 1,000 characters: 2 s, 10 MB."""
    folder = tmp_path / "long"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 5001):
            values = {f"part{k % 6}/metric{k}": (step * (k + 7)) % 1009 / 1009 for k in range(60)}
            values["objective/kl"] = step / 5000
            file.write(json.dumps({"stage": "ppo", "step": step, **values}) + "\n")
    with (folder / "samples.jsonl").open("w") as file:
        for n in range(20_000):
            line = {"stage": "eval", "step": 50 * (n // 200), "prompt": f"{n % 200} " + "why " * 50,
                    "response": f"{n} " + "because " * 100, "domain": f"d{n % 8}", "group": n % 4,
                    "score": n / 20_000}  # fmt: skip
            file.write(json.dumps(line) + "\n")
    found = runs.read_runs([folder])
    path = folder / "report.html"
    path.write_text(page.html(document.document(found, "long", document.sections(found))))
    assert 2e6 < path.stat().st_size < 10e6
    seconds = min(browser.open(path.as_uri()) for _ in range(3))
    assert seconds < 2
    browser.until("document.querySelectorAll('path.curve').length > 0")
    notes = " ".join(texts_of(browser, ".note"))
    assert "of 20,000 samples" in notes and "up to 5,000 steps" in notes
    assert texts_of(browser, "#count")[0].startswith("200 answers to 200 prompts")  # of the last
    choose(browser, "step", "all")
    kept = browser.value("data.samples.rows.length")
    assert 3000 < kept < 20_000
    assert texts_of(browser, "#count")[0].startswith(f"{kept:,} answers")
