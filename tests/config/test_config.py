import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chatllama.config.errors import schema_paths
from chatllama.config.loader import ConfigError, dump_config, load_config
from chatllama.config.model import BackboneSection, LoraSection
from chatllama.config.ppo import PpoSection
from chatllama.config.reference import render_reference
from chatllama.config.schema import Config
from chatllama.config.stages import OptimizerSection

PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((PROJECT / "configs").rglob("*.yaml"))
MINIMAL = "run_dir: runs/x\nbackbone: {path: some-model}\n"


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return list(caught.value.problems)


def test_minimal_config_has_the_schema_defaults(tmp_path: Path) -> None:
    expected = Config(run_dir="runs/x", backbone=BackboneSection(path="some-model"))
    assert load_config(write(tmp_path, MINIMAL)) == expected


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("2E-4", 2e-4), ("1.5e+1", 15.0), (".5", 0.5), ("3", 3.0)]
)
def test_numbers_are_read_as_in_yaml_1_2(tmp_path: Path, text: str, value: float) -> None:
    content = MINIMAL + f"sft: {{learning_rate: {text}}}\n"
    assert load_config(write(tmp_path, content)).sft.learning_rate == value


@pytest.mark.parametrize("text", ["1_0", "1:30", "0b1", "1e"])
def test_yaml_1_1_numbers_are_text(tmp_path: Path, text: str) -> None:
    (found,) = problems(tmp_path, MINIMAL + f"sft: {{learning_rate: {text}}}\n")
    assert found.endswith(f'must be a number, not "{text}"')


def test_leading_zero_is_decimal_and_yes_is_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL + "seed: 010\n")).seed == 10
    assert load_config(write(tmp_path, MINIMAL + "lora:\n")).lora is None
    found = problems(tmp_path, MINIMAL + "sft: {packing: yes}\n")
    assert len(found) == 1 and found[0].endswith('must be true or false, not "yes"')


TOO_LARGE = "is too large: AdamW's step would be beyond float32"


@pytest.mark.parametrize(
    ("text", "dotted", "reason"),
    [
        ("sead: 1", "sead", "unknown key; did you mean seed?"),
        ("kl_coef: 1", "kl_coef", "unknown key; did you mean ppo.kl_coef?"),
        ("ppo: {kl_coeff: 1}", "ppo.kl_coeff", "unknown key; did you mean ppo.kl_coef?"),
        (
            "lora: {zzz: 1}",
            "lora.zzz",
            "unknown key; known here: r, alpha, dropout, target_modules",
        ),
        (
            "sft: {data: [{path: a}, {path: b, formt: alpaca}]}",
            "sft.data.1.formt",
            "unknown key; did you mean sft.data.1.format?",
        ),
        ("sft: {data: [{split: a}]}", "sft.data.0.path", "is missing"),
        ("lora: {r: 1.5}", "lora.r", "must be a whole number, not 1.5"),
        ("lora: {r: true}", "lora.r", "must be a whole number, not true"),
        ("deepspeed: {stage: true}", "deepspeed.stage", "must be a whole number, not true"),
        ("deepspeed: {stage: 4}", "deepspeed.stage", "must be at most 3, not 4"),
        ("lora: {r: 0}", "lora.r", "must be more than 0, not 0"),
        ("lora: {dropout: 1}", "lora.dropout", "must be less than 1, not 1"),
        ("seed: -1", "seed", "must be at least 0, not -1"),
        (
            "seed: 9223372036854775808",
            "seed",
            "must be at most 4.61169e+18, not 9223372036854775808",
        ),
        (
            "generation: {temperature: 1.0e-39}",
            "generation.temperature",
            "must be at least 0.0001, not 1e-39",
        ),
        (
            "generation: {temperature: 1e3}",
            "generation.temperature",
            "must be at most 100, not 1000.0",
        ),
        (
            "generation: {top_k: 9223372036854775808}",
            "generation.top_k",
            "must be at most 1e+06, not 9223372036854775808",
        ),
        (
            "generation: {max_new_tokens: 99999999}",
            "generation.max_new_tokens",
            "must be at most 1e+07, not 99999999",
        ),
        ('seed: "1"', "seed", 'must be a whole number, not "1"'),
        ("run_dir: 5", "run_dir", "must be text, not 5"),
        ("tracking: null", "tracking", "must be a section with keys of its own, not null"),
        ("sft: {data: {path: a}}", "sft.data", 'must be a list, not {"path": "a"}'),
        (
            "ppo: {learning_rate: .inf}",
            "ppo.learning_rate",
            "must be a finite number, not Infinity",
        ),
        ("sft: {learning_rate: 1e38}", "sft", f"learning_rate 1e+38 {TOO_LARGE}"),
        ("reward: {learning_rate: 3.5e37}", "reward", f"learning_rate 3.5e+37 {TOO_LARGE}"),
        ("ppo: {value_learning_rate: 5e37}", "ppo", f"value_learning_rate 5e+37 {TOO_LARGE}"),
        (
            "sft: {learning_rate: 1e30, weight_decay: 1e9}",
            "sft",
            f"learning_rate 1e+30 {TOO_LARGE}",
        ),
        (
            "ppo: {adam_betas: [0.999, 0.9], learning_rate: 1e36}",
            "ppo",
            f"learning_rate 1e+36 {TOO_LARGE}",
        ),
        ("lora: {alpha: 1e39}", "lora.alpha", "must be at most 1e+38, not 1e+39"),
        ("ppo: {kl_coef: 1e300}", "ppo.kl_coef", "must be at most 1e+38, not 1e+300"),
        ("ppo: {adam_betas: [0.9]}", "ppo.adam_betas", "must have at least 2 entries, not [0.9]"),
        (
            "ppo: {lr_schedule: cosin}",
            "ppo.lr_schedule",
            'must be one of "linear", "cosine", "constant", not "cosin"; did you mean "cosine"?',
        ),
        (
            "lora: {target_modules: []}",
            "lora.target_modules",
            'must be "all-linear" or must have at least 1 entries, not []',
        ),
        (
            "lora: {target_modules: 5}",
            "lora.target_modules",
            'must be "all-linear" or must be a list, not 5',
        ),
        ("sft: {batch_size: 60}", "sft", "batch_size 60 is not a multiple of microbatch_size 8"),
    ],
)
def test_each_mistake_names_key_line_value_and_remedy(
    tmp_path: Path, text: str, dotted: str, reason: str
) -> None:
    base = "backbone: {path: m}\n" if text.startswith("run_dir") else MINIMAL
    line = base.count("\n") + 1
    found = problems(tmp_path, base + text + "\n")
    assert found == [f"{dotted} ({tmp_path}/run.yaml, line {line}): {reason}"]


def test_value_in_a_list_names_the_allowed_ones(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, MINIMAL + "ppo: {health: {ignore: [negativ_kl]}}\n")
    assert found.startswith(f"ppo.health.ignore.0 ({tmp_path}/run.yaml, line 3): must be one of ")
    assert found.endswith('not "negativ_kl"; did you mean "negative_kl"?')


def test_biased_kl_estimator_is_refused_with_the_reason(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, MINIMAL + "ppo: {kl_estimator: k3}\n")
    assert "wrong gradient" in found


def test_all_problems_come_at_once_without_jargon(tmp_path: Path) -> None:
    text = """\
run_dir: 5
seed: 1
seed: 2
backbone: {path: x, dtype: float16}
reward: {batch_size: 20, lr: 3}
"""
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), ["lora.rank=3", "nonsense"])
    message = str(caught.value)
    lines = message.splitlines()
    assert lines[0] == f"{tmp_path}/run.yaml: 7 problems"
    for part in (
        "seed (", "line 3): given twice, first in line 2", "override 'nonsense'", "reward.lr (",
        "lora.rank (the command line)", "run_dir (", "backbone.dtype (",
        "reward (", "batch_size 20 is not a multiple of microbatch_size 8",
    ):  # fmt: skip
        assert part in message, part
    assert not re.search(r"pydantic|https?:|Input should|type=", message)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n", "must be a mapping"),
        ("a: [1\n", "line 2, column 1"),
        ("a: 1\n---\nb: 2\n", "line 2"),
        ("a: !!python/object:os.system {}\n", "line 1, column 4"),
        ("a: &x {b: *x}\n", "contains itself"),
        ("1: 2\n", "a key must be text, not 1"),
    ],
)
def test_unreadable_yaml_is_a_config_error(tmp_path: Path, text: str, part: str) -> None:
    assert part in "\n".join(problems(tmp_path, text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file: .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_duplicate_keys_are_refused_at_any_depth(tmp_path: Path) -> None:
    text = MINIMAL + "sft:\n  data:\n    - path: a\n      split: x\n      path: b\n"
    assert problems(tmp_path, text) == [
        f"sft.data.0.path ({tmp_path}/run.yaml, line 7): given twice, first in line 5"
    ]


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, MINIMAL + "seed: 1\nsft: {steps: 5, data: [{path: a}, {path: b}]}\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\nseed: 2\nlora: {r: 4}\n", "b.yaml")
    child = write(
        tmp_path / "sub", "extends: ../b.yaml\nsft: {data: [{path: c}]}\nlora: {alpha: 8}\n"
    )
    cfg = load_config(child)
    assert (cfg.run_dir, cfg.seed, cfg.sft.steps) == ("runs/x", 2, 5)
    assert [source.path for source in cfg.sft.data] == ["c"]
    assert cfg.lora == LoraSection(r=4, alpha=8.0)


def test_extends_null_removes_a_section_of_the_parent(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "lora: {r: 4}\n", "a.yaml")
    assert load_config(write(tmp_path, "extends: a.yaml\nlora: null\n")).lora is None


def test_extends_problems_name_the_parent_file(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "sead: 1\n", "a.yaml")
    (found,) = problems(tmp_path, "extends: a.yaml\n")
    assert found.startswith(f"sead ({tmp_path}/a.yaml, line 3)")


def test_extends_cycle_and_missing_parent_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: run.yaml\n", "a.yaml")
    (found,) = problems(tmp_path, "extends: a.yaml\n")
    assert "circle" in found and "a.yaml" in found
    (found,) = problems(tmp_path, "extends: gone.yaml\n")
    assert "no such file" in found
    assert "must be one file name" in problems(tmp_path, "extends: [a.yaml]\n")[0]


def test_overrides_are_yaml_and_win(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "lora: null\nppo: {steps: 3}\n")
    cfg = load_config(
        path,
        [
            "ppo.steps=7",
            "ppo.kl_coef=1e-3",
            "generation.temperature=0.5",
            "lora.r=2",
            "sft.data=[{path: a, format: text}]",
            "chat.system=be kind; a=b",
            "backbone.revision=",
        ],
    )
    assert (cfg.ppo.steps, cfg.ppo.kl_coef, cfg.generation.temperature) == (7, 1e-3, 0.5)
    assert cfg.lora == LoraSection(r=2)
    assert cfg.sft.data[0].format == "text"
    assert cfg.chat.system == "be kind; a=b" and cfg.backbone.revision is None
    assert load_config(path, ["lora.r=2", "lora=null"]).lora is None


def test_override_text_with_a_colon_needs_no_quotes_only_if_yaml_agrees(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, MINIMAL, "chat.system=a: b: c")
    assert "not valid YAML" in found


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("seed", "must look like section.key=value"),
        ("ppo..steps=1", "must look like section.key=value"),
        ("extends=a.yaml", "works in files only"),
        ("run_dir.x=1", "run_dir is 'runs/x', which has no keys"),
        ("lora={r: 1, r: 2}", "given twice"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_bad_overrides_are_reported(tmp_path: Path, override: str, part: str) -> None:
    (found,) = problems(tmp_path, MINIMAL, override)
    assert repr(override) in found and part in found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_survives_dump(path: Path, tmp_path: Path) -> None:
    cfg = load_config(path)
    dump_config(cfg, tmp_path / "deep" / "config.yaml")
    assert load_config(tmp_path / "deep" / "config.yaml") == cfg


@pytest.mark.parametrize("text", ["1e5", "yes", "0o17", "null", "010", "1:30", "~", "é\n'\"#"])
def test_dump_keeps_text_that_looks_like_something_else(tmp_path: Path, text: str) -> None:
    cfg = Config(run_dir=text, backbone=BackboneSection(path=text), lora=None)
    cfg = cfg.model_copy(update={"sft": cfg.sft.model_copy(update={"learning_rate": 1e-5})})
    dump_config(cfg, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == cfg


@pytest.mark.parametrize("overrides", [[], ["generation.engine=local", "generation.servers=null"]])
def test_what_no_gpu_holds_is_sampled_by_servers_unless_told_otherwise(
    overrides: list[str],
) -> None:
    path = PROJECT / "configs" / "llama-70b-multinode-zero3.yaml"
    cfg = load_config(path, overrides)
    assert cfg.generation.engine == ("local" if overrides else "server")
    text = path.read_text(encoding="utf-8")
    assert f"`{' '.join(['generation.engine=local', 'generation.servers=null'])}`" in text
    assert "needs 4 GPUs of 80 GB" in text


def test_reference_file_is_what_the_schema_says() -> None:
    committed = (PROJECT / "configs" / "reference.yaml").read_text(encoding="utf-8")
    assert committed == render_reference(), (
        "run: python -m chatllama.config.reference > configs/reference.yaml"
    )


def test_reference_names_every_key_and_holds_the_defaults() -> None:
    reference = PROJECT / "configs" / "reference.yaml"
    text = reference.read_text(encoding="utf-8")
    for path in schema_paths(Config):
        assert re.search(rf"^[# -]*{path[-1]}:", text, re.MULTILINE), path
    assert load_config(reference) == Config(
        run_dir="runs/reference", backbone=BackboneSection(path="huggyllama/llama-7b")
    )


def test_mutable_defaults_are_not_shared() -> None:
    OptimizerSection().adam_betas.append(5.0)
    assert OptimizerSection().adam_betas == [0.9, 0.95]


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys, trainers.stages.arguments, chatllama.config.loader as l; "
        "l.load_config('configs/reference.yaml'); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'deepspeed', 'trl', 'peft', "
        "'numpy', 'rich') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == "[]"


PATHS = {
    "run_dir": "'{}'",
    "backbone": "{{path: '{}'}}",
    "sft": "{{data: [{{path: '{}'}}], eval_data: [{{path: b~/c}}, {{path: '{}'}}]}}",
    "ppo": "{{rewards: [{{adapter: '{}'}}]}}",
    "generation": "{{engine: server, servers: {{urls: ['http://a:1'], adapter_dir: '{}'}}}}",
    "deepspeed": "{{stage: 3, offload_param: nvme, nvme_path: '{}'}}",
}
"""Sections with every kind of path, and how one is written there."""


@pytest.mark.parametrize(
    ("written", "meant"),
    [("~/x", "/home/anna/x"), ("~/Läufe [1]/a b", "/home/anna/Läufe [1]/a b"), ("~", "/home/anna")]
    + [(same, same) for same in ("a~/b", "../Läufe/[1] x")],
)
def test_a_home_folder_is_expanded_once_in_every_path(
    written: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    given = {key: value.format(written, written) for key, value in PATHS.items()}
    file = write(tmp_path, "".join(f"{key}: {value}\n" for key, value in given.items()))
    told = load_config(write(tmp_path, MINIMAL, "b.yaml"), [f"{k}={v}" for k, v in given.items()])
    cfg = load_config(file)
    assert told == cfg and cfg.model_dump_json().count(f'"{meant}"') == len(PATHS) + 1
    assert cfg.sft.eval_data[0].path == "b~/c"
    dump_config(cfg, tmp_path / "c.yaml")
    monkeypatch.setenv("HOME", "/home/other")
    assert load_config(tmp_path / "c.yaml") == cfg


def test_every_path_of_the_schema_is_among_them() -> None:
    names = {str(path[-1]) for path in schema_paths(Config)}
    found = {name for name in names if re.search(r"(^|_)(path|dir|adapter|folder|file)$", name)}
    assert found == {"run_dir", "path", "adapter", "adapter_dir", "nvme_path"}


def test_one_sample_cannot_normalise_scores() -> None:
    section = {"score_normalization_samples": 1}
    with pytest.raises(ValueError, match="score_normalization_samples: one response has no devi"):
        PpoSection.model_validate(section)
    assert PpoSection.model_validate({**section, "score_normalization": "running"})


def test_a_rate_that_warm_up_keeps_within_float32_is_taken(tmp_path: Path) -> None:
    content = MINIMAL + "sft: {learning_rate: 1e38, warmup_steps: 6}\n"
    assert load_config(write(tmp_path, content)).sft.learning_rate == 1e38
    text = "from_scratch: {data: [{path: a, format: text}], learning_rate: 1e38}"
    (found,) = problems(tmp_path, MINIMAL.replace("path: some-model", text))
    assert found.endswith("must be at most 1e+37, not 1e+38")
