"""Every command of README and docs: its words parse, its keys exist, and it is run or NOT_RUN.

One that is in no row of `NOT_RUN` is run as it stands, in a folder that holds what it names.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatllama import cli
from chatllama.config.errors import ConfigError
from chatllama.config.loader import load_config
from trainers.stages.arguments import parse_stage_arguments

PROJECT = Path(__file__).resolve().parent.parent
QUICKSTART = PROJECT / "configs" / "quickstart.yaml"
COMMAND = re.compile(
    r"^(?:\s*\w+\$ |\s{4,}|)(?:\.venv/bin/)?((?:chatllama |deepspeed |python train_).*)$"
)
SYNOPSIS = re.compile(r"\[--|\||\.\.\.")
STAGE = re.compile(r"train_(?:sft|rm|ppo)\.py$")
NOT_RUN = {
    r"chatllama chat .* --quantization nf4|chatllama generate .* --compile": "a GPU",
    r"chatllama run mine.yaml backbone.quantization=nf4": "a GPU",
    r"(python|deepspeed|chatllama run) .*(7b|13b|70b)-.*": "a GPU",
    r"deepspeed --num_gpus 8 .*|deepspeed --hostfile .*": "several GPUs or machines",
    r"chatllama run mine.yaml --hostfile .*": "several machines (tests/runs/test_replicas.py)",
    r"chatllama (eval|judge) .*--suite (mmlu|commonsense).*": "the network (data of lm-eval)",
    r"chatllama (push|import) .*": "the network: an account, or published weights (tests/exporting,"
    " tests/importing)",
    r"chatllama data generate .*": "an API (tests/data/synthesis)",
    r"chatllama (eval|judge) .*(org/|meta-llama/|LLMBar|--judge-url).*": "published models or data",
    r"chatllama serve .*": "a terminal: it runs until it is stopped (tests/serving)",
    r"chatllama judge .*votes.*": "people's votes",
    r"chatllama selftest.*": "minutes (tests/selftest runs its parts)",
    r"(deepspeed|chatllama run) .*configs/(quickstart|X).yaml.*": "minutes: the demo (`make demo`)",
    r"chatllama data (check|show) configs/quickstart.yaml": "the demo's tokenizer, or half a minute"
    " (tests/data/checking)",
    r"chatllama sweep .*": "minutes (tests/stages/test_sweep.py)",
    r"chatllama chat runs/quickstart": "the demo; `chatllama chat runs/mine` is run",
    r"deepspeed train_rm.py mine.yaml .*": "minutes (tests/reward/test_reward_stage.py)",
    r"chatllama run mine.yaml (--only|ppo|tracking).*": "`chatllama run mine.yaml` is run; keys and"
    " stages: tests/stages/test_left_out_stages.py, tests/reporting/test_tracker.py",
}
"""Pattern of documented commands that no test runs -> what they need that a test has not."""
NEEDS_GPU = {"--compile", "--quantization"}
"""Options whose documented use needs a GPU or an extra; tests use them where these are."""


def pages() -> list[Path]:
    return [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Page and words of each command, continued lines joined, comments cut."""
    for page in pages():
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        inside = False
        for line in text.splitlines():
            if line.lstrip().startswith("```"):
                inside = not inside
            found = COMMAND.match(line)
            if found and (inside or line.startswith("    ")) and not SYNOPSIS.search(line):
                yield page.name, shlex.split(re.split(r" [&>]", found[1])[0], comments=True)


FOUND = list(commands())


def test_commands_are_found() -> None:
    assert len(FOUND) > 40
    assert {words[0] for _, words in FOUND} == {"chatllama", "deepspeed", "python"}


@pytest.mark.parametrize(("page", "words"), FOUND, ids=[" ".join(words) for _, words in FOUND])
def test_a_documented_command_parses(page: str, words: list[str]) -> None:
    if words[0] == "chatllama":
        overrides = vars(cli._parse(words[1:])).get("overrides") or []
    else:
        first = next(i for i, word in enumerate(words) if STAGE.search(word))
        config, *overrides = words[first + 1 :]
        assert config.endswith(".yaml")
        parse_stage_arguments("a stage", [str(QUICKSTART), *overrides])
        overrides = [word for word in overrides if not word.startswith("--")]
    try:
        load_config(QUICKSTART, overrides)
    except ConfigError as error:  # a value may not fit this config; a key must exist
        assert "unknown" not in str(error), error


def test_a_test_types_each_command_with_its_options() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (PROJECT / "tests").rglob("test_*.py")]
    for page, words in FOUND:
        if words[0] != "chatllama" or len(words) == 1:
            continue
        names = words[1:3] if words[1] in ("data", "configs") else words[1:2]
        options = {word for word in words if word.startswith("--")} - NEEDS_GPU
        for option in options or {""}:
            field = option.removeprefix("--").replace("-", "_")
            uses = re.compile(rf"[\"\s]{option}[\"\s=]|\b{field}=" if option else "")
            assert any(
                all(f'"{name}"' in text for name in names) and uses.search(text) for text in texts
            ), f"{page}: no test types {' '.join(names)} {option}"


UNIQUE = list(dict.fromkeys(shlex.join(words) for _, words in FOUND))


def reasons(command: str) -> list[str]:
    plain = " ".join(shlex.split(command))
    return [reason for pattern, reason in NOT_RUN.items() if re.fullmatch(pattern, plain)]


def test_every_row_of_what_is_not_run_is_of_a_documented_command() -> None:
    plain = [" ".join(words) for _, words in FOUND]
    unused = [p for p in NOT_RUN if not any(re.fullmatch(p, command) for command in plain)]
    assert unused == []
    assert sum(not reasons(command) for command in UNIQUE) > 20


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path, tiny_llama_dir: Path
) -> Path:
    """A folder with a model, data, a run of all stages at runs/mine and another at runs/other."""
    from ppo_runs import make_base, make_run, ppo_config

    import train_ppo
    from chatllama.config.loader import dump_config
    from chatllama.reporting.summary import write_summary

    folder = tmp_path_factory.mktemp("documented")
    questions = [f"What does Anna paint at {hour}?" for hour in range(40)]
    talks = [{"instruction": q, "input": "", "output": "the river."} for q in questions]
    pairs = [{"prompt": q, "chosen": "a garden.", "rejected": "it"} for q in questions]
    files = {"mine": talks, "talks": talks, "others": talks[:6], "pairs": pairs}
    files["prompts"] = [{"prompt": q} for q in questions[:3]]
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "wmt").mkdir()
    for name in ("news", "wmt/test"):
        for language in ("de", "en"):
            (folder / f"{name}.{language}").write_text("Anna paints.\nthe river\n")
    (folder / "my_rewards.py").write_text("def gold(prompt, response): return float(len(response))")
    (folder / "configs").symlink_to(PROJECT / "configs")
    shutil.copytree(tiny_llama_dir, folder / "MODEL")
    base = make_base(folder / "base", tiny_tokenizer_dir)
    source: Any = [{"path": str(folder / "mine.jsonl")}]
    prompts: Any = [{"path": str(folder / "prompts.jsonl")}]
    changes = {
        "sft": {"data": source, "eval_fraction": 0.2},
        "ppo": {"data": prompts, "eval_data": source, "steps": 1},
        "evaluation": {"num_prompts": 4, "gold": f"{folder}/my_rewards:gold"},
    }
    cfg = ppo_config(base, folder / "runs" / "mine", **changes)
    run = make_run(cfg)
    dump_config(cfg, folder / "run.yaml")
    train_ppo.main([str(folder / "run.yaml")])
    write_summary(run)
    for name in ("other", "a", "b"):
        shutil.copytree(run.root, folder / "runs" / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in UNIQUE if not reasons(each)])
def test_a_documented_command_runs(
    place: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.stages import pipeline
    from trainers.stages.launcher import run_here

    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
    monkeypatch.setattr("chatllama.inference.chat.read_messages", lambda: iter(["Anna paints"]))

    def in_this_process(run: Any, stage: Any, words: list[str], *rest: object) -> None:
        run_here(stage, [str(run.config)], False, words[words.index("--run-lock") + 1])

    monkeypatch.setattr(pipeline, "_run_stage", in_this_process)  # without the launcher's 10 s
    words = ["runs/mine" if w == "RUN" else w for w in shlex.split(command)]
    assert words[0] == "chatllama"
    assert cli.main(words[1:]) == 0
