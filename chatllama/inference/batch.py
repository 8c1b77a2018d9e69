"""`chatllama generate`: many prompts answered, to the terminal or to a file that can be resumed.

The order of the work is here; options are in `options.py`, prompts are read in `prompt_files.py`
and answered in `answerer.py`.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatllama.config.schema import with_weights
from chatllama.inference.folders import find_model
from chatllama.inference.options import (
    GenerateOptions,
    Settings,
    best_of_kl,
    check_options,
    complete,
)
from chatllama.inference.prompt_files import Prompt
from chatllama.reporting.display import answer_progress
from chatllama.reporting.statistics import mean_and_error
from chatllama.runs.folder import RunFolder
from chatllama.runtime.command_line import duration, printable, tell
from chatllama.runtime.jsonl import append_lines, resume
from chatllama.runtime.waiting import doing

if TYPE_CHECKING:  # importing them takes seconds
    from chatllama.config.schema import Config
    from chatllama.inference.answerer import Answer, Answerer


def generate_command(
    run_dir: Path, prompts: Sequence[Prompt], options: GenerateOptions, out: Path | None = None
) -> None:
    """Answers every prompt; to `out` as JSON lines, else to the terminal. Ends with a summary.

    An interrupted run goes on where `out` ends. The random numbers of an answer belong to (seed,
    number of the prompt, number of the sample), so the first samples of a larger number are those
    of a smaller one. Interruptions change nothing, batch sizes no more than rounding does.

    Raises:
        ValueError: an option out of range, no such role in the run, a prompt too long for the
            model, or an `out` that holds other answers.
    """
    check_options(options)
    run, cfg = find_model(run_dir)
    settings = complete(run, cfg, options)
    keys = [(prompt.id, sample) for prompt in prompts for sample in range(settings.kept)]
    done: list[dict[str, Any]] = []
    if out is not None:
        done += map(_summarised, _answers_in(out, settings.saved(run, prompts), keys))
    new: list[dict[str, Any]] = []
    seconds = 0.0
    if len(done) < len(keys):
        if done:
            tell(f"{out}: going on after {len(done)} of {len(keys)} answers")
        new, seconds = _answer_all(run, cfg, settings, prompts, len(done), out)
    new_tokens = sum(line["num_tokens"] for line in new)
    tell("\n".join(summary(settings, [*done, *new], new_tokens, seconds)))


def _answer_all(
    run: RunFolder,
    cfg: "Config",
    settings: Settings,
    prompts: Sequence[Prompt],
    done: int,
    out: Path | None,
) -> tuple[list[dict[str, Any]], float]:
    """Answers the prompts from line `done` on; every batch is written, or printed, at once.

    Returns:
        What the summary needs of each new line; seconds without loading.
    """
    with doing("loading libraries"):
        from chatllama.inference.answerer import Answerer
        from chatllama.inference.load import load_run, reward_role

        acting = "reference" if settings.role == "sft" else settings.role
        rewards = [reward_role(number) for number in range(len(settings.rewards))]
        cfg = with_weights(cfg, settings.dtype, settings.quantization)
        trusted = settings.options.trust_remote_code
        loaded = load_run(run, cfg, [acting, *rewards], trust_remote_code=trusted)
    answerer = Answerer(loaded, acting, settings.options.compile)
    longest = _check_lengths(answerer, prompts, settings.sampling.max_new_tokens)
    # Batches begin where they would without an interruption, so that not even rounding differs.
    per_batch = max(1, settings.batch_size // settings.drawn)
    if answerer.compiled is not None:  # once for all batches
        rows = min(per_batch, len(prompts)) * settings.drawn
        answerer.compiled.reserve(min(rows, settings.batch_size), longest)
    first = done // settings.kept // per_batch * per_batch
    skipped = done - first * settings.kept
    total = len(prompts) * settings.kept
    answered: list[dict[str, Any]] = []
    started = time.monotonic()
    with_bar = out is not None or not sys.stdout.isatty()
    with answer_progress(total, done, with_bar) as advance:
        for start in range(first, len(prompts), per_batch):
            batch = range(start, min(start + per_batch, len(prompts)))
            with nullcontext() if with_bar else doing("answering"):
                lines = _answer_batch(answerer, settings, prompts, batch)[skipped:]
            skipped = 0
            if out is not None:
                append_lines(out, lines)
            for line in lines:
                answered.append(_summarised(line))
                if out is None:
                    _show(line, alone=total == 1)
            advance(len(lines))
    return answered, time.monotonic() - started


def _answer_batch(
    answerer: "Answerer", settings: Settings, prompts: Sequence[Prompt], batch: range
) -> list[dict[str, Any]]:
    """The lines of a few prompts."""
    import torch

    from chatllama.inference.answerer import random_numbers

    options, sampling = settings.options, settings.sampling
    drawn = [(number, sample) for number in batch for sample in range(settings.drawn)]
    uniforms = [random_numbers(options.seed, *each, sampling.max_new_tokens) for each in drawn]
    answers = answerer.answer(
        [prompts[number].messages for number, _ in drawn],
        torch.stack(uniforms),
        sampling,
        options.stops,
        settings.batch_size,
        options.logprobs,
    )
    lines = []
    for place, number in enumerate(batch):
        own = answers[place * settings.drawn : (place + 1) * settings.drawn]
        if settings.kept == settings.drawn:
            for sample, answer in enumerate(own):
                extra = {"sample": sample} if settings.kept > 1 else {}
                lines.append(_line(options, prompts[number], answer, extra))
        else:
            scores = [answer.score for answer in own if answer.score is not None]
            best = own[max(range(len(scores)), key=scores.__getitem__)]
            extra = {"best_of": len(own), "mean_candidate_score": sum(scores) / len(scores)}
            lines.append(_line(options, prompts[number], best, extra))
    return lines


def _line(
    options: GenerateOptions, prompt: Prompt, answer: "Answer", extra: dict[str, Any]
) -> dict[str, Any]:
    line: dict[str, Any] = {"id": prompt.id, **extra, "prompt": prompt.content}
    line |= {"response": answer.text, "finished": answer.finished, "num_tokens": len(answer.ids)}
    if answer.score is not None:
        line["score"] = answer.score
    if answer.logprobs is not None:
        line |= {"logprob": sum(answer.logprobs), "logprobs": answer.logprobs}
    if options.token_ids:
        line["token_ids"] = answer.ids
    return line


def _summarised(line: dict[str, Any]) -> dict[str, Any]:
    """What `summary` needs of a line."""
    names = ("num_tokens", "finished", "score", "mean_candidate_score")
    return {name: line[name] for name in names if name in line}


def summary(
    settings: Settings, answers: Sequence[dict[str, Any]], new_tokens: int, seconds: float
) -> list[str]:
    """The closing lines; `new_tokens` and `seconds` are those of this call only."""
    finished = sum(line["finished"] for line in answers) / len(answers)
    length, _ = mean_and_error([line["num_tokens"] for line in answers])
    scores, candidate_scores = (
        [line[key] for line in answers if key in line] for key in ("score", "mean_candidate_score")
    )
    lines = [
        f"{len(answers)} answers by {settings.role}: {finished:.1%} finished, "
        f"{length:.1f} tokens on average"
    ]
    if new_tokens:
        rate = new_tokens / max(seconds, 1e-9)
        lines.append(f"{duration(seconds)}, {rate:.0f} tokens of answers a second")
    if scores:
        lines.append(f"score {_with_error(scores)}")
    if candidate_scores:
        drawn = settings.drawn
        lines.append(
            f"best of {drawn}: score of all samples {_with_error(candidate_scores)}; "
            f"KL to {settings.role} at most {best_of_kl(drawn):.3f} nats (log n - (n - 1)/n)"
        )
    return lines


def _with_error(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} +- {error:.3f}"


def _check_lengths(answerer: "Answerer", prompts: Sequence[Prompt], max_new_tokens: int) -> int:
    """Tokens of the longest prompt with its answer; ValueError names the first that cannot fit."""
    limit = answerer.model.llama.config.max_position_embeddings
    too_long: list[tuple[str, int]] = []
    longest = 0
    for prompt in prompts:
        try:
            tokens = len(answerer.render(prompt.messages))
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from error
        longest = max(longest, tokens + max_new_tokens)
        if tokens + max_new_tokens > limit:
            too_long.append((prompt.where, tokens))
    if too_long:
        where, tokens = too_long[0]
        others = f" ({len(too_long)} prompts are too long)" if len(too_long) > 1 else ""
        raise ValueError(
            f"{where}: a prompt of {tokens} tokens and --max-new-tokens {max_new_tokens} do not "
            f"fit the model's {limit} positions{others}"
        )
    return longest


def _show(line: dict[str, Any], alone: bool) -> None:
    """Prints an answer: its text alone, or below its prompt where there are several."""
    if alone:
        print(printable(line["response"]), flush=True)
        return
    prompt = line["prompt"]
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    score = f"  (score {line['score']:.2f})" if "score" in line else ""
    print(f"> {printable(text)}\n< {printable(line['response'])}{score}", flush=True)


def _answers_in(
    path: Path, settings: Mapping[str, Any], keys: Sequence[tuple[int | str, int]]
) -> list[dict[str, Any]]:
    """The answers that `path` already holds; ValueError if they are others than those of `keys`."""
    (answers,) = resume(settings, path)
    if len(answers) > len(keys):
        raise ValueError(f"--out {path}: {len(answers)} lines, more than the {len(keys)} answers")
    for number, (answer, key) in enumerate(zip(answers, keys, strict=False), start=1):
        found = (answer.get("id"), answer.get("sample", 0))
        if found != key:
            raise ValueError(
                f"--out {path}:{number}: id {found[0]!r}, sample {found[1]} where id {key[0]!r}, "
                f"sample {key[1]} belongs; the file was changed since it was written"
            )
    return answers
