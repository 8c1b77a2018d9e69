"""The top of the page: how a run stands and what to do next.

What the numbers say is in `summary.py`; here is what follows from it, with the keys to turn.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from chatllama.config.schema import Config
from chatllama.reporting.summary import Finding, findings, number, word_of
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runs.outcome import StageState, stage_state
from chatllama.runtime.json_files import held_to_be_whole

REWARD_KEYS = "reward.data (more or cleaner pairs), reward.epochs, reward.learning_rate, lora.r"
Health = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Verdict:
    """The first lines of the page."""

    kind: Literal["good", "bad", "neutral"]
    status: str
    findings: list[Finding]
    steps: list[str]
    """What to do next."""


def no_gold(summary: dict[str, Any]) -> str:
    """What a run without a gold score proves, and what it does not."""
    reward = word_of(summary, "reward")
    flaws = "what nobody thought of asking for" if "function" in reward else "its mistakes"
    return (
        f"It shows that the policy climbs {reward}, which it was trained on, on prompts that "
        "training has not seen. It does not show that people would prefer its answers: a policy "
        f"can also climb {flaws}. Read the answers below; evaluation.gold names a function that "
        "judges independently, and `chatllama eval` runs public benchmarks."
    )


def verdict(
    run: RunFolder,
    cfg: Config | None,
    stages: Sequence[Stage],
    summary: dict[str, Any],
    health: Health | None,
) -> Verdict:
    """How the run stands.

    Args:
        cfg: None where it is of another version.
        stages: those that the run has.
    """
    found = findings(summary)
    done = [stage for stage in stages if run.result(stage).is_file()]
    pending: list[Stage] = [stage for stage in stages if stage not in done]
    folder = shlex.quote(str(run.root))
    if not pending:
        is_bad = any(each.kind == "bad" for each in found)
        kind = "neutral" if is_bad else "good"
        return Verdict(kind, "Finished", found, _after(found, summary, folder))
    again = f"chatllama run {shlex.quote(str(run.config))}"
    state = stage_state(run, pending[0])
    if state.kind == "running":
        words = f"Running: stage {pending[0]} of {', '.join(stages)}"
        words += f", step {state.step} is done." * bool(state.step)
        return Verdict("neutral", words, found, [f"`chatllama report {folder}` shows it later."])
    if refused := _refusal(run, cfg, pending):
        step = f"Change {REWARD_KEYS}, then `{again} --from reward`."
        return Verdict("bad", f"Refused: {refused}", [], [step])
    if stopped := [d for each in (health or {}).values() for d in each if d["decision"] == "stop"]:
        last = stopped[-1]
        name = word_of(summary, "trainer")
        text = f"Stopped: {last['name']} at step {last['step']} of {name}. {last['message']}"
        return Verdict("bad", text, found, [f"Change {last['knob']}, then `{again} --from ppo`."])
    if state.kind in ("refused", "failed", "killed"):
        return _ended(state, pending[0], again, found)
    resume = " --resume" if run.was_begun(pending[0]) else ""
    words = f"Not finished: {', '.join(done) or 'nothing'} of {', '.join(stages)} is done."
    if state.kind == "interrupted":
        words += f" Stage {pending[0]} is {state}."
    return Verdict("neutral", words, found, [f"`{again}{resume}` goes on with {pending[0]}."])


def _ended(state: StageState, stage: Stage, again: str, found: list[Finding]) -> Verdict:
    """A stage that ended without a result."""
    resume = " --resume" if state.saved else ""
    after = f" after step {state.step}" if state.step else " before its first step"
    if state.kind == "killed":
        newest = f"the newest checkpoint is of step {state.saved}"
        words = f"Killed: stage {stage} ended{after} and left no message; "
        words += f"{newest if state.saved else 'there is no checkpoint'}."
        steps = [
            f"`{again}{resume}` goes on with it{'' if resume else ', from its start'}.",
            f"Without a message it is often a lack of memory: `{again.replace(' run ', ' plan ')}` "
            f"says what it needs and which keys lower that, first {stage}.microbatch_size.",
        ]
        return Verdict("bad", words, found, steps)
    if state.kind == "failed":
        words = f"Failed: stage {stage} ended{after}: {state.reason}"
        return Verdict("bad", words, found, [f"`{again}{resume}` tries again."])
    word = "Stopped" if state.step else "Refused"
    words = f"{word}: stage {stage}{after if state.step else ''}: {state.reason}"
    if state.reason.startswith("stopped "):  # it says after which step
        words = f"Stopped: stage {stage} {state.reason.removeprefix('stopped ')}"
    step = f"Put right what it names; a key can be given as in `{again} section.key=value{resume}`."
    return Verdict("bad", words, found, [step])


def _refusal(run: RunFolder, cfg: Config | None, pending: Sequence[Stage]) -> str:
    """Why PPO does not start from the reward model; '' where it does."""
    if "ppo" not in pending or not run.result("reward").is_file():
        return ""
    if cfg is None or cfg.reward.allow_weak:
        return ""
    with held_to_be_whole(run.result("reward")):
        found = run.read_result("reward")
        if "accuracy_low" not in found:  # of a finished adapter, which was not measured here
            return ""
        accuracy, low, high = (found[f"accuracy{end}"] for end in ("", "_low", "_high"))
    if low > 0.5:
        return ""
    return (
        f"PPO does not start, because the reward model's accuracy {accuracy:.3f} (95 % Wilson "
        f"interval {low:.3f} to {high:.3f}) cannot be distinguished from guessing."
    )


def _after(found: Sequence[Finding], summary: dict[str, Any], folder: str) -> list[str]:
    """What to do with a finished run."""
    if number(summary, "ppo.response_length") is None:
        return [f"`chatllama chat {folder}` talks to the model."]
    steps, reward = [], word_of(summary, "reward")
    kind = found[0].kind if found and "reward model's" not in found[0].text else "good"
    if kind == "bad":
        more = "" if "function" in reward else ": reward.data with fresh pairs of its answers"
        steps.append(
            "Do not use the policy as it is. Raise ppo.kl_coef or lower ppo.steps, or improve "
            f"{reward}{more}."
        )
    elif kind == "neutral":
        steps.append(
            "Raise ppo.steps or lower ppo.kl_coef for a larger change; raise "
            "evaluation.num_prompts for smaller errors."
        )
    if any("reward model's" in each.text for each in found if each.kind == "bad"):
        steps.append(f"The reward model first: {REWARD_KEYS}.")
    steps.append("Read the answers below, above all those that got worse.")
    if kind == "good":
        steps.append(
            f"`chatllama chat {folder}` talks to it, `chatllama export {folder}` packs it."
        )
    return steps
