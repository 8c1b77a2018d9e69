"""The Python door: `chatllama.load` opens a model, `chatllama.train` makes one.

Sampling, scoring and training are in `inference/` and `trainers/`, imported when they are needed.
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from chatllama.inference.folders import find_model, is_run
from chatllama.inference.options import (
    ChatOptions,
    GenerateOptions,
    GenerationRole,
    check_options,
    complete,
    default_role,
)
from chatllama.runs.folder import STAGES
from chatllama.runtime.declared_options import check_limits
from chatllama.runtime.jsonl import read_lines

if TYPE_CHECKING:  # importing them takes seconds
    import pandas

    from chatllama.inference.answerer import Answer
    from chatllama.inference.chat_model import ChatModel
    from chatllama.inference.load import LoadedRun
    from chatllama.text.chat_format import Message

Prompt: TypeAlias = "str | Sequence[Message]"
"""A text as the user's only message, or messages, each with `role` and `content`."""


class Model:
    """A run, an adapter or a plain model; the weights are loaded when they are first needed."""

    def __init__(
        self,
        place: str | Path,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        quantization: Literal["none", "int8", "nf4"] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from chatllama.config.schema import with_weights

        self.folder, cfg = find_model(place)
        self.config = with_weights(cfg, dtype, quantization)
        """Of the run; of a plain model, the defaults."""
        self._trusted = trust_remote_code

    def __repr__(self) -> str:
        return f"chatllama.load({str(self.folder.root)!r})"

    @property
    def roles(self) -> tuple[GenerationRole, ...]:
        """Who can answer: `base`, `sft`, `policy`, `ema`, as far as they are there."""
        return self._speaker(ChatOptions()).roles

    @property
    def metrics(self) -> "pandas.DataFrame":
        """Everything that training logged: a row for each stage and step, a column a metric.

        Raises:
            ValueError: no run, which alone has metrics.
        """
        import pandas

        if not is_run(self.folder):
            raise ValueError(f"{self.folder.root} is not a run: only training logs metrics")
        files = [(stage, self.folder.metrics(stage)) for stage in STAGES]
        return pandas.DataFrame(
            {"stage": stage, **line}
            for stage, file in files
            for line in (read_lines(file) if file.is_file() else [])
        )

    def chat(
        self,
        messages: Prompt,
        *,
        role: GenerationRole | None = None,
        temperature: float = 0.7,
        top_p: float = 0.9,
        max_new_tokens: int | None = None,
        stops: Sequence[str] = (),
        seed: int | None = None,
    ) -> str:
        """The answer to a conversation; what follows, where its last message is the assistant's.

        Where it does not fit the model's positions, the oldest exchanges are left out. None: the
        newest of policy, sft and base; the config's `generation`; other answers every time.

        Raises:
            ValueError: an option out of range, a role that is not there, messages out of order.
        """
        options = ChatOptions(
            role=role,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            stops=tuple(stops),
            seed=seed,
        )
        check_limits(options)
        speaker = self._speaker(options)
        acting = speaker.find(role or default_role(self.folder))
        return "".join(speaker.answer(_conversation(messages), acting))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        role: GenerationRole | None = None,
        n: int = 1,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_new_tokens: int | None = None,
        stops: Sequence[str] = (),
        seed: int = 0,
        logprobs: bool = False,
        batch_size: int | None = None,
    ) -> "list[list[Answer]]":
        """`n` answers to each prompt, with their reward scores where there is a reward model.

        They are those of `chatllama generate` with the same options. None: the config's
        `generation`.

        Raises:
            ValueError: an option out of range, a role that is not there, messages out of order.
        """
        import torch

        from chatllama.inference.answerer import Answerer, random_numbers
        from chatllama.inference.chat_model import ACTING

        if isinstance(prompts, str):
            raise ValueError("generate takes a list of prompts; for one text: [text]")
        options = GenerateOptions(
            role=role,
            num_samples=n,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            stops=tuple(stops),
            seed=seed,
            logprobs=logprobs,
            batch_size=batch_size,
        )
        check_options(options)
        settings = complete(self.folder, self.config, options)
        if not prompts:
            return []
        drawn = [(number, sample) for number in range(len(prompts)) for sample in range(n)]
        longest = settings.sampling.max_new_tokens
        answers = Answerer(self._loaded, ACTING[settings.role]).answer(
            [_conversation(prompts[number]) for number, _ in drawn],
            torch.stack([random_numbers(seed, *each, longest) for each in drawn]),
            settings.sampling,
            options.stops,
            settings.batch_size,
            logprobs,
        )
        return [answers[start : start + n] for start in range(0, len(answers), n)]

    def score(self, prompt: Prompt, answer: str) -> float:
        """The reward model's score of an answer, the mean or minimum of its ensemble.

        Raises:
            ValueError: there is no reward model, or messages are out of order.
        """
        from chatllama.inference.answerer import Answerer, with_answer

        if not self._loaded.reward_roles:
            raise ValueError(f"{self.folder.root} has no reward model to score with")
        judge = Answerer(self._loaded, "base")
        ids = judge.render(with_answer(_conversation(prompt), answer), False)
        return judge.scores([ids])[0]

    @cached_property
    def _loaded(self) -> "LoadedRun":
        from chatllama.inference.load import load_run

        return load_run(self.folder, self.config, trust_remote_code=self._trusted)

    def _speaker(self, options: ChatOptions) -> "ChatModel":
        from chatllama.inference.chat_model import ChatModel

        return ChatModel.chosen(self._loaded, options)


def load(
    place: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    quantization: Literal["none", "int8", "nf4"] | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Opens a run folder, the folder of an adapter or of a model, or a model's hub id.

    Args:
        place: an adapter's base is the one that its chatllama.json names, or that of its run.
        dtype: of the weights. None: the run's; of a plain model, bfloat16 and on the CPU float32.
        quantization: of the frozen weights (extra: bitsandbytes). None: the run's.
        trust_remote_code: runs Python code that comes with the model.

    Raises:
        ValueError: nothing of this kind is there.
    """
    return Model(place, dtype, quantization, trust_remote_code)


def train(
    config: str | Path,
    *overrides: str,
    reward: Callable[..., float] | None = None,
    resume: bool = False,
    num_gpus: int | None = 1,
) -> Model:
    """Runs the stages of a config in order, as `chatllama run` does, and opens the result.

    Args:
        config: the YAML.
        overrides: `section.key=value` each.
        reward: takes the place of `ppo.rewards`: see `examples/reward_function.py`.
        resume: goes on from the newest checkpoint of an interrupted stage.
        num_gpus: 1: everything runs in this process, where `reward` may be of a notebook or script.
            More, or None for all GPUs: the stages run through the `deepspeed` launcher, whose
            processes import `reward` by its name.

    Raises:
        ValueError: the config is wrong, or `reward` cannot be found by its name.
        trainers.stages.pipeline.StageFailed: a stage failed; later ones were not run.
    """
    from trainers.stages.arguments import load_stage_config
    from trainers.stages.launcher import Launch
    from trainers.stages.pipeline import run_pipeline

    given = list(overrides)
    if reward is not None:
        name = _importable(reward, elsewhere=num_gpus != 1)
        given.append(f"ppo.rewards={json.dumps([{'function': name}])}")
    launch = Launch(in_process=True) if num_gpus == 1 else Launch(num_gpus=num_gpus)
    run_pipeline(str(config), given, launch=launch, resume=resume)
    return Model(load_stage_config(config, given).run_dir)


def _importable(function: Callable[..., float], elsewhere: bool) -> str:
    """`module:function` of a function; ValueError where that name leads to another or to none."""
    from chatllama.config.base import load_function

    name = f"{function.__module__}:{function.__qualname__}"
    if "<" in name or load_function(name, "reward") is not function:
        raise ValueError(f"reward: {name} cannot be imported: define it with `def` in a module")
    if elsewhere and function.__module__ == "__main__":
        raise ValueError(
            f"reward: {name} is of this script or notebook, which other processes do not import: "
            "put it into a module of its own, or leave num_gpus at 1"
        )
    return name


def _conversation(prompt: Prompt) -> "list[Message]":
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
