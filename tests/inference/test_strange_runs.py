"""Runs whose files a stranger wrote: every command and stage ends with exit code 2 and the file."""

import io
import json
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from generation_runs import make_run
from safetensors.torch import load_file, save_file

from chatllama import cli
from chatllama.runs.folder import RunFolder, Stage
from trainers.stages import arguments

pytestmark = pytest.mark.slow
Change = Callable[[Path], object]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A run, and data for its stages."""
    run = make_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for name, record in (("sft", {"messages": turns}), ("reward", pair), ("ppo", {"prompt": "a"})):
        lines = [json.dumps(record).replace('"a"', f'"a {i}"') for i in range(40)]
        (run.root / f"{name}.jsonl").write_text("\n".join(lines))
    (run.root / "news.de").write_text("Ja.\n")
    (run.root / "news.en").write_text("Yes.\n")
    return run.root


@pytest.fixture
def strange(plain: Path, tmp_path: Path) -> RunFolder:
    """A copy, to be changed."""
    run = RunFolder(shutil.copytree(plain, tmp_path / "strange"))
    text = run.config.read_text().replace(str(plain), str(run.root))
    data = {n: f"data: [{{path: {run.root}/{n}.jsonl}}]" for n in ("sft", "reward", "ppo")}
    run.config.write_text(text + "".join(f"{n}: {{{each}}}\n" for n, each in data.items()))
    return run


def text(name: str, content: str) -> Change:
    return lambda root: (root / name).write_text(content)


def key(name: str, **values: object) -> Change:
    def change(root: Path) -> None:
        file = root / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def elsewhere(root: Path) -> None:
    """The weights are in the folder above, and an index says so."""
    (root / "backbone" / "model.safetensors").rename(root / "model.safetensors")
    index = root / "backbone" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "../model.safetensors"}}')


def template(content: str) -> Change:
    def change(root: Path) -> None:
        config = root / "config.yaml"
        config.write_text(config.read_text() + "chat: {template: tokenizer, date: 2024-01-01}\n")
        (root / "backbone" / "chat_template.jinja").write_text(content)

    return change


def narrow_head(root: Path) -> None:
    file = root / "reward" / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.score.weight"
    save_file({**load_file(file), name: torch.ones(1, 7)}, file, metadata={"format": "pt"})


BASE: dict[str, tuple[Change, str]] = {
    "a list": (text("backbone/config.json", "[]"), "config.json is damaged"),
    "layers": (key("backbone/config.json", num_hidden_layers=3_000_000), "num_hidden_layers"),
    "heads": (key("backbone/config.json", num_attention_heads=3), "backbone"),
    "length": (
        lambda root: (root / "backbone/model.safetensors").write_bytes(struct.pack("<Q", 2**60)),
        "model.safetensors is damaged",
    ),
    "index": (elsewhere, "'../model.safetensors' is not the name"),
    "no tokenizer": (text("backbone/tokenizer.json", "{}"), "tokenizer.json: no tokenizer"),
    "deep": (text("backbone/tokenizer_config.json", "[" * 100_000), "config.json is damaged"),
    "endless": (template(ENDLESS), "chat template takes more than 2 s"),
    "raises": (template("{{ raise_exception('no') }}"), "chat template refuses this: no"),
    "grows": (template("{{ 'a' * 10 ** 10 }}"), "chat template needs more than 512 MB"),
}  # fmt: skip
POLICY: dict[str, tuple[Change, str]] = {
    "rank": (key("ppo/policy/adapter_config.json", r=60_000), "says r 60000"),
    "contract": (text("ppo/policy/chatllama.json", '{"base": "b"}'), "names no chat contract"),
    "info": (text("ppo/policy/chatllama.json", "[]"), "chatllama.json is damaged"),
    "lineage 1": (text("lineage.json", "[]"), "lineage.json is damaged"),
    "lineage 2": (text("lineage.json", '{"ppo": {"base": 5}}'), "lineage.json is damaged"),
}  # fmt: skip
RUNS = ["generate", "chat", "serve", "eval", "export"]
STAGES: dict[str, Stage] = {"train_sft": "sft", "train_rm": "reward", "train_ppo": "ppo"}


def refused(
    run: RunFolder, door: str, words: str, capsys: pytest.CaptureFixture[str], limit: float
) -> None:
    more = {
        "generate": ["hi"], "serve": ["--port", "0"], "export": ["--reward"],
        "eval": ["--translation", str(run.root / "news"), "--languages", "de", "en"],
    }  # fmt: skip
    begun = time.process_time()
    if door in STAGES:
        numbers = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 1.0}
        for stage in ("sft", "reward"):
            run.result(stage).write_text(json.dumps(numbers))
        run.result(STAGES[door]).unlink(missing_ok=True)
        with pytest.raises((ValueError, SystemExit)) as caught:  # from main, or on the way to it
            __import__(door).main([str(run.config)])
        if isinstance(caught.value, SystemExit):
            assert caught.value.code == 2
            error = capsys.readouterr().err
        else:
            assert arguments._failure(caught.value)[0] == 2
            error = str(caught.value)
    else:
        target = run.config if door.startswith("data") else run.root
        assert cli.main([*door.split(), str(target), *more.get(door, [])]) == 2
        error = capsys.readouterr().err
    assert words in error and len(error) < 3000, error
    assert time.process_time() - begun < limit


@pytest.fixture(autouse=True)
def typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/quit\n"))


@pytest.mark.parametrize("change", BASE)
@pytest.mark.parametrize("door", [*RUNS, *STAGES, "data check", "data show"])
def test_a_strange_base(
    strange: RunFolder, door: str, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if door.startswith("data") and change in ("layers", "heads", "length", "index"):
        pytest.skip("it looks at the tokenizer only")
    BASE[change][0](strange.root)
    refused(strange, door, BASE[change][1], capsys, 5)


@pytest.mark.parametrize("change", POLICY)
@pytest.mark.parametrize("door", RUNS)
def test_a_strange_adapter(
    strange: RunFolder, door: str, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    POLICY[change][0](strange.root)
    refused(strange, door, POLICY[change][1], capsys, 5)


@pytest.mark.parametrize("door", ["serve", "export", "train_ppo"])
def test_a_strange_reward_head(
    strange: RunFolder, door: str, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow_head(strange.root)
    refused(strange, door, "its head has shape (1, 7), the backbone needs (1, 32)", capsys, 5)


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name in ("evaluation.json", "reward/doctor.json", "summary.json")
     for content in ("[]", "{", "5", "[" * 99_999)]
    + [("evaluation.json", '{"samples": [5]}'), ("evaluation.json", '{"samples": [{}]}'),
       ("evaluation.json", '{"samples": [{"prompt": "a", "sft": "b", "score": {"sft": "x"}}]}'),
       ("reward/doctor.json", '{"model": {"gaps": 5}, "warnings": [], "data": {}}'),
       ("summary.json", '{"reward": {"accuracy": "x"}}'),
       ("ppo/metrics.jsonl", '{"step": []}\n5\n'),
       ("ppo/metrics.jsonl", "[" * 99_999 + "\n"), ("sft/result.json", '{"loss": "x"}'),
       ("ppo/health.jsonl", '{"a": 1}\n'), ("ppo/samples.jsonl", '{"a": 1}\n'),
       ("ppo/samples.jsonl", '{"step": 1, "prompt": 2, "response": 3, "score": "x"}\n')],
)  # fmt: skip
def test_a_strange_report(
    strange: RunFolder, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (strange.root / name).write_text(content)
    if name in ("ppo/health.jsonl", "ppo/samples.jsonl"):
        strange.metrics("ppo").write_text('{"step": 1}\n')
    refused(strange, "report", "damaged" if "jsonl" not in name else str(strange.root), capsys, 5)
