"""`make gpu` without a GPU: every row comes, and those that can run do."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from chatllama.runs.folder import STAGES
from trainers.stages.refusals import load_checked_config

PROJECT = Path(__file__).resolve().parents[2]
ROWS = [
    "tests marked gpu",
    "selftest, float32",
    "selftest, bfloat16",
    "demo, float32",
    "demo, bfloat16",
    "a real model, three stages",
    "7B shapes: sft",
    "7B shapes: reward",
    "7B shapes: ppo",
    "7B shapes: sft, nf4",
    "7B shapes: reward, nf4",
    "7B shapes: ppo, nf4",
    "7B shapes: ppo, compiled",
    "7B shapes: ppo, ZeRO-0 on one rank",
    "7B shapes: ppo, ZeRO-2 on one rank",
    "7B shapes: ppo, ZeRO-3 on one rank",
    "SFT beside TRL",
    "reward model beside TRL",
    "PPO beside TRL 1.12",
    "make real GPU=1",
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, which finds what lies beside it."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    found = importlib.util.spec_from_file_location("gpu", PROJECT / "benchmarks" / "gpu.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "gpu", module)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("print('x'); print('{\"a b\": 1.5, \"c\": 2}')", "| n | done | T | a b 1.5, c 2 |"),
        ("print('| a | 1 |'); print('| b | 2 |')", "| n | done | T | / a / 1 /<br>/ b / 2 / |"),
        ("print('3 passed')", "| n | done | T | 3 passed |"),
        ("raise SystemExit(5)", "| n | done | T |  |"),
        ("raise ValueError('no\\nluck')", "| n | FAILED | T | exit code 1: luck |"),
        ("import time; time.sleep(60)", "| n | FAILED | T | not finished in time |"),
    ],
)
def test_a_row_says_what_was_found_or_why_not(gpu: Any, code: str, line: str) -> None:
    row = gpu.Row("n", [sys.executable, "-c", code])
    outcome = gpu.run(row, time.monotonic() + (2 if "sleep" in code else 60))
    assert gpu.table_line(outcome | {"seconds": "T"}) == line


def test_rows_that_cannot_run_say_why(gpu: Any) -> None:
    late = gpu.run(gpu.Row("n", ["false"]), time.monotonic())
    assert (late["result"], late["found"]) == ("skipped", "no time was left")
    without = gpu.run(gpu.Row("n", skipped="no GPU"), time.monotonic() + 9)
    assert (without["result"], without["found"]) == ("skipped", "no GPU")


@pytest.mark.parametrize("size", ["full", "small", "tiny"])
def test_all_rows_at_all_sizes(gpu: Any, size: str, tmp_path: Path) -> None:
    rows = list(gpu.rows(size, None, None, tmp_path))
    assert [row.name for row in rows] == ROWS
    given = list(gpu.rows(size, tmp_path, Path("python112"), tmp_path))
    assert {row.name for row in given if row.skipped} <= {
        row.name for row in rows if row.skipped
    } - {"a real model, three stages", "PPO beside TRL 1.12"}


@pytest.mark.slow
def test_every_row_is_there_and_runs_dry(tmp_path: Path) -> None:
    command = [sys.executable, PROJECT / "benchmarks" / "gpu.py", "--size", "tiny"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*-gpu-dry-run.json")
    found = {row["row"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(found) == ROWS
    skipped = {name for name, row in found.items() if row["result"] == "skipped"}
    assert skipped <= {row for row in ROWS if "nf4" in row} | {
        "a real model, three stages",
        "7B shapes: ppo, compiled",
        "PPO beside TRL 1.12",
        "make real GPU=1",
    }
    assert all(found[name]["found"] for name in skipped)  # the reason
    ppo = found["7B shapes: ppo"]["found"]
    for name in ("rollout tokens/s", "generate tokens/s", "bandwidth bound tokens/s", "update MFU"):
        assert ppo[name] > 0
    for row in ROWS[6:9]:
        assert found[row]["found"]["planned GB"] > 0 and found[row]["found"]["peak GB"] > 0
    table = file.with_suffix(".md").read_text()
    assert all(f"| {row} |" in table for row in ROWS)


def test_rows_of_rates_are_code_of_the_table(gpu: Any) -> None:
    ppo = {"rollout tokens/s": 3.26, "scoring tokens/s": 4.0, "update tokens/s": 5.0}
    ppo["parameters"] = 77
    done = {"7B shapes: sft": {"tokens/s": 1.0}, "7B shapes: reward": {"tokens/s": 2.0}}
    done["7B shapes: ppo"] = ppo
    found = [{"row": name, "result": "done", "found": each} for name, each in done.items()]
    found.append({"row": "7B shapes: sft, nf4", "result": "skipped", "found": "no package"})
    plain, packed = gpu.rate_rows(found, "tiny")
    (row,) = eval(f"({plain})", {"MeasuredRates": gpu.MeasuredRates})
    assert (row.parameters, row.dtype, row.machine) == (77, "float32", gpu.CPU)
    assert (row.sft, row.reward, row.sampling, row.scoring, row.update) == (1, 2, 3.3, 4, 5)
    assert packed.strip() == "# one CPU core, nf4: not measured"


@pytest.mark.parametrize(
    ("name", "gigabytes", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 80, "h100"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
        ("NVIDIA A10", 23, "a10"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("Tesla T4", 15, "Tesla T4"),
    ],
)
def test_names_of_gpus(gpu: Any, name: str, gigabytes: int, key: str) -> None:
    assert gpu.gpu_named(name, gigabytes * 2**30) == key


def test_the_demo_of_a_dry_run_is_not_refused(gpu: Any, tmp_path: Path) -> None:
    own = [f"run_dir={tmp_path}", *gpu.FEW_STEPS]
    load_checked_config(str(PROJECT / "configs" / "quickstart.yaml"), own, STAGES, lambda _: 1)
