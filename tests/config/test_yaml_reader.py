"""YAML of strangers: one error with the line, within a second, in files and overrides."""

import os
import time
from pathlib import Path

import pytest

from chatllama.config.errors import ConfigError
from chatllama.config.loader import load_config
from chatllama.config.yaml_reader import MAX_DEPTH, parse_value

BASE = "run_dir: r\nbackbone: {path: p}\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

BAD: list[tuple[str, str]] = [
    ("!!int [1]", "tag !!int does not fit"),
    ("!!float {a: 1}", "tag !!float does not fit"),
    ("!!bool maybe", "tag !!bool does not fit"),
    ("!!timestamp foo", "tag !!timestamp does not fit"),
    ("!!int 1.5", "tag !!int does not fit"),
    ("!!python/object/apply:os.system [id]", "does not fit"),
    ("!!binary aGk=", "does not fit"),
    ("!mine 3", "tag !mine does not fit"),
    ("[" * 500 + "]" * 500, f"more than {MAX_DEPTH} levels"),
    ("{a: " * 400 + "1" + "}" * 400, f"more than {MAX_DEPTH} levels"),
    ("9" * 5000, "integer string conversion"),
]


@pytest.mark.parametrize(("text", "words"), BAD, ids=range(len(BAD)))
def test_values_that_are_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(BASE + f"seed: {text}\n")
    with pytest.raises(ConfigError, match="line 3") as error:
        load_config(file)
    assert words in str(error.value)
    file.write_text(BASE)
    with pytest.raises(ConfigError, match="override") as error:
        load_config(file, [f"seed={text}"])
    assert words in str(error.value)


def test_tags_of_the_core_schema() -> None:
    assert parse_value("!!str 1") == "1"
    assert parse_value("!!int 7") == 7 and parse_value("!!float 1") == 1.0
    assert parse_value("[!!bool true, !!null ~, !!map {a: 1}, !!seq [2]]") == [
        True, None, {"a": 1}, [2],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [BOMB, "x: &x {a: &y [1, 2]}\n" + "b: [" + "*x," * 8_000 + "*x]\n",
     "a: 1\n" * 80_000, "a: " + "x" * 250_000],
)  # fmt: skip
def test_bombs_end_within_seconds(content: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(content)
    begin = time.process_time()
    with pytest.raises(ConfigError, match=r"over [\d,]+ (entries|bytes)"):
        load_config(file)
    assert time.process_time() - begin < 10
    file.write_text(BASE)
    with pytest.raises(ConfigError, match=r"over [\d,]+ (entries|characters)"):
        load_config(file, [f"sft={content}"])


@pytest.mark.parametrize("links", [2, 3, 20])
def test_aliases_that_nest_deeper_together_than_the_text_are_refused(
    links: int, tmp_path: Path
) -> None:
    deep = MAX_DEPTH * 2 // 3
    lines = ["a0: &a0 " + "[" * deep + "]" * deep]
    lines += [f"a{n}: &a{n} {'[' * deep}*a{n - 1}{']' * deep}" for n in range(1, links)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=f"or {MAX_DEPTH} levels, with all aliases"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("target", ["folder", "fifo", "/dev/zero", "x" * 300, "none.yaml", "loop"])
def test_extends_of_no_regular_file(target: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    file = tmp_path / "a.yaml"
    file.write_text(f"extends: {target}\n" + BASE)
    with pytest.raises(
        ConfigError, match=r"is a folder; give|not a regular file|no such file|cannot be read"
    ):
        load_config(file)


CUT = ["You are assistant #1 of two", "#1", "[a, b] # both", "3 #x"]


@pytest.mark.parametrize("value", CUT)
def test_an_override_is_never_cut_at_a_comment(value: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(BASE)
    with pytest.raises(ConfigError, match="would be cut off as a comment"):
        load_config(file, [f"chat.system={value}"])
    assert load_config(file, [f'chat.system="{value}"']).chat.system == value
    assert load_config(file, ["chat.system=a#b"]).chat.system == "a#b"


def test_merge_keys(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        BASE + "sft: &one {steps: 3, data: &list [{path: a}]}\n"
        "reward:\n  steps: 5\n  <<: *one\nppo:\n  <<: {steps: 7}\n"
    )
    cfg = load_config(file)
    assert (cfg.sft.steps, cfg.reward.steps, cfg.ppo.steps) == (3, 5, 7)
    assert cfg.reward.data[0].path == "a"
    file.write_text(BASE + "sft:\n  <<: [{steps: 1}, {steps: 2, max_length: 9}]\n")
    assert (load_config(file).sft.steps, load_config(file).sft.max_length) == (1, 9)
    file.write_text(BASE + "sft:\n  <<: 3\n")
    with pytest.raises(ConfigError, match=r"<< \(.*line 4\): must be a mapping"):
        load_config(file)


def test_keys_of_verdicts_are_text(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    source = "[{path: a, verdicts: {0: first, true: second, 1.5: tie}}]"
    file.write_text(BASE + f"reward: {{data: {source}}}\n")
    cfg = load_config(file)
    assert cfg.reward.data[0].verdicts == {"0": "first", "true": "second", "1.5": "tie"}
    assert load_config(file, [f"reward.data={source}"]) == cfg
    with pytest.raises(ConfigError, match=r"verdicts\.0.*'first', 'second' or 'tie'"):
        load_config(file, ["reward.data=[{path: a, verdicts: {0: one}}]"])
