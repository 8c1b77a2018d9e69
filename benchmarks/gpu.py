"""Every check that needs a GPU, in one command (`make gpu`), as a dated table and a JSON file.

    python benchmarks/gpu.py [--model FOLDER] [--trl-python PYTHON] [--minutes 30] [--out FOLDER]

In order: the tests marked gpu, the selftest, the demo in two types, two steps of each stage at the
shapes of a 7B LLaMA (bfloat16, 4 bits, compiled, under ZeRO 0, 2 and 3 on one rank) with peak
memory beside the plan's, TRL side by side, and `make real` on a larger model. With less than 70 GB
the shapes are shrunk; without a GPU they are tiny, which shows that every row runs and measures
nothing. A row that fails or does not come to its turn in time says so; the others go on. Exit code
1 if a row failed.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import hardware, launcher, publish

from chatllama.planning.hardware import GPUS
from chatllama.planning.rates import CPU, MeasuredRates

PROJECT = Path(__file__).resolve().parent.parent
SHAPES: dict[str, dict[str, int]] = {
    "full": {},
    "small": {"layers": 16, "rows": 16},
    "tiny": {
        "width": 64,
        "inner": 128,
        "layers": 2,
        "heads": 2,
        "rows": 4,
        "prompt": 16,
        "new-tokens": 8,
    },
}
FEW_STEPS = [
    *("backbone.from_scratch.steps=3", "sft.steps=2", "reward.steps=2", "ppo.steps=1"),
    *("reward.allow_weak=true", "evaluation.num_prompts=4", "ppo.score_normalization=none"),
    "ppo.critic_warmup_steps=0",
]
NOTES = PROJECT / "data" / "samples" / "garden_notes"


@dataclass(frozen=True)
class Row:
    """One line of the table: a command whose last line of JSON, or last line, is the result."""

    name: str
    command: Sequence[object] = ()
    skipped: str = ""
    """Why it does not run here; empty: it does."""


def main() -> int:
    """Runs all rows; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(SHAPES), help="default: by the GPU's memory")
    parser.add_argument("--model", type=Path, help="a real LLaMA of about 135M parameters")
    parser.add_argument("--trl-python", type=Path, help="of an environment with TRL 1.12")
    parser.add_argument("--minutes", type=float, default=30.0, help="no row starts later")
    parser.add_argument("--out", type=Path, default=PROJECT / "benchmarks" / "results")
    arguments = parser.parse_args()
    size, end = arguments.size or own_size(), time.monotonic() + 60 * arguments.minutes
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="chatllama-gpu-") as work:
        for row in rows(size, arguments.model, arguments.trl_python, Path(work)):
            found.append(run(row, end))
            print(table_line(found[-1]), flush=True)
    name = f"{datetime.date.today()}-gpu" + ("" if size != "tiny" else "-dry-run")
    arguments.out.mkdir(parents=True, exist_ok=True)
    head = f"{where()}; sizes: {size}; {hardware(torch.get_num_threads())}"
    content = {"head": head, "size": size, "rows": found}
    (arguments.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    file = arguments.out / f"{name}.md"
    file.unlink(missing_ok=True)
    lines = [head, "", "| row | result | seconds | what was found |", "|---|---|---|---|"]
    lines += map(table_line, found)
    lines += ["", "Rows of `chatllama/planning/rates.py`:", "", *rate_rows(found, size)]
    publish(lines, file)
    return int(any(each["result"] == "FAILED" for each in found))


def own_size() -> str:
    """The sizes that this machine's GPU can take."""
    if not torch.cuda.is_available():
        return "tiny"
    return "full" if torch.cuda.get_device_properties(0).total_memory > 70e9 else "small"


def where() -> str:
    """The GPU's name and memory."""
    if not torch.cuda.is_available():
        return "CPU, a dry run: no figure here says anything"
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"


def rows(size: str, model: Path | None, trl: Path | None, work: Path) -> Iterator[Row]:
    """All rows of the table, in order."""
    python, tiny = sys.executable, size == "tiny"
    quick = FEW_STEPS if tiny else []
    yield Row("tests marked gpu", [python, "-m", "pytest", "-q", "-m", "gpu", PROJECT / "tests"])
    selftest = (
        "from trainers.selftest.run import selftest as s\nraise SystemExit(not s([0], {}, '{}'))"
    )
    for dtype in ("float32", "bfloat16"):
        yield Row(f"selftest, {dtype}", [python, "-c", selftest.format(tiny, dtype)])
    for dtype in ("float32", "bfloat16"):
        command = [python, "-m", "chatllama.cli", "run", PROJECT / "configs" / "quickstart.yaml"]
        command += [f"run_dir={work / dtype}", f"backbone.dtype={dtype}", "--num-gpus", "1"]
        yield Row(f"demo, {dtype}", [*command, *quick])
    yield real_model(model, work, tiny)
    yield from large_rows(size)
    yield from trl_rows(size, trl, work)
    command = [python, PROJECT / "benchmarks" / "real.py", "--gpu"]
    yield Row("make real GPU=1", command, "needs a GPU and the hub" if tiny else "")


def real_model(model: Path | None, work: Path, tiny: bool) -> Row:
    """The three stages of a real model, on the demo's data."""
    name = "a real model, three stages"
    if model is None:
        return Row(name, skipped="no model was given (--model FOLDER)")
    command = [sys.executable, "-m", "chatllama.cli", "run", PROJECT / "configs/quickstart.yaml"]
    command += [f"run_dir={work / 'real'}", "backbone.from_scratch=null", f"backbone.path={model}"]
    command += ["chat.template=chatml", "--num-gpus", "1", "sft.steps=20", "reward.steps=20"]
    command += ["ppo.steps=5", "reward.allow_weak=true", "evaluation.num_prompts=16"]
    return Row(name, [*command, *(FEW_STEPS[1:] if tiny else [])])


def large_rows(size: str) -> Iterator[Row]:
    """Two steps of each stage at large shapes."""
    script = PROJECT / "benchmarks" / "large_stages.py"
    words = [word for key, value in SHAPES[size].items() for word in (f"--{key}", value)]
    if size == "tiny":
        words += ["--dtype", "float32"]
    alone = [sys.executable, script, *words]
    for stage in ("sft", "reward", "ppo"):
        yield Row(f"7B shapes: {stage}", [*alone, "--stage", stage])
    for stage in ("sft", "reward", "ppo"):
        command = [*alone, "--stage", stage, "--quantization", "nf4"]
        yield Row(f"7B shapes: {stage}, nf4", command, missing("bitsandbytes", size))
    yield Row("7B shapes: ppo, compiled", [*alone, "--compile"], "" if size != "tiny" else CPU_ONLY)
    for zero in (0, 2, 3):
        command = [*launcher(1), script, *words, "--zero", zero]
        yield Row(f"7B shapes: ppo, ZeRO-{zero} on one rank", command)


CPU_ONLY = "needs a GPU: minutes of compilation on a CPU"


def missing(package: str, size: str) -> str:
    """Why a row needs a package that is not here, or a GPU; empty: it can run."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        return f"{package} is not installed"
    return "needs a GPU" if size == "tiny" else ""


def trl_rows(size: str, trl: Path | None, work: Path) -> Iterator[Row]:
    """TRL's trainers beside ours, at 15M parameters; the demo's tokenizer and data."""
    python, tokenizer = sys.executable, work / "float32" / "backbone"
    few = ["--steps", 1, "--rounds", 1] if size == "tiny" else []
    for name, script, data in (
        ("SFT", "sft_speed.py", NOTES / "sft.jsonl"),
        ("reward model", "reward_speed.py", NOTES / "heldout_preferences.jsonl"),
    ):
        command = [python, PROJECT / "benchmarks" / script, tokenizer, data, *few]
        yield Row(f"{name} beside TRL", command)
    name, script = "PPO beside TRL 1.12", PROJECT / "benchmarks" / "ppo_speed.py"
    if trl is None:
        yield Row(name, skipped="no environment with TRL 1.12 was given (--trl-python PYTHON)")
    else:
        yield Row(name, [python, script, "--trl-python", trl, *few])


def run(row: Row, end: float) -> dict[str, Any]:
    """The row's outcome; it is killed at `end`, a time of the monotonic clock."""
    outcome: dict[str, Any] = {"row": row.name, "result": "skipped", "seconds": 0.0}
    left = end - time.monotonic()
    if row.skipped or left < 1:
        return outcome | {"found": row.skipped or "no time was left"}
    paths = [str(PROJECT), str(PROJECT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [str(word) for word in row.command],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=left,
        )
    except subprocess.TimeoutExpired:
        return outcome | {"result": "FAILED", "seconds": left, "found": "not finished in time"}
    outcome["seconds"] = round(time.monotonic() - start, 1)
    if done.returncode not in (0, NO_TESTS):
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        return outcome | {"result": "FAILED", "found": f"exit code {done.returncode}: {last}"}
    return outcome | {"result": "done", "found": last_result(done.stdout)}


NO_TESTS = 5
"""pytest's exit code where it chose none."""


def last_result(output: str) -> Any:
    """The last line of JSON, else the table's lines at the end, else the last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    found = [line for line in lines if line.startswith("{")]
    if found:
        return json.loads(found[-1])
    table = [line for line in lines if line.startswith("|")]
    return table or (lines[-1].strip() if lines else "")


def rate_rows(found: Sequence[dict[str, Any]], size: str) -> Iterator[str]:
    """What `chatllama plan` can take its hours from, as code to be pasted."""
    done = {each["row"]: each["found"] for each in found if each["result"] == "done"}
    machine, name = CPU, hardware(1).split("; ")[1].partition(",")[0]
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        machine, name = gpu_named(gpu.name, gpu.total_memory), gpu.name
    for kind, ending in (("float32" if size == "tiny" else "bfloat16", ""), ("nf4", ", nf4")):
        rows = [f"7B shapes: {stage}{ending}" for stage in ("sft", "reward", "ppo")]
        if not all(row in done for row in rows):
            yield f"    # {machine}, {kind}: not measured"
            continue
        sft, reward, ppo = (done[row] for row in rows)
        row = MeasuredRates(
            date=str(datetime.date.today()),
            found=name,
            machine=machine,
            parameters=ppo["parameters"],
            dtype=kind,
            sft=round(sft["tokens/s"], 1),
            reward=round(reward["tokens/s"], 1),
            sampling=round(ppo["rollout tokens/s"], 1),
            scoring=round(ppo["scoring tokens/s"], 1),
            update=round(ppo["update tokens/s"], 1),
        )
        yield f"    {row},"


def gpu_named(name: str, memory: float) -> str:
    """The key of `GPUS` in a GPU's name as CUDA gives it, nearest in memory; else that name."""
    words = re.sub("[^a-z0-9]", "", name.lower())
    fitting = [key for key in GPUS if key.partition("-")[0] in words]
    return min(fitting, key=lambda key: abs(GPUS[key].memory - memory), default=name)


def table_line(outcome: dict[str, Any]) -> str:
    """A row of Markdown."""
    found = outcome["found"]
    if isinstance(found, dict):
        parts = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()]
        text = ", ".join(parts)
    else:
        text = "<br>".join(found) if isinstance(found, list) else str(found)
    text = text.replace("|", "/")
    return f"| {outcome['row']} | {outcome['result']} | {outcome['seconds']} | {text} |"


if __name__ == "__main__":
    raise SystemExit(main())
