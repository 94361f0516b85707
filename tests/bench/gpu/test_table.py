"""The table says what was measured, what was not, and nothing fast that is wrong."""

import json

import pytest

from bench import report
from bench.gpu import record, table
from bench.host.machine import ROOT

H100 = {"sources": "0123456789ab", "device": "NVIDIA H100 80GB HBM3", "size": "gpu"}


def row(name, ms, mode="forward", op="linear_logprobs", shape=None, **more):
    return {
        "op": op, "shape": shape or table.HEAD, "mode": mode, "contender": name, "median_ms": ms,
        "graph_ms": None, "rate": 1.0, "unit": "TFLOP/s", "fraction": 10.8 / ms,
        "fraction_of": "1 plain matrix product", "peak_extra_bytes": 50 << 20,
        "errors": {"logprobs": 1e-4, "d hidden": 2e-3, "d weight": 4e-3}, **more,
    }  # fmt: skip


def results(root, **changes):
    """As a run has left them; `changes`: other statuses."""
    folder = root / "bench" / "results" / "gpu-h100"
    first = [row("gikernels", 12.5), row("torch", 40.25), row("1 plain matrix product", 10.8)]
    peers = [row("gikernels", 12.6), row("Liger CuTe", 11.5), row("TRL chunked", 19.0)]
    peers.append(row("gikernels, two ops", 1.0))
    found = {
        "versions": {
            "machine": {"versions": {"torch": "2.14.0", "triton": "3.8.0", "python": "3.12.1"}},
            "product_tflops": 798.1, "copy_tb_per_s": 3.01,
        },
        "selftest": {"says": "fine"},
        "triton": {"counts": {"passed": 160, "failed": 0, "skipped": 2}},
        "times": {"cases": {"head": {"rows": first, "absent": []}}},
        "peers": {"cases": {"beside": {"rows": peers, "absent": [
            {"case": "head", "contender": "Liger", "reason": "not installed"}]}}},
        "training": {"ours": {"tokens_per_step": 8960.0, "tokens_per_second": 21000.0,
                              "rollout_seconds": 0.31, "step_seconds": 0.43,
                              "peak_memory_bytes": 20 << 30, "mfu": 0.41},
                     "trl_absent": "ModuleNotFoundError: No module named 'trl'"},
    }  # fmt: skip
    for name, each in found.items():
        status = changes.get(name, "done")
        data = {"stage": name, "status": status, "reason": "", "seconds": 3.0, **H100}
        data["reason"] = "" if status == "done" else "dW off"
        record.write(folder / f"{name}.json", data | {"found": each})
    return root / "bench" / "results"


def test_the_document_holds_what_the_results_say():
    text = table.short(ROOT / "bench" / "results")
    page = (ROOT / "docs" / "results.md").read_text()
    assert report.inserted(page, text) == page, "python -m bench.report --write"


def test_without_results_nothing_is_measured(tmp_path):
    text = table.short(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(table.LINES)
    assert all("| not measured yet |" in line for line in rows)
    assert text.endswith("A training step of a random 0.5B model: not measured yet.")


def test_a_gpus_line(tmp_path):
    text = table.short(results(tmp_path))
    assert (
        "| `linear_logprobs`, forward | **12.5 ms** | 86% of 1 plain matrix product | 50 | 2.0e-03 "
        "| 4.0e-03 | 40.2 ms, 50 MiB | Liger CuTe 11.5 ms, 50 MiB |"
    ) in text
    assert "| `linear_policy_loss`, forward + backward | not measured yet |" in text
    assert "**NVIDIA H100 80GB HBM3**, torch 2.14.0, triton 3.8.0, python 3.12.1" in text
    assert "product 798.1 TFLOP/s, copy 3.01 TB/s, sources 0123456789ab" in text
    assert "selftest done; triton done (160 passed, 2 skipped); gpu not run." in text
    step = (
        "21000 tokens/s, 20.0 GiB, 0.31 of 0.43 s for sampling, the update at 41% of the product's"
    )
    assert f"{step} speed;" in text and "a later call" not in text
    path = tmp_path / "bench" / "results" / "gpu-h100" / "training.json"
    record.write(path, json.loads(path.read_text()) | {"sources": "fedcba987654"})
    assert text.removesuffix(".") + " (a later call, sources fedcba987654)." == table.short(
        tmp_path / "bench" / "results"
    )
    assert "TRL's GRPOTrainer absent: ModuleNotFoundError: No module named 'trl'." in text


@pytest.mark.parametrize("status", ["failed", "crashed"])
def test_no_speed_while_a_check_is_red(tmp_path, status):
    text = table.short(results(tmp_path, selftest=status))
    assert "| `linear_logprobs`, forward | not shown: red |" in text
    assert "ms" not in text and "tokens/s" not in text
    assert "**Red, so no speed is shown.** selftest: dW off" in text
    whole = table.whole(table.load(tmp_path / "bench" / "results" / "gpu-h100"))
    assert "12.5 ms" not in whole and f"| selftest | {status} |" in whole


def test_a_run_on_a_cpu_is_no_gpu(tmp_path):
    folder = results(tmp_path)
    for path in (folder / "gpu-h100").glob("*.json"):
        record.write(path, record.read(path) | {"size": "quick"})
    assert "ms |" not in table.short(folder)


def test_the_whole_table_has_every_row_and_who_is_absent(tmp_path):
    text = table.whole(table.load(results(tmp_path) / "gpu-h100"))
    assert "| forward | TRL chunked | 19 ms |  | 1 TFLOP/s | 57% | 50 | logprobs 1.0e-04," in text
    assert "- Liger absent: not installed" in text
    assert table.whole({}) == "Nothing has run.\n"


def test_the_marks_have_to_be_there():
    with pytest.raises(ValueError, match="wants one line"):
        report.inserted("nothing", "table")


def test_the_command_writes_the_document(tmp_path, capsys):
    results(tmp_path)
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main(["--write"], tmp_path) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n")
    assert "12.5 ms" in text and "old" not in text
    assert report.main([], tmp_path) == 0
    assert capsys.readouterr().out.strip() in text
    page.write_text("no marks")
    assert report.main(["--write"], tmp_path) == 2
    assert "docs/results.md wants" in capsys.readouterr().err
