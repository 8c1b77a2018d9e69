import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from chatllama.config.base import load_function, with_folder
from chatllama.config.loader import ConfigError, load_config
from chatllama.runs.folder import STAGES, RunFolder
from trainers.stages import arguments
from trainers.stages.arguments import parse_stage_arguments

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "run.yaml"
    stages = "".join(f"{name}: {{data: [{{path: {name}.jsonl}}]}}\n" for name in STAGES)
    text = "run_dir: r\nbackbone: {path: m}\nchat: {template: llama2}\n"
    path.write_text(text + stages, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "launcher", [[], ["--local_rank", "1"], ["--local_rank=1"], ["--local-rank=1"]]
)
def test_launcher_argument_is_ignored(config: str, launcher: list[str]) -> None:
    # The launcher puts it right after the script's name.
    found = parse_stage_arguments("trains", [*launcher, config, "seed=3"])
    assert (found.config.seed, found.resume) == (3, False)


@pytest.mark.parametrize(
    "order",
    [
        ["--resume", "CONFIG", "seed=3", "ppo.steps=1"],
        ["CONFIG", "--resume", "seed=3", "ppo.steps=1"],
        ["CONFIG", "seed=3", "--resume", "ppo.steps=1"],
        ["CONFIG", "seed=3", "ppo.steps=1", "--resume"],
    ],
)
def test_flags_and_overrides_come_in_any_order(config: str, order: list[str]) -> None:
    found = parse_stage_arguments("t", [config if each == "CONFIG" else each for each in order])
    assert (found.config.seed, found.config.ppo.steps, found.resume) == (3, 1, True)


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_stage_arguments("t", argv)
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def test_config_errors_are_printed_with_exit_code_2(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = fails(capsys, config, "sead=1", "lora.r=x")
    assert shown.startswith(f"{config}: 2 problems\n")
    assert "did you mean seed?" in shown and "Traceback" not in shown


def test_batches_are_checked_for_the_launchers_ranks(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "sft.batch_size 64 is not a multiple" in fails(capsys, config)


@pytest.mark.parametrize("argv", [["sead=1"], ["--unknown"], ["--res"]])
def test_other_ranks_are_silent(
    config: str,
    argv: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert fails(capsys, config, *argv) != ""
    monkeypatch.setenv("RANK", "1")
    assert fails(capsys, config, *argv) == ""


def test_help_names_the_options_and_needs_nothing_heavy() -> None:
    # `-X importtime` lists what is imported: torch alone costs 4 s.
    code = "from trainers.stages import arguments as a; a.parse_stage_arguments('X.', ['--help'])"
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        cwd=PROJECT, env=os.environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shown = found.stdout
    assert "trainers.stages.arguments" in found.stderr
    assert not re.search(r"\| +(torch|transformers|datasets|trl)$", found.stderr, re.MULTILINE)
    for part in ("X.", "CONFIG", "section.key=value", "--resume", "configs/reference.yaml"):
        assert part in shown
    assert "local_rank" not in shown


PATHS = {
    "backbone.path=models/llama": ["models/llama"],
    "sft.data=[{path: notes.jsonl}, {path: ../here/notes.jsonl}]":
        ["notes.jsonl", "../here/notes.jsonl"],
    "sft.data=[{path: '*.jsonl'}, {path: 'many/**/*.jsonl'}]": ["*.jsonl", "many/**/*.jsonl"],
    "sft.data=[{path: 'Läufe [1]/a b.jsonl'}]": ["Läufe [1]/a b.jsonl"],
    "sft.data=[{path: news, format: translation, languages: [de, en]}]": ["news"],
    "reward.eval_data=[{path: notes.jsonl}]": ["notes.jsonl"],
    "ppo.rewards=[{adapter: models/llama}, {adapter: run}]": ["models/llama"],
    "backbone.path=meta-llama/Llama-2-7b-hf": [],
    "sft.data=[{path: tatsu-lab/alpaca}, {path: news}]": [],
    "reward.data=[{path: data/samples/preference.jsonl}]": [],
}  # fmt: skip
"""Overrides, and which of their paths are of the current folder: not ids of the hub or samples."""
MINE = "run_dir: runs/x\nbackbone: {path: models/llama}\nchat: {template: llama2}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which has what PATHS names."""
    folder = tmp_path / "here"
    for name in ("models/llama/x", "many/a/b.jsonl", "Läufe [1]/a b.jsonl", "run/x"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    for name in ("notes.jsonl", "news.de", "news.en", "tatsu-lab"):
        (folder / name).touch()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("override", PATHS)
def test_paths_count_from_the_current_folder_and_hold_in_any_other(
    here: Path, override: str
) -> None:
    (here / "mine.yaml").write_text(MINE)
    cfg = arguments.load_stage_config("mine.yaml", [override])
    assert cfg.run_dir == "runs/x"
    run = RunFolder(here / cfg.run_dir)
    arguments.record_config(cfg, run)
    expected = load_config("mine.yaml", [override]).model_dump_json()
    for name in ("runs/x", "models/llama", *PATHS[override]):
        expected = expected.replace(f'"{name}"', f'"{here / name}"')
    assert load_config(run.config).model_dump_json() == expected
    for name in PATHS[override]:
        assert f'"{here / name}"' in expected


@pytest.mark.parametrize("moved", ["runs/x", "elsewhere/y", "runs/x y"])
def test_the_config_of_a_run_folder_belongs_to_it(here: Path, moved: str) -> None:
    (here / "mine.yaml").write_text(MINE)
    run = RunFolder(here / "runs/x")
    arguments.record_config(arguments.load_stage_config("mine.yaml", []), run)
    run.lineage.write_text("{}")
    run.root.rename(here / "moved")
    (here / moved).parent.mkdir(exist_ok=True)
    (here / "moved").rename(here / moved)
    file = f"{moved}/config.yaml"
    assert arguments.load_stage_config(file, []).run_dir == moved
    assert arguments.load_stage_config(file, ["run_dir=other"]).run_dir == "other"
    assert arguments.load_stage_config("mine.yaml", []).run_dir == "runs/x"


@pytest.mark.parametrize("recorded", [None, "2020-02-03", "null"])
def test_the_day_is_frozen_when_a_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str | None
) -> None:
    class Today(date):
        @classmethod
        def today(cls) -> "Today":
            return cls(2031, 5, 6)

    monkeypatch.setattr(arguments, "date", Today)
    base = "backbone: {path: m}\n"
    file, chat = tmp_path / "mine.yaml", f"{base}chat: {{template: tokenizer, date: "
    file.write_text(f"run_dir: {tmp_path / 'run'}\nchat: {{template: tokenizer}}\n{base}")
    if recorded is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text(f"run_dir: r\n{chat}{recorded}}}\n")
    # A run that an earlier version began has none.
    expected = {None: "2031-05-06", "null": None}.get(recorded, recorded)
    assert arguments.load_stage_config(file, []).chat.date == expected
    assert arguments.load_stage_config(file, ["chat.date=1999-12-31"]).chat.date == "1999-12-31"
    assert arguments.load_stage_config(file, ["chat.template=llama2"]).chat.date is None
    with pytest.raises(ConfigError, match=r"chat\.date"):
        arguments.load_stage_config(file, ["chat.date=2026-13-01"])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "llama2"),
        ({"tokenizer_config.json": "{}"}, "llama2"),
        ({"tokenizer_config.json": '{"chat_template": null}'}, "llama2"),
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, "tokenizer"),
        ({"chat_template.jinja": "{{ messages }}"}, "tokenizer"),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "x"}]}'},
            "llama2",
        ),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "x"}]}'},
            "tokenizer",
        ),
    ],
)
def test_auto_is_the_template_that_the_tokenizer_brings(
    tmp_path: Path, files: dict[str, str], expected: str
) -> None:
    model, file = tmp_path / "model", tmp_path / "mine.yaml"
    model.mkdir()
    for name, text in files.items():
        (model / name).write_text(text)
    file.write_text(f"run_dir: {tmp_path / 'run'}\nbackbone: {{path: {model}}}\n")
    cfg = arguments.load_stage_config(file, [])
    assert cfg.chat.template == expected
    assert (cfg.chat.date is None) == (expected == "llama2")  # its day is frozen too
    assert arguments.load_stage_config(file, ["chat.template=vicuna"]).chat.template == "vicuna"
    scratch = ["backbone={from_scratch: {data: [{path: a.txt}]}}"]
    assert arguments.load_stage_config(file, scratch).chat.template == "llama2"


@pytest.mark.parametrize(
    ("recorded", "path", "expected"),
    [
        ("llama2", "model", "llama2"),  # made when that was the default
        ("vicuna", "model", "tokenizer"),  # was named, and is no more
        ("tokenizer", "model", "tokenizer"),
        ("llama2", "other", "tokenizer"),
    ],
)
def test_a_run_made_under_the_old_default_keeps_it(
    tmp_path: Path, recorded: str, path: str, expected: str
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    run.mkdir()
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "mine.yaml").write_text(f"run_dir: {run}\nbackbone: {{path: {model}}}\n")
    (run / "config.yaml").write_text(
        f"run_dir: r\nchat: {{template: {recorded}}}\nbackbone: {{path: {tmp_path / path}}}\n"
    )
    found = arguments.load_stage_config(tmp_path / "mine.yaml", []).chat.template
    assert found == expected


def test_an_error_of_a_stage_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_stage_arguments("X.", [str(tmp_path / "no\x1b[31m.yaml")])
    shown = capsys.readouterr().err
    assert "\N{REPLACEMENT CHARACTER}" in shown and "\x1b" not in shown


SCORE = "def score(prompt, response):\n    return {value}.0\n"


@pytest.mark.parametrize(
    ("name", "recorded", "file"),
    [
        ("mine_of_a_test:score", "WORK/mine_of_a_test:score", "mine_of_a_test.py"),
        (
            "pack_of_a_test.inner:score",
            "WORK/pack_of_a_test.inner:score",
            "pack_of_a_test/inner.py",
        ),
        ("whole_of_a_test:score", "WORK/whole_of_a_test:score", "whole_of_a_test/__init__.py"),
        ("sub/mine_of_sub:score", "WORK/sub/mine_of_sub:score", "sub/mine_of_sub.py"),
    ],
)
def test_functions_are_recorded_with_the_folder_of_their_module(
    name: str, recorded: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, other = tmp_path / "work", tmp_path / "other"
    for folder, value in ((work, 3), (other, 4)):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(SCORE.format(value=value))
    (work / "c.yaml").write_text(
        "run_dir: r\nbackbone: {path: m}\nchat: {template: llama2}\n"
        f"evaluation: {{gold: '{name}'}}\n"
        f"ppo: {{rewards: [{{function: '{name}'}}]}}\n"
    )
    monkeypatch.chdir(work)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    cfg = arguments.load_stage_config("c.yaml", [])
    recorded = recorded.replace("WORK", os.path.realpath(work))
    assert (cfg.ppo.rewards[0].function, cfg.evaluation.gold) == (recorded, recorded)
    monkeypatch.chdir(other)
    arguments.record_config(cfg, RunFolder(tmp_path / "r"))
    again = arguments.load_stage_config(tmp_path / "r" / "config.yaml", [])
    assert again.ppo == cfg.ppo and again.evaluation == cfg.evaluation
    assert load_function(recorded, "k")("", "") == 3
    with pytest.raises(ValueError, match=r"k: '.*': Python finds another module of that name, /"):
        load_function(recorded.replace(str(work), str(other)), "k")


@pytest.mark.parametrize("name", ["data.garden_notes:gold", "json:loads", "no_such_thing:f"])
def test_functions_from_elsewhere_keep_their_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for decoy in ("data", "json"):
        (tmp_path / decoy).mkdir()
        (tmp_path / decoy / "garden_notes.py").write_text(SCORE.format(value=0))
    (tmp_path / "json.py").write_text(SCORE.format(value=0))
    monkeypatch.chdir(tmp_path)
    assert with_folder(name) == name


@pytest.mark.parametrize("key", ["deepspeed.nvme_path", "generation.servers.adapter_dir"])
def test_folders_that_are_made_later_are_recorded_absolute(
    key: str, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["deepspeed.stage=3", "deepspeed.offload_optimizer=nvme", f"{key}=fast/x"]
    if "servers" in key:
        urls = "generation.servers={urls: ['http://a:1']}"
        more = ["generation.engine=server", urls, f"{key}=fast/x"]
    cfg = arguments.load_stage_config(config, more)
    section: object = cfg
    for part in key.split("."):
        section = getattr(section, part)
    assert section == str(tmp_path / "fast" / "x")
