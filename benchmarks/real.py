"""RLHF on a real model, from the package index alone (`make real`).

    python benchmarks/real.py [--seeds 0 1 2] [--reviews PLACE] [--instructions PLACE]
        [--harmless PLACE] [--gpu] [--shrunk]

SmolLM2-135M-Instruct (Apache-2.0) comes in a wheel. Four tasks: sentiment of film reviews with a
learned reward model (SFT, best-of-16, GRPO, RLOO, PPO), sums and checkable constraints with a
function as the reward, and human preferences. Everything lies in runs/real below the current
folder; what is done is kept, so an interrupted command goes on. Ends with runs/real/real.md.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from real_plan import CONFIGS, HOME, PLACES, PROJECT, SHRUNK, Step, settings_of, steps
from rich.console import Group
from rich.live import Live
from rich.text import Text

from chatllama.runtime.jsonl import settings_path


def main() -> int:
    """Does what is missing; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    for name, place in PLACES.items():
        parser.add_argument(f"--{name}", default=place, help=f"file, folder or hub id ({place})")
    parser.add_argument("--gpu", action="store_true", help="with configs/real/gpu.yaml")
    parser.add_argument("--shrunk", action="store_true", help="a few steps of everything")
    arguments = parser.parse_args()
    paths = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    (HOME / "done").mkdir(parents=True, exist_ok=True)
    places = {name: getattr(arguments, name) for name in PLACES}
    settings = (*(settings_of(CONFIGS / "gpu.yaml") if arguments.gpu else ()),)
    settings += SHRUNK if arguments.shrunk else ()
    plan = list(steps(arguments.seeds, places, settings))
    if arguments.shrunk:
        plan = [replace(step, minutes=step.minutes / 8) for step in plan]
    view = View(plan)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Live(view, refresh_per_second=1) as live:
        for step in plan:
            try:
                code = 0 if step.is_done() else run(step, view, live)
            except KeyboardInterrupt:
                live.stop()
                print(f"Interrupted at {step.name}; the same command goes on.", file=sys.stderr)
                return 130
            if code:
                live.stop()
                print(f"{step.name} failed ({code}); its output ends with:", file=sys.stderr)
                print("\n".join(log(step).read_text().splitlines()[-12:]), file=sys.stderr)
                print(f"All of it: {log(step)}. The same command goes on here.", file=sys.stderr)
                return 1
    print(Path(plan[-1].words[2]).read_text())
    return 0


def log(step: Step) -> Path:
    """What its command printed."""
    return step.done.with_suffix(".log")


def run(step: Step, view: "View", live: Live) -> int:
    """Its exit code; 0 leaves `done`."""
    view.now, view.begun = step, time.monotonic()
    words, key = step.words, json.dumps(step.key)
    again = step.begun.is_file() and step.begun.read_text() == key
    if again and step.metrics is not None:
        words = [*words, "--resume"]
    elif step.start and step.metrics is not None and step.metrics.exists():
        words = [*words, "--from", step.start]
    if step.out is not None and step.out.is_dir():
        shutil.rmtree(step.out)
    elif step.out is not None and not again:
        for file in (step.out, settings_path(step.out)):
            file.unlink(missing_ok=True)
    step.begun.write_text(key)
    with log(step).open("ab") as output:
        # In a session of its own, since a second signal ends a stage before it has saved.
        child = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
                time.sleep(0.5)
                live.refresh()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    _, status, used = ended  # with all processes that it waited for
    code = os.waitstatus_to_exitcode(status)
    if code and step.gate is not None and step.gate.is_file():
        refused = json.loads(step.gate.read_text())["accuracy_low"] <= 0.5
        code = 0 if refused else code
    if code == 0:
        record = {
            **step.key,
            "wall_seconds": round(time.monotonic() - view.begun, 1),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
            "largest_process_mib": used.ru_maxrss // 2**10,
        }
        step.done.write_text(json.dumps(record, indent=1))
    return code


class View:
    """What is done, what runs, and the time left."""

    def __init__(self, plan: Sequence[Step]):
        self.plan, self.now, self.begun = plan, plan[0], time.monotonic()

    def __rich__(self) -> Group:
        """Three lines."""
        done = [step for step in self.plan if step.is_done()]
        left = [step for step in self.plan if not step.is_done()]
        planned = sum(step.minutes for step in done)
        spent = sum(json.loads(step.done.read_text())["wall_seconds"] for step in done) / 60
        slower = spent / planned if planned > 5 else 1.0  # than the machine of `minutes`
        running = (time.monotonic() - self.begun) / 60
        minutes = max(0.0, slower * sum(step.minutes for step in left) - running)
        at = ""
        if self.now.metrics is not None and self.now.metrics.exists():
            last = self.now.metrics.read_text().splitlines()[-1:]
            at = f", step {json.loads(last[0])['step']}" if last else ""
        return Group(
            Text(f"{len(done)} of {len(self.plan)} done, about {minutes:.0f} min left", "bold"),
            Text(f"now: {self.now.name}{at}, {running:.1f} min"),
            Text("then: " + ", ".join(step.name for step in left[1:4]), "dim"),
        )


if __name__ == "__main__":
    sys.exit(main())
