"""`chatllama init`: a short commented YAML for a model, some data and a goal.

Asks for what its options do not say. Sizes come from the data: lengths that keep 99 % of the
records, batches small enough for at least 50 steps.
"""

import json
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import datasets
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from chatllama.config.loader import load_config
from chatllama.config.model import ChatSection
from chatllama.config.ppo import PpoSection
from chatllama.config.schema import Config
from chatllama.config.stages import SftSection
from chatllama.config.yaml_reader import parse_value
from chatllama.runtime.files import replace_text
from chatllama.runtime.waiting import now_doing
from chatllama.text.chat_format import settled, template_line
from chatllama.text.tokenizer import load_tokenizer
from data.checking.first_look import KINDS, FirstLook, first_look, quantile
from data.checking.show import print_records, shown_records

Goal = Literal["sft", "ppo", "grpo"]
GOALS: dict[Goal, str] = {
    "sft": "SFT only: answers like those in the data",
    "ppo": "SFT, a reward model from pairs, and PPO against it",
    "grpo": "GRPO with a reward function of yours",
}
Fit = Callable[[Config], Mapping[str, object] | None]
"""Settings with which a config fits the GPU; None: there are none."""
LEAST_STEPS, MOST_EPOCHS = 50, 3
LEAST_BATCH, MOST_BATCH = 4, 64
"""Sequences of an optimizer step."""
SHARE = 0.99
"""Of the records that a length limit keeps whole."""
FEW = 0.8
"""Share of records within the limit under which it is worth a warning."""
LOST = ", the others are "
Values = dict[str, tuple[object, str]]
"""Key -> value and comment."""


@dataclass(frozen=True)
class Wishes:
    """The options of `chatllama init`; None: asked for."""

    model: str | None = None
    data: tuple[str, ...] = ()
    goal: Goal | None = None
    reward: str | None = None
    out: Path | None = None


def init(wishes: Wishes, fit: Fit | None) -> Path:
    """Writes the config and prints it, one record as it will be rendered, and what comes next.

    Args:
        fit: for the GPU; None: training on the CPU.

    Raises:
        ValueError: something does not fit, or is neither given nor can be asked for.
    """
    model = wishes.model or _ask("Model (folder or hub id)", "--model")
    now_doing(f"reading the tokenizer of {model}")
    tokenizer = load_tokenizer(model)
    print(template_line(tokenizer, ChatSection()))
    names = wishes.data or tuple(_ask("Data files, separated by blanks", "--data").split())
    datasets.disable_progress_bars()
    looks: list[FirstLook] = []
    for name in names:
        now_doing(f"reading {name}")
        looks.append(look := first_look(name))
        print(f"{KINDS[look.kind]}: {look.summary}")
    goal = wishes.goal or _ask_goal(looks)
    reward = wishes.reward
    if goal == "grpo" and reward is None:
        reward = _ask("Reward function (module:function)", "--reward")
    name = f"{Path(model).name}-{goal}"
    out = wishes.out or Path(f"{name}.yaml")
    if out.exists():
        raise ValueError(f"{out} is there already: give another --out, or remove it")
    sections = _sections(model, tokenizer, looks, goal, reward, fit is not None)
    text = _yaml(f"runs/{name}", sections)
    if fit is not None:
        settings = fit(Config.model_validate(parse_value(text)))
        text = _yaml(f"runs/{name}", _fitted(sections, settings))
    replace_text(out, text)
    cfg = load_config(out)
    print(f"\n{out}:\n{text}")
    for name, values in sections.items():
        if LOST in values.get("max_length", ("", ""))[1]:
            limit, comment = values["max_length"]
            print(f"warning: {name}.max_length {limit} {comment}, for the model reads no more")
    stage = "sft" if "sft" in sections else "ppo"
    print_records(shown_records(cfg, tokenizer, stage, 1)[:1], Console())
    print(
        "\nnext:",
        *(f"  chatllama {words} {out}" for words in ("data check", "plan", "run")),
        sep="\n",
    )
    return out


def _sections(
    model: str,
    tokenizer: PreTrainedTokenizerFast,
    looks: Sequence[FirstLook],
    goal: Goal,
    reward: str | None,
    on_gpu: bool,
) -> dict[str, Values]:
    """The sections of the config, with the sizes that fit the data and the model's positions."""
    chat = settled(tokenizer, ChatSection())
    positions: int = vars(tokenizer).get("max_positions") or 2048
    by_kind = {kind: [look for look in looks if look.kind == kind] for kind in KINDS}
    talks, pairs, asked = by_kind["sft"], by_kind["preferences"], by_kind["prompts"]
    dtype = {} if on_gpu else {"dtype": ("float32", "bfloat16 is slow on a CPU")}
    sections: dict[str, Values] = {"backbone": {"path": (model, ""), **dtype}}
    learned = talks or (pairs if goal == "sft" else [])
    if learned and (goal != "grpo" or asked):
        whole = _all_lengths(learned, tokenizer, chat)
        limit = min(positions, _up(quantile(whole, SHARE), 64))
        mean = sum(min(length, limit) for length in whole) / len(whole)
        rows = sum(len(look.rows) for look in learned) * mean / limit  # packed
        sections["sft"] = _stage(learned, limit, rows, whole)
    elif goal == "sft":
        raise ValueError("--goal sft needs a file with answers, and these hold prompts alone")
    if goal == "sft":
        return sections
    if goal == "ppo":
        if not pairs:
            raise ValueError(
                "--goal ppo needs a file of pairs (chosen and rejected answers) for the reward "
                "model; without one, --goal sft, or --goal grpo with a reward function"
            )
        whole = _all_lengths(pairs, tokenizer, chat)
        limit = min(positions, _up(quantile(whole, SHARE), 64))
        rows = sum(len(look.rows) for look in pairs) * _within(whole, limit)
        sections["reward"] = _stage(pairs, limit, rows, whole, lost="left out")
    prompts = asked or (pairs if goal == "ppo" else talks or pairs)
    ahead = _all_lengths(prompts, tokenizer, chat, prompts=True)
    longest = min(positions // 2, _up(quantile(ahead, SHARE), 32))
    size = 64 if on_gpu else 32
    rollouts: Values = {
        "data": ([look.source for look in prompts], ""),
        "rollout_batch_size": (size, f"answers a step, in {PpoSection().steps} steps"),
        "minibatch_size": (size // 2, ""),
        "max_prompt_length": (longest, "tokens"),
    }
    if goal == "grpo":
        rollouts |= {
            "advantage": ("grpo", "no critic"),
            "samples_per_prompt": (4, ""),
            "rewards": ([{"function": reward}], "score = f(prompt, answer)"),
        }
    sections["ppo"] = rollouts
    # No answer is longer than the records that hold one.
    known = [int(str(part["max_length"][0])) for part in sections.values() if "max_length" in part]
    sections["generation"] = {"max_new_tokens": (min([256, positions - longest, *known]), "")}
    return sections


def _stage(
    looks: Sequence[FirstLook], limit: int, rows: float, lengths: Sequence[int], lost: str = "cut"
) -> Values:
    """The section of SFT or the reward model with about `rows` sequences an epoch.

    Args:
        lengths: of the records, in order of size.
        lost: what becomes of those over the limit.
    """
    batch, epochs = MOST_BATCH, 1
    while batch > LEAST_BATCH and rows / batch < LEAST_STEPS:
        batch //= 2
    while epochs < MOST_EPOCHS and rows * epochs / batch < LEAST_STEPS:
        epochs += 1
    steps = max(1, round(rows * 0.95 * epochs / batch))
    kept = _within(lengths, limit)
    others = f"{LOST}{lost}" if kept < FEW else ""
    more: Values = {"epochs": (float(epochs), "")} if epochs > 1 else {}
    if batch < SftSection().microbatch_size:
        more |= {"microbatch_size": (batch, "")}
    return {
        "data": ([look.source for look in looks], ""),
        "max_length": (limit, f"tokens; {kept:.0%} of the records are within{others}"),
        "batch_size": (batch, f"about {steps} steps in all"),
        **more,
    }


def _within(lengths: Sequence[int], limit: int) -> float:
    """Share of the lengths, which are in order of size, up to a limit."""
    return bisect_right(lengths, limit) / len(lengths)


def _fitted(
    sections: dict[str, Values], settings: Mapping[str, object] | None
) -> dict[str, Values]:
    """The sections with what the GPU asks for, of the stages that there are."""
    if settings is None:
        raise ValueError("no settings fit this GPU: see `chatllama plan`, and take a smaller model")
    fitted = {name: dict(values) for name, values in sections.items()}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if section in fitted or section not in ("sft", "reward", "ppo", "generation"):
            fitted.setdefault(section, {})[name] = (value, "for this GPU")
    return fitted


def _all_lengths(
    looks: Sequence[FirstLook],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    prompts: bool = False,
) -> list[int]:
    return sorted(n for look in looks for n in look.lengths(tokenizer, chat, prompts=prompts))


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _yaml(run_dir: str, sections: Mapping[str, Values]) -> str:
    """The text of the file."""
    lines = [
        "# By `chatllama init`. Every other key has a default: `chatllama configs copy reference`.",
        f"run_dir: {_plain(run_dir)}",
    ]
    for section, values in sections.items():
        comments = [comment for _, comment in values.values() if comment]
        if len(values) <= 2 and len(comments) <= 1:
            pairs = ", ".join(f"{key}: {_plain(value)}" for key, (value, _) in values.items())
            lines.append("  # ".join([f"{section}: {{{pairs}}}", *comments]))
            continue
        lines.append(f"{section}:")
        for key, (value, comment) in values.items():
            lines.append(f"  {key}: {_plain(value)}{f'  # {comment}' if comment else ''}")
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    """A value as YAML, without quotation marks where none are needed."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w./:-]*\w", value):
        return value
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, cast(list[Any], value)))}]"
    if isinstance(value, dict):
        items = cast(dict[str, Any], value).items()
        return f"{{{', '.join(f'{key}: {_plain(inner)}' for key, inner in items)}}}"
    return json.dumps(value, ensure_ascii=False)


def _ask_goal(looks: Sequence[FirstLook]) -> Goal:
    for name, about in GOALS.items():
        print(f"  {name:<5} {about}")
    likely = "ppo" if any(look.kind == "preferences" for look in looks) else "sft"
    answer = _ask(f"Goal [{likely}]", "--goal") or likely
    if answer not in get_args(Goal):
        raise ValueError(f"goal {answer!r}: one of {', '.join(GOALS)}")
    return cast(Goal, answer)


def _ask(question: str, flag: str) -> str:
    """The answer typed in; ValueError names the flag where nobody can be asked."""
    if not sys.stdin.isatty():
        raise ValueError(f"{flag} is missing, and there is no terminal to ask on")
    return input(f"{question}: ").strip()
