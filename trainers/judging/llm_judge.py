"""A language model as judge: every pair in both orders, each reply kept in a file.

What it is asked and how replies are read is in `data/synthesis/judging.py`, requests are in
`data/synthesis/client.py`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatllama.inference.options import digest
from chatllama.runtime.command_line import tell
from chatllama.runtime.jsonl import append_lines, resume
from data.synthesis.client import Endpoint, EndpointError, Reply, in_parallel
from data.synthesis.command import Estimate, ask_consent, cost_line, num_tokens, open_api
from data.synthesis.generate import FRUITLESS
from data.synthesis.judging import JUDGE, shown, verdict
from trainers.judging.judges import Judgement
from trainers.judging.options import JudgeOptions
from trainers.judging.sides import Comparison

PLACES = {"request": "request", "question": "request", "one": "one", "answer_a": "one",
          "two": "two", "answer_b": "two"}  # fmt: skip
"""Names in braces of a prompt, ours and FastChat's, and what stands there."""
_PLACE = re.compile("{(" + "|".join(PLACES) + ")}")


def by_model(comparisons: Sequence[Comparison], options: JudgeOptions, folder: Path) -> Judgement:
    """Verdicts of the model behind `--judge-url` on both orders of every pair.

    An outcome is the mean of both orders', so a judge that always prefers what it sees first gives
    ties. A pair with a verdict that cannot be read, or is missing, is left out and counted.

    Raises:
        ValueError: an option that does not fit, no consent, or the endpoint fails; replies so far
            are in `folder`.
    """
    template = read_template(options.judge_prompt)
    asked = [
        [_request(template, each, swapped) for swapped in (False, True)] for each in comparisons
    ]
    texts = list(dict.fromkeys(text for both in asked for text in both))
    replies = _replies(texts, options, folder)
    found = [
        [verdict(replies[text]["text"]) if text in replies else None for text in both]
        for both in asked
    ]
    orders = [_outcomes(*both) for both in found]
    cost = {
        "requests": len(replies),
        "prompt_tokens": sum(reply["prompt_tokens"] for reply in replies.values()),
        "completion_tokens": sum(reply["completion_tokens"] for reply in replies.values()),
    }
    paid = cost["requests"], cost["prompt_tokens"], cost["completion_tokens"]
    tell(cost_line(*paid, options))
    failed = sum(text not in replies for both in asked for text in both)
    if failed:
        tell(f"{failed} requests failed, and the same command tries them again")
    unread = sum(letter is None for both in found for letter in both) - failed
    return Judgement(
        f"{options.judge_model} at {options.judge_url}",
        [None if each is None else sum(each) / 2 for each in orders],
        orders,
        [{"verdicts": both, "replies": [replies.get(text, {}).get("text") for text in own]}
         for both, own in zip(found, asked, strict=True)],
        {"verdicts": 2 * len(found), "unreadable": unread, "failed": failed, **cost},
    )  # fmt: skip


def _outcomes(plain: str | None, swapped: str | None) -> tuple[float, float] | None:
    """The outcomes of two verdicts, of which the second saw the answers in the other order."""
    if plain is None or swapped is None:
        return None
    return {"A": 0.0, "B": 1.0, "C": 0.5}[plain], {"A": 1.0, "B": 0.0, "C": 0.5}[swapped]


def read_template(file: Path | None) -> str:
    """The prompt of the judge, ours or a file's; ValueError if it lacks a place."""
    if file is None:
        return JUDGE
    text = file.read_text(encoding="utf-8")
    missing = {*PLACES.values()} - {PLACES[name] for name in _PLACE.findall(text)}
    if missing:
        names = ", ".join(f"{{{name}}}" for name in sorted(missing))
        raise ValueError(f"--judge-prompt {file}: it does not say where {names} goes")
    return text


def _request(template: str, each: Comparison, swapped: bool) -> str:
    """What the judge reads. Of turns that follow different answers, each side shows its own."""
    first, second = each.first, each.second
    if first.messages == second.messages:
        request, texts = shown(first.messages), [first.response, second.response]
    else:
        asked = [turn for turn in first.messages if turn["role"] != "assistant"]
        request = shown(asked)
        texts = [
            shown([m for m in s.conversation if m["role"] != "system"]) for s in (first, second)
        ]
    if swapped:
        texts.reverse()
    values = {"request": request, "one": texts[0], "two": texts[1]}
    return _PLACE.sub(lambda place: values[PLACES[place[1]]], template)


def _replies(
    texts: Sequence[str], options: JudgeOptions, folder: Path
) -> dict[str, dict[str, Any]]:
    """The judge's reply to each text: those that are kept, then the others, asked for and kept."""
    assert options.judge_url is not None and options.judge_model is not None
    name = re.sub(r"[^\w.-]+", "-", options.judge_model)
    path = folder / f"judge-{name}.jsonl"
    settings = {"judge_model": options.judge_model, "judge_max_tokens": options.judge_max_tokens}
    kept = {line["asked"]: line for line in resume(settings, path)[0]}
    todo = [text for text in texts if digest(text) not in kept]
    if len(todo) < len(texts):
        tell(f"{path}: {len(texts) - len(todo)} of {len(texts)} replies are there")
    if todo:
        sent = sum(num_tokens(text) for text in todo)
        estimate = Estimate(len(todo), sent, len(todo) * options.judge_max_tokens)
        tell("\n".join(estimate.lines(options)))
        ask_consent(options.yes)
    endpoint = Endpoint(open_api(options.judge_url, options), options.judge_model)

    def ask(text: str) -> Reply:
        prompt = [{"role": "user", "content": text}]
        return endpoint.chat(prompt, temperature=0.0, max_tokens=options.judge_max_tokens)

    in_a_row = 0
    try:
        for count, (text, reply) in enumerate(in_parallel(ask, todo, options.parallel), start=1):
            in_a_row = 0 if reply else in_a_row + 1
            if in_a_row == FRUITLESS or (in_a_row == len(todo)):
                raise EndpointError(f"{in_a_row} requests in a row failed, for the reasons above")
            if reply is not None:
                line = {"asked": digest(text), "text": reply.text}
                line |= {
                    name: getattr(reply, name) for name in ("prompt_tokens", "completion_tokens")
                }
                append_lines(path, [line])
                kept[line["asked"]] = line
            if count % max(1, len(todo) // 20) == 0 or count == len(todo):
                tell(f"{count} of {len(todo)} requests")
    except (EndpointError, KeyboardInterrupt):
        tell(f"{path}: {len(kept)} replies are kept; the same command goes on from here")
        raise
    return {text: kept[digest(text)] for text in texts if digest(text) in kept}
