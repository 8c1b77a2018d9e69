"""Kills real training at random moments, goes on with --resume, and compares the final weights.

    python tests/kills/run.py --kills 50 --seed 0

SFT, reward model and PPO on a tiny LLaMA, each first without interruption. Then each is killed
again and again: with SIGKILL at any moment or in the middle of a save, sometimes with SIGTERM or
SIGUSR1, which must end it with code 75. Nothing published may be lost, and the adapters of the run
that went through all that must be bit-equal to those of the other. Every attempt is forked from
this process, which has imported everything once and done nothing else.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ppo_runs

import train_ppo
import train_rm
import train_sft
from chatllama.runs.checkpoints import newest_good, step_folders, step_of
from chatllama.runs.folder import STAGES, RunFolder, Stage
from chatllama.runs.interruption import EXIT_CODE
from chatllama.text.tokenizer import train_tokenizer
from trainers.ppo import evaluate
from trainers.ppo import model as ppo_setup
from trainers.ppo import train as ppo
from trainers.reward import train as reward
from trainers.reward.diagnosis import model_report
from trainers.sft import pretrain
from trainers.sft import train as sft
from trainers.stages.arguments import run_stage

WARM = (evaluate, ppo, ppo_setup, pretrain, reward, model_report, sft)
"""Imported before the first fork."""
MAINS = {"sft": train_sft.main, "reward": train_rm.main, "ppo": train_ppo.main}
PEOPLE = ("Anna", "the baker", "my brother", "Victor", "the queen", "a quiet child")
PLACES = ("the river", "a garden", "an old house", "the market", "some forest")


def prepare(folder: Path) -> None:
    """Base, data and config of the runs."""
    lines = [f"{who} walks to {where} at {n}." for n, where in enumerate(PLACES) for who in PEOPLE]
    train_tokenizer(
        [f"Where is everybody? {line}" for line in lines] * 3, 300, folder / "tokenizer"
    )
    base = ppo_runs.make_base(folder / "base", folder / "tokenizer")
    records = [
        {"prompt": f"Where is {line.split(' walks')[0]} {line[-5:-1]}?", "completion": line,
         "chosen": line, "rejected": "Nobody knows."}
        for line in lines
    ]  # fmt: skip
    kept = {"sft": ("prompt", "completion"), "pairs": ("prompt", "chosen", "rejected")}
    for name, keys in (*kept.items(), ("prompts", ("prompt",))):
        rows = [json.dumps({key: record[key] for key in keys}) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(dict.fromkeys(rows)))
    saving = {"save_every": 1, "eval_fraction": 0.2}
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "backbone": {"path": base, "dtype": "float32"},
        "chat": {"template": "llama2"},
        "lora": {"r": 4, "alpha": 8.0, "dropout": 0.1},
        "tracking": {"report_to": [], "sample_every": 0},
        "generation": {"max_new_tokens": 4, "batch_size": 16},
        "evaluation": {"num_prompts": 2},
        "sft": {"data": [{"path": f"{folder}/sft.jsonl"}], "steps": 8, "batch_size": 4,
                "microbatch_size": 2, "max_length": 200, "warmup_steps": 3, **saving},
        "reward": {"data": [{"path": f"{folder}/pairs.jsonl"}], "steps": 8, "batch_size": 4,
                   "microbatch_size": 2, "max_length": 200, "allow_weak": True, **saving},
        "ppo": {"data": [{"path": f"{folder}/prompts.jsonl"}], "steps": 6,
                "rollout_batch_size": 4, "minibatch_size": 4, "microbatch_size": 2, "epochs": 2,
                "learning_rate": 1e-3, "score_normalization": "running", "ema_decay": 0.9,
                "score_normalization_samples": 4, "kl_controller": "adaptive", "kl_horizon": 50,
                **saving},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))


def start(work: Callable[[], object], log: Path) -> int:
    """A child process that does `work` as a script's `main`; its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        run_stage(work)  # type: ignore[arg-type]
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Its exit code; -N if signal N ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Campaign:
    """Kills in one run folder, until the given number of them is done.

    Args:
        folder: for everything.
        seed: of the moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        self.rng = random.Random(seed)
        self.whole, self.cut = RunFolder(folder / "whole"), RunFolder(folder / "cut")
        self.counts: Counter[str] = Counter()
        self.seconds: dict[Stage, float] = {}

    def command(self, run: RunFolder) -> list[str]:
        return [str(self.folder / "config.yaml"), f"run_dir={run.root}", "--resume"]

    def stage(self, run: RunFolder, stage: Stage) -> int:
        return start(lambda: MAINS[stage](self.command(run)), self.log)

    def uninterrupted(self) -> None:
        """The run to compare with."""
        assert wait(start(lambda: prepare(self.folder), self.log)) == 0, self.log.read_text()
        for stage in STAGES:
            began = time.monotonic()
            assert wait(self.stage(self.whole, stage)) == 0, self.log.read_text()[-3000:]
            self.seconds[stage] = time.monotonic() - began

    def interrupted(self, stage: Stage, kills: int) -> None:
        """`kills` kills of a stage, then its end; anew from its start if that comes too soon."""
        while True:
            code = self._attempt(stage, kill=kills > 0)
            if code is None:
                kills -= 1
                continue
            assert code == 0, (code, self.log.read_text()[-3000:])
            self.compare(stage)
            if not kills:
                return
            shutil.rmtree(self.cut.stage(stage))

    def _attempt(self, stage: Stage, kill: bool) -> int | None:
        """Goes on with a stage; its exit code, or None if it was killed."""
        before = self.newest(stage)
        attempt = self.stage(self.cut, stage)
        if not kill:
            return wait(attempt)
        signum = self.rng.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGUSR1])
        kind = "any moment" if self.rng.random() < 0.4 else "a save"
        if kind == "a save":
            self._wait_for_saves(attempt, stage, self.rng.randint(1, 2))
            time.sleep(self.rng.uniform(0, 0.02))
        else:
            self._sleep(attempt, self.rng.uniform(0, self.seconds[stage]))
        if not _lives(attempt):
            return wait(attempt)
        os.kill(attempt, signum)
        code = wait(attempt)
        if code == 0:  # it ended just then
            return 0
        # A signal that comes before the script listens ends it as it ends any process.
        expected = (-signum,) if signum == signal.SIGKILL else (-signum, EXIT_CODE)
        assert code in expected, (code, expected, self.log.read_text()[-3000:])
        unfinished = self.cut.stage(stage) / ".unfinished"
        torn = any(path.is_file() for path in unfinished.rglob("*"))
        self.counts[f"{signal.Signals(signum).name} at {kind}"] += 1
        self.counts["saves torn"] += torn
        self.check(stage, before)
        return None

    def newest(self, stage: Stage) -> int:
        """The newest published step, 0 for none."""
        found = step_folders(self.cut.checkpoints(stage))
        return step_of(found[-1]) if found else 0

    def check(self, stage: Stage, before: int) -> None:
        """What had been published is there, whole."""
        folder = self.cut.checkpoints(stage)
        assert self.newest(stage) >= before, (self.newest(stage), before)
        if step_folders(folder):
            checkpoint, _ = newest_good(folder)
            assert step_of(checkpoint) == self.newest(stage), "a damaged checkpoint was published"
        if self.cut.interrupted(stage).is_file():
            told = json.loads(self.cut.interrupted(stage).read_text())
            assert told["step"] == self.newest(stage), told
            self.counts["signals that saved"] += 1

    def compare(self, stage: Stage) -> None:
        """The weights of both runs are bit-equal."""
        hashes = [
            {
                path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(run.stage(stage).glob("*/adapter_model.safetensors"))
            }
            for run in (self.whole, self.cut)
        ]
        assert hashes[0] == hashes[1] and hashes[0], (stage, hashes)
        self.counts["stages ended, weights equal"] += 1

    def _wait_for_saves(self, attempt: int, stage: Stage, number: int) -> None:
        """Returns when that many saves have begun, or the attempt has ended."""
        unfinished = self.cut.stage(stage) / ".unfinished"
        seen, was_there = 0, unfinished.exists()  # one may be left of the kill before
        while _lives(attempt) and seen < number:
            is_there = unfinished.exists() and any(unfinished.iterdir())
            seen += is_there and not was_there
            was_there = is_there
            time.sleep(0.0005)

    def _sleep(self, attempt: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while _lives(attempt) and time.monotonic() < end:
            time.sleep(0.002)


def _lives(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def main() -> None:
    """One campaign; prints what was done, and ends with code 1 at the first thing lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=50, help="over the three stages (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        campaign, began = Campaign(Path(name), arguments.seed), time.monotonic()
        campaign.uninterrupted()
        share, rest = divmod(arguments.kills, len(STAGES))
        for number, stage in enumerate(STAGES):
            campaign.interrupted(stage, share + (number < rest))
            print(f"{stage}: {dict(campaign.counts)}", flush=True)
        print(f"{arguments.kills} kills, nothing lost, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
