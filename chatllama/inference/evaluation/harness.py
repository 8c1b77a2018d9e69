"""lm-eval on a loaded run: likelihoods by its own code, answers by ours.

A role is an adapter on the backbone that all share, so one model in memory serves every role.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from chatllama.generation.sampling import Sampling
from chatllama.inference.answerer import Answerer
from chatllama.inference.evaluation.suites import SUITES, local_records
from chatllama.model.roles import sampling_as
from chatllama.runtime.jsonl import append_lines, read_lines
from chatllama.text.chat_format import Message

_HFLM: Any = HFLM  # its decorators hide its type
MAX_GEN_TOKS = 256
"""Tokens of an answer where a task does not say; lm-eval's own default."""
logging.getLogger("lm_eval").setLevel(logging.ERROR)


class RoleLM(_HFLM):
    """The model of a run as lm-eval wants it.

    Likelihoods are HFLM's, by the active role. Where a task has the model write, its text is one
    message of the user under the run's chat contract, answered greedily.

    Args:
        partial: file in which a task's likelihoods are kept as they come, and found again after an
            interruption. It belongs to one role, task and settings.
    """

    def __init__(self, answerer: Answerer, batch_size: int, partial: Path) -> None:
        super().__init__(
            pretrained=answerer.model.llama,
            tokenizer=answerer.loaded.tokenizer,
            batch_size=batch_size,
        )
        self._answerer, self._rows, self._partial = answerer, batch_size, partial
        self.truncated = 0
        self.set_cache_hook(self)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """As HFLM's, with bars in a terminal only."""
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: Sequence[Any], *rest: Any, **more: Any) -> Any:
        """As HFLM's, which cuts what is too long on the left; `truncated` counts such texts.

        Args:
            requests: of each ((context, choice), their tokens).
        """
        positions: int = self._answerer.model.llama.config.max_position_embeddings
        lengths = [len(context) + len(choice) for _, context, choice in requests]
        self.truncated += sum(length > positions + 1 for length in lengths)
        kept = {tuple(line["request"]): tuple(line["found"]) for line in read_lines(self._partial)}
        rest_of_them = [request for request in requests if request[0] not in kept]
        found = iter(super()._loglikelihood_tokens(rest_of_them, *rest, **more))
        return [kept[each[0]] if each[0] in kept else next(found) for each in requests]

    def add_partial(self, kind: str, request: Any, found: Any) -> None:
        """Keeps a likelihood that HFLM has just computed; it calls this for each."""
        if kind == "loglikelihood":
            append_lines(self._partial, [{"request": request, "found": found}])

    def _model_call(self, *inputs: Any, **more: Any) -> torch.Tensor:
        with sampling_as(self._answerer.model, self._answerer.acting):
            return super()._model_call(*inputs, **more)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, in their order."""
        answers: list[str] = []
        positions: int = self._answerer.model.llama.config.max_position_embeddings
        for start in range(0, len(requests), self._rows):
            batch = requests[start : start + self._rows]
            talks: list[list[Message]] = [
                [{"role": "user", "content": request.args[0]}] for request in batch
            ]
            settings: Mapping[str, Any] = batch[0].args[1]
            longest = max(len(self._answerer.render(talk)) for talk in talks)
            room = positions - longest
            if room < 1:
                raise ValueError(
                    f"a prompt of {longest} tokens leaves no room for an answer: the model has "
                    f"{positions} positions"
                )
            new = min(settings.get("max_gen_toks", MAX_GEN_TOKS), room)
            stops = [stop for stop in settings.get("until", []) if stop]
            greedy, unused = Sampling(new, temperature=0.0), torch.zeros(len(talks), new)
            found = self._answerer.answer(talks, unused, greedy, stops, self._rows, False)
            answers += [answer.text for answer in found]
        return answers


@cache
def task_manager() -> TaskManager:
    """lm-eval's index of tasks, which takes seconds to read."""
    return TaskManager()


def find_tasks(names: Sequence[str]) -> dict[str, list[str]]:
    """The single tasks behind each name.

    Raises:
        ValueError: lm-eval has no task, tag or group of that name.
    """
    return {name: list(_single(name)) for name in names}


def _single(name: str) -> Iterator[str]:
    manager = task_manager()
    entry = manager.task_index.get(name)
    if entry is None:
        near = get_close_matches(name, [*SUITES, *manager.all_tasks], 3)
        hint = f"; near are {', '.join(near)}" if near else ""
        raise ValueError(f"--suite: neither a suite nor a task of lm-eval: {name!r}{hint}")
    if entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        for child in (entry.cfg or {}).get("task", []):
            yield from _single(child if isinstance(child, str) else child["task"])
    else:
        yield name


def measure(
    lm: RoleLM, task: str, shots: int | None, limit: int | None, data: Path | None
) -> dict[str, float]:
    """Metrics of one task with their standard errors (`acc`, `acc_stderr`), and counts.

    `items`; `truncated`: choices that are, with their question, longer than the model's positions.

    Args:
        shots: examples before each question. None: as the task says.
        limit: the first so many items only.
        data: folder of local records (`suites.py::local_records`). None: from the hub.
    """
    spec: str | dict[str, Any] = task
    if data is not None:
        # A group: only its members' keys are laid over what lm-eval has under their names.
        records = local_records(task, data)
        spec = {"group": "local", "task": [{"task": task, "custom_dataset": records}]}
    lm.truncated = 0
    try:
        found = simple_evaluate(
            lm,
            tasks=[spec],
            num_fewshot=shots,
            limit=limit,
            task_manager=task_manager(),
            log_samples=False,
        )
    except ModuleNotFoundError as error:
        raise ValueError(f"{task} needs the package {error.name}: pip install it") from error
    assert found and "results" in found and "n-samples" in found  # on rank 0
    numbers = {
        name.removesuffix(",none"): float(value)
        for name, value in found["results"][task].items()
        if name.endswith(",none") and isinstance(value, int | float)
    }
    return numbers | {"items": found["n-samples"][task]["effective"], "truncated": lm.truncated}
