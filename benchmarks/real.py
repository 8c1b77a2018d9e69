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

from psutil import virtual_memory
from real_plan import CONFIGS, HOME, PLACES, PROJECT, SHRUNK, Step, settings_of, steps
from rich.console import Group
from rich.live import Live
from rich.text import Text

from chatllama.runtime.jsonl import settings_path
from chatllama.runtime.machine import count_cores

LANE_BYTES = 5 * 2**30
"""Memory for a step at a time: the largest took 4.1 GiB."""


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
    if not arguments.gpu:
        os.environ["OMP_NUM_THREADS"] = "1"  # as many steps at a time as cores: the same bits
    lanes = 1 if arguments.gpu else max(1, min(count_cores(), virtual_memory().total // LANE_BYTES))
    view, begun = View(plan, lanes), time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Live(view, refresh_per_second=1) as live:
        try:
            failed = work(view)
        except KeyboardInterrupt:
            live.stop()
            names = ", ".join(view.running)
            print(f"Interrupted at {names}; the same command goes on.", file=sys.stderr)
            return 130
    if failed is not None:
        print(f"{failed.name} failed; its output ends with:", file=sys.stderr)
        print("\n".join(log(failed).read_text().splitlines()[-12:]), file=sys.stderr)
        print(f"All of it: {log(failed)}. The same command goes on here.", file=sys.stderr)
        return 1
    print(Path(plan[-1].words[2]).read_text())
    print(f"{(time.monotonic() - begun) / 60:.0f} minutes, {lanes} steps at a time.")
    return 0


def work(view: "View") -> Step | None:
    """Does what is ready, in the order of the plan, as many steps at a time as there are lanes.

    Returns:
        A step that failed, if one did; what ran beside it has saved.
    """
    running = view.running
    try:
        while True:
            for step in view.ready()[: view.lanes - len(running)]:
                running[step.name] = Running(step)
            if not running:
                return None
            time.sleep(0.5)
            for name, each in [*running.items()]:
                if (code := each.code()) is None:
                    continue
                if code:
                    return each.step
                del running[name]
                view.done.add(name)
    finally:
        for each in running.values():
            each.stop()


def log(step: Step) -> Path:
    """What its command printed."""
    return step.done.with_suffix(".log")


class Running:
    """A step's command. `code` must be asked until it tells one, or `stop` called."""

    def __init__(self, step: Step):
        self.step, self.begun, self._code = step, time.monotonic(), None
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
        # In a session of its own, since a second signal ends a stage before it has saved.
        with log(step).open("ab") as output:
            self._child = subprocess.Popen(
                words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def stop(self) -> None:
        """Ends it, if it has not ended; a training saves."""
        if self._code is None:
            self._child.terminate()
            self._child.wait()

    def code(self) -> int | None:
        """Its exit code, once it has ended; 0 leaves `done`."""
        pid, status, used = os.wait4(self._child.pid, os.WNOHANG)
        if not pid:
            return None
        step, code = self.step, os.waitstatus_to_exitcode(status)
        self._code = self._child.returncode = code
        if code and step.gate is not None and step.gate.is_file():
            refused = json.loads(step.gate.read_text())["accuracy_low"] <= 0.5
            code = 0 if refused else code
        if code == 0:
            record = {
                **step.key,
                "wall_seconds": round(time.monotonic() - self.begun, 1),
                "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
                "largest_process_mib": used.ru_maxrss // 2**10,
            }
            step.done.write_text(json.dumps(record, indent=1))
        return code


class View:
    """What is done, what runs, and the time left."""

    def __init__(self, plan: Sequence[Step], lanes: int):
        self.plan, self.lanes = plan, lanes
        self.done = {step.name for step in plan if step.is_done()}
        self.running: dict[str, Running] = {}
        self._begun, self._before = time.monotonic(), set(self.done)

    def ready(self) -> list[Step]:
        """Steps that can begin."""
        return [
            step
            for step in self.plan
            if step.name not in self.done
            and step.name not in self.running
            and all(each.name in self.done for each in step.after)
        ]

    def __rich__(self) -> Group:
        """A line of all, and one of each step that runs."""
        now = time.monotonic()
        left = sum(step.minutes for step in self.plan if step.name not in self.done)
        running = sum(each.step.minutes for each in self.running.values())
        spent = sum((now - each.begun) / 60 for each in self.running.values())
        minutes = (left - min(spent, running)) / self.lanes
        planned = (
            sum(step.minutes for step in self.plan if step.name in self.done - self._before)
            / self.lanes
        )
        if planned > 5:  # minutes: by then the machine is known
            minutes *= ((now - self._begun) / 60 - spent / self.lanes) / planned
        lines = [f"{len(self.done)} of {len(self.plan)} done, about {minutes:.0f} min left"]
        for name, each in self.running.items():
            at, metrics = "", each.step.metrics
            if metrics is not None and metrics.exists():
                last = metrics.read_text().splitlines()[-1:]
                at = f", step {json.loads(last[0])['step']}" if last else ""
            lines.append(f"now: {name}{at}, {(now - each.begun) / 60:.1f} min")
        return Group(Text(lines[0], "bold"), *map(Text, lines[1:]))


if __name__ == "__main__":
    sys.exit(main())
