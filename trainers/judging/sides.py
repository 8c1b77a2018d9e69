"""The two sides of a comparison: the questions, and each side's answers to them.

A side is a role of a run, a model, an adapter, or a file of answers. Who is better is decided by
`judges.py` and `llm_judge.py`.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from chatllama.config.sources import DataSource
from chatllama.inference.batch import generate_command
from chatllama.inference.folders import find_model, is_run
from chatllama.inference.options import GenerateOptions, GenerationRole, find_role
from chatllama.inference.prompt_files import Prompt
from chatllama.runs.folder import RunFolder
from chatllama.runtime.command_line import tell
from chatllama.runtime.jsonl import read_lines
from chatllama.text.chat_format import Message
from data.mixture import load_mixture
from data.reading.formats import RecordError
from data.reading.source import decode_source, read_source
from trainers.functions.sample import Sample
from trainers.judging.options import ROLES, JudgeOptions
from trainers.judging.sources import data_source

ANSWER_FILES = (".jsonl", ".json")
CATEGORIES = ("category", "subset")


@dataclass(frozen=True)
class Side:
    """Who answers."""

    name: str
    """As it was given."""
    place: str
    role: GenerationRole | None = None
    """None: the newest."""

    @property
    def file(self) -> Path | None:
        """The answers, where they are given."""
        path = Path(self.place)
        return path if path.suffix in ANSWER_FILES else None


@dataclass(frozen=True)
class Question:
    """A conversation to answer, and what the user says after the answers."""

    messages: list[Message]
    where: str
    later: list[str] = field(default_factory=list)
    category: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Two answers to one question, in one turn."""

    first: Sample
    second: Sample
    turn: int
    category: str | None

    @property
    def cluster(self) -> str:
        """Equal for all answers to one question: the user's first message."""
        return next(m["content"] for m in self.first.messages if m["role"] == "user")


def find_sides(first: str, second: str | None) -> tuple[Side, Side]:
    """The sides as they are typed; of a run alone, what PPO began with and its policy.

    Raises:
        ValueError: a file or role that is not there, or the same side twice.
    """
    if second is None:
        run, cfg = find_model(first)
        if not is_run(run):
            raise ValueError(f"{first}: give a second side to compare it with")
        find_role(run, cfg, "policy")
        has_sft = run.sft_adapter.is_dir() or run.full_model.is_dir()
        start: GenerationRole = "sft" if has_sft else "base"
        return Side(f"{first}:{start}", first, start), Side(f"{first}:policy", first, "policy")
    sides = _side(first), _side(second)
    if sides[0] == sides[1]:
        raise ValueError(f"{first} is given twice: there is nothing to compare")
    for side in sides:
        if side.file is not None:
            if not side.file.is_file():
                raise ValueError(f"{side.file}: no such file of answers")
        else:
            run, cfg = find_model(side.place)
            find_role(run, cfg, side.role)
    return sides


def _side(text: str) -> Side:
    place, _, role = text.rpartition(":")
    if place and role in ROLES and not Path(text).exists():
        return Side(text, place, cast(GenerationRole, role))
    return Side(text, text)


def root_of(sides: Sequence[Side]) -> Path:
    """Where results go by default: the run of the first side that is one, else runs/NAME."""
    for side in sides:
        if side.file is None:
            run, _ = find_model(side.place)
            return run.root if is_run(run) else Path("runs") / run.root.name
    return Path("runs") / Path(sides[0].place).stem


def find_questions(sides: Sequence[Side], options: JudgeOptions) -> list[Question]:
    """The prompts of `--data`; else those of a file of answers; else the run's held-out ones.

    Raises:
        ValueError: there are none.
    """
    files = [side.file for side in sides if side.file is not None]
    if options.data is not None:
        records = read_source(data_source(options.data), "prompts")[0]
        found = [_question(row) for row in records.to_list()]
    elif files:
        found = [Question(each.messages, each.where) for each in read_answers(files[0])]
    else:
        found = held_out_questions(*find_model(sides[0].place))
    return found[: options.limit]


def held_out_questions(run: RunFolder, cfg: Any) -> list[Question]:
    """The prompts that the run's own evaluation uses: the first of PPO's held-out ones.

    Raises:
        ValueError: the run has none, or it is a plain model.
    """
    if not is_run(run) or not cfg.ppo.data:
        raise ValueError(f"{run.root} has no held-out prompts: give --data FILE")
    section = cfg.ppo
    parts = (section.data, section.eval_data, section.eval_fraction)
    held_out = load_mixture(*parts, cfg.seed, "prompts").held_out
    count = min(cfg.evaluation.num_prompts, len(held_out))
    if not count:
        raise ValueError(f"{run.root} holds no prompts out: give --data FILE")
    return [_question(row) for row in held_out.select(range(count)).to_list()]


def _question(row: dict[str, Any]) -> Question:
    """A question from a row of `read_source`; `turns` (FastChat's layout) are asked one by one."""
    columns = json.loads(row["columns"])
    turns, messages = columns.get("turns"), list(row["messages"])
    later: list[str] = []
    if isinstance(turns, list) and [m["content"] for m in messages] == turns[:1]:
        later = [turn for turn in turns[1:] if isinstance(turn, str)]
    category = next((columns[k] for k in CATEGORIES if isinstance(columns.get(k), str)), None)
    return Question(messages, row["where"], later, category, columns)


def compare(
    sides: tuple[Side, Side], questions: Sequence[Question], options: JudgeOptions, folder: Path
) -> list[Comparison]:
    """Both sides' answers to each turn of each question.

    Answers of models are kept in `folder`, and an interrupted command goes on where they end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first, second = (
        _from_file(side.file, questions)
        if side.file is not None
        else _by_model(side, questions, options, folder / name)
        for side, name in zip(sides, ("first", "second"), strict=True)
    )
    return [
        Comparison(one, other, turn, question.category)
        for question, ones, others in zip(questions, first, second, strict=True)
        for turn, (one, other) in enumerate(zip(ones, others, strict=False), start=1)
    ]


def _by_model(
    side: Side, questions: Sequence[Question], options: JudgeOptions, out: Path
) -> list[list[Sample]]:
    """The answers of a model to each question, turn by turn, each in its own conversation."""
    names = ("dtype", "quantization", "trust_remote_code", "temperature", "max_new_tokens", "seed")
    given = {name: getattr(options, name) for name in (*names, "batch_size")}
    settings = GenerateOptions(role=side.role, **given)
    histories = [question.messages for question in questions]
    found: list[list[Sample]] = [[] for _ in questions]
    for turn in range(1 + max(len(question.later) for question in questions)):
        asked = [i for i, question in enumerate(questions) if turn <= len(question.later)]
        prompts = [Prompt(i, histories[i], questions[i].where) for i in asked]
        path = out.with_name(f"{out.name}-turn-{turn + 1}.jsonl" if turn else f"{out.name}.jsonl")
        tell(f"{side.name}: {len(prompts)} answers" + (f", turn {turn + 1}" if turn else ""))
        generate_command(Path(side.place), prompts, settings, path)
        for i, line in zip(asked, read_lines(path), strict=True):
            question = questions[i]
            found[i].append(
                sample_of(histories[i], line["response"], question.where, question.columns)
            )
            if turn < len(question.later):
                said: Message = {"role": "user", "content": question.later[turn]}
                histories[i] = [*found[i][-1].conversation, said]
    return found


def sample_of(
    messages: list[Message], response: str, where: str, columns: dict[str, Any] | None = None
) -> Sample:
    """An answer to a conversation."""
    return Sample(messages[-1]["content"], response, messages, where, columns or {})


def read_answers(file: Path) -> list[Sample]:
    """The answers of a file: lines of `generate`, or conversations in any format for SFT.

    Raises:
        ValueError: a record that is neither.
    """
    source = DataSource(path=str(file))
    found: list[Sample] = []
    for where, raw in decode_source(source):
        if isinstance(raw, RecordError):
            raise raw
        if not isinstance(raw, dict) or not {"prompt", "response"} <= raw.keys():
            break
        prompt, response = raw["prompt"], raw["response"]
        messages: Any = prompt
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        if not isinstance(messages, list) or not messages or not isinstance(response, str):
            raise ValueError(f"{where}: expected `prompt` (text or messages) and `response` (text)")
        found.append(sample_of(messages, response, where))
    if found:
        return found
    rows = read_source(source, "sft")[0].to_list()
    turns = [(row["messages"], row["where"]) for row in rows]
    return [sample_of(each[:-1], each[-1]["content"], where) for each, where in turns]


def _from_file(file: Path, questions: Sequence[Question]) -> list[list[Sample]]:
    """The answers of a file to each question; equal prompts take them in the file's order.

    They are found by what was said to the assistant, so a later turn has its own history.

    Raises:
        ValueError: a question without an answer.
    """
    by_prompt: dict[str, list[Sample]] = defaultdict(list)
    for sample in read_answers(file):
        by_prompt[_asked(sample.messages)].append(sample)
    found = []
    for question in questions:
        asked, samples = list(question.messages), []
        for turn in range(1 + len(question.later)):
            if turn:
                asked.append({"role": "user", "content": question.later[turn - 1]})
            waiting = by_prompt[_asked(asked)]
            if waiting:
                own = waiting.pop(0)
                columns = {"where": question.where, "columns": question.columns}
                samples.append(Sample(**{**own.__dict__, **columns}))
            elif not turn:
                text = question.messages[-1]["content"]
                raise ValueError(f"{file} has no answer to {question.where} ({text[:60]!r})")
        found.append(samples)
    return found


def _asked(messages: Sequence[Message]) -> str:
    return json.dumps([turn for turn in messages if turn["role"] != "assistant"])
