"""Runs without SFT or without a reward model, and runs that start from finished adapters."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import make_base, make_run, ppo_config
from safetensors.torch import load_file, save_file

import train_ppo
import train_rm
import train_sft
from chatllama.config.errors import ConfigError
from chatllama.config.loader import dump_config, load_config
from chatllama.config.schema import Config
from chatllama.config.stage_checks import check_stages
from chatllama.exporting.cli import ExportOptions
from chatllama.exporting.export import export_run
from chatllama.generation.sampling import Sampling
from chatllama.inference.chat_model import ChatModel
from chatllama.inference.load import load_run
from chatllama.inference.options import find_role
from chatllama.model.adapters import load_adapter
from chatllama.reporting.page import write_report
from chatllama.reporting.summary import findings, read_summary, result_table, write_summary
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runtime.files import write_json
from trainers.ppo.model import build_roles
from trainers.stages import pipeline, refusals
from trainers.stages.lineage import made_from, parents

SHIPPED = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = [path for path in SHIPPED.glob("*.yaml") if path.stem != "reference"]
WEIGHTS = "adapter_model.safetensors"
DATA: dict[str, Any] = {"data": [{"path": "a.jsonl"}]}
FUNCTION = {"rewards": [{"function": "ppo_runs:count_words"}]}


def config(**sections: Any) -> Config:
    return Config.model_validate({"run_dir": "r", "backbone": {"path": "b"}, **sections})


# --- which stages a config has


def test_stages_are_those_with_data_or_an_adapter() -> None:
    assert config().stages == ()
    assert config(sft=DATA, ppo=DATA).stages == ("sft", "ppo")
    given = config(sft={"adapter": "x"}, reward={"adapter": "y"}, ppo=DATA)
    assert given.stages == ("sft", "reward", "ppo") and given.trained_stages == ("ppo",)
    assert config(sft=None, reward=DATA, ppo=None).stages == ("reward",)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"sft": {"steps": 3}, "ppo": DATA | FUNCTION}, "sft: it has settings but no data"),
        ({"sft": DATA, "reward": {"ensemble": 3}}, "reward: it has settings but no data"),
        ({"sft": DATA, "ppo": {"steps": 3}}, "ppo: it has settings but no data; give ppo.data"),
        ({}, "no stage has data"),
        ({"sft": {"adapter": "x"}}, "no stage has data"),
        ({"lora": None, "reward": DATA}, "lora: null means SFT of all weights"),
        ({"sft": DATA, "ppo": DATA}, "ppo.rewards: `adapter: run` is the reward model of this run"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(
    sections: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_stages(config(**sections))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"sft": DATA},
        {"reward": DATA},
        {"ppo": DATA | FUNCTION},
        {"sft": {"adapter": "x"}, "ppo": DATA | FUNCTION},
        {"reward": {"adapter": "x"}, "ppo": DATA},
        {"sft": DATA, "lora": None, "reward": DATA},
    ],
)
def test_stages_that_fit_together(sections: dict[str, Any]) -> None:
    check_stages(config(**sections))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_configs_fit_together(path: Path) -> None:
    check_stages(load_config(path))


def test_a_missing_adapter_is_refused_in_the_parent(tmp_path: Path) -> None:
    terms = {"rewards": [{"adapter": str(tmp_path)}, {"adapter": "run"}]}
    cfg = config(sft={"adapter": "x"}, reward={"adapter": str(tmp_path)}, ppo=DATA | terms)
    text = "\n".join(refusals.input_problems(cfg, cfg.stages, None))
    for key in (
        "sft.adapter: x",
        f"reward.adapter: {tmp_path}",
        f"ppo.rewards.0.adapter: {tmp_path}",
    ):
        assert f"{key} holds no adapter" in text


def test_data_and_a_finished_adapter_exclude_each_other() -> None:
    for stage in ("sft", "reward"):
        with pytest.raises(ValueError, match="give data, to train an adapter, or adapter"):
            config(**{stage: DATA | {"adapter": "x"}})
    with pytest.raises(ValueError, match="leave ensemble at 1"):
        config(reward={"adapter": "x", "ensemble": 2})


def test_what_a_stage_is_made_from() -> None:
    every = config(sft=DATA, reward=DATA, ppo=DATA)
    assert [made_from(every, stage) for stage in every.stages] == [[], ["sft"], ["sft", "reward"]]
    assert made_from(config(sft=DATA, reward=DATA, ppo=DATA | FUNCTION), "ppo") == ["sft"]
    bare = config(ppo=DATA | FUNCTION)
    assert made_from(bare, "ppo") == [] and parents(bare, RunFolder(Path("r")), "ppo") == {}
    assert made_from(config(reward=DATA), "reward") == []


# --- which stages `chatllama run` does


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """Stages that were started; each one finishes at once."""
    done: list[Stage] = []

    def finish(run: RunFolder, stage: Stage, *_: object) -> None:
        done.append(stage)
        write_json(run.result(stage), {"wall_seconds": 1.0})

    monkeypatch.setattr(pipeline, "count_gpus", lambda: 0)
    for name in ("input_problems", "model_problems"):  # there is no model
        monkeypatch.setattr(refusals, name, lambda *_: [])
    monkeypatch.setattr(pipeline, "_run_stage", finish)
    return done


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a config of the given sections; returns its path."""

    def written(**sections: Any) -> str:
        content = {"run_dir": str(tmp_path / "run"), "backbone": {"path": "b"}, **sections}
        content["chat"] = {"template": "llama2"}
        (tmp_path / "c.yaml").write_text(json.dumps(content))
        return str(tmp_path / "c.yaml")

    return written


def test_absent_stages_are_skipped_and_said(
    write: Write, started: list[Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run_pipeline(write(sft=DATA))
    assert started == ["sft"]
    out = capsys.readouterr().out
    for stage in ("reward", "ppo"):
        assert f"{stage}: left out (the config has no {stage}.data)" in out
    pipeline.run_pipeline(write(sft=DATA, ppo=DATA | FUNCTION))  # a later section is added
    assert started == ["sft", "ppo"]


def test_only_names_the_stages_that_run(
    write: Write, started: list[Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    every = write(sft=DATA, reward=DATA, ppo=DATA)
    with pytest.raises(ValueError, match=r"stage ppo starts from reward, .*not finished.*: name"):
        pipeline.run_pipeline(every, only=("sft", "ppo"))
    assert started == []
    pipeline.run_pipeline(every, only=("sft",))
    assert started == ["sft"] and "ppo: left out (--only)" in capsys.readouterr().out
    functions = write(sft=DATA, reward=DATA, ppo=DATA | FUNCTION)
    pipeline.run_pipeline(functions, only=("sft", "ppo"))
    assert started == ["sft", "ppo"]
    with pytest.raises(ValueError, match=r"--only reward: the config has no reward\.data"):
        pipeline.run_pipeline(write(sft=DATA), ["run_dir=elsewhere"], only=("reward",))


def test_a_folder_with_a_stage_that_the_config_leaves_out_is_refused(
    write: Write, started: list[Stage]
) -> None:
    pipeline.run_pipeline(write(sft=DATA))
    with pytest.raises(ValueError, match="holds stage sft, which the config leaves out"):
        pipeline.run_pipeline(write(ppo=DATA | FUNCTION))
    assert started == ["sft"]


def test_a_script_of_a_stage_that_is_left_out_says_so(write: Write) -> None:
    with pytest.raises(ValueError, match=r"the config leaves stage reward out: it has no"):
        train_rm.main([write(sft=DATA)])


# --- what the run folder's readers make of it


def test_without_sft_results_are_compared_with_the_base(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text(json.dumps({"run_dir": "r", "backbone": {"path": "b"}, "ppo": DATA}))
    numbers = {"score_mean": 0.5, "win_rate": 0.8, "win_rate_low": 0.7, "win_rate_high": 0.9}
    roles = {"base": {"score_mean": 0.1}, "ppo": {**numbers, "kl": 2.0}}
    write_json(run.evaluation, {"roles": roles, "samples": []})
    write_summary(run)
    heads, rows = result_table(read_summary(run))
    assert heads == ["model", "reward score (raw)", "win rate vs base", "KL to base (nats)"]
    assert [row[0] for row in rows] == ["base", "PPO"]
    assert "beat those of the base model" in findings(read_summary(run))[0].text
    page = write_report(run).read_text(encoding="utf-8")
    assert "of PPO against base" in page and "Judged by" in page
    assert "SFT curves" not in page and "Reward model curves" not in page


def test_the_report_of_sft_alone_says_that_nothing_is_evaluated(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text(json.dumps({"run_dir": "r", "backbone": {"path": "b"}, "sft": DATA}))
    page = write_report(run).read_text(encoding="utf-8")
    assert "which this run leaves out" in page and "No evaluation yet" not in page
    assert "PPO curves" not in page and "SFT curves" in page


# --- whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> str:
    return make_base(tmp_path_factory.mktemp("left_out") / "base", tiny_tokenizer_dir)


def prepared(base: str, folder: Path, name: str = "run", **changes: Any) -> Path:
    """A config file, with prompts, of a run whose folder is still empty."""
    prompts = "".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(12))
    (folder / "prompts.jsonl").write_text(prompts)
    source = {"data": [{"path": str(folder / "prompts.jsonl")}], "eval_fraction": 0.4}
    ppo = {**source, **changes.pop("ppo", {})}
    dump_config(ppo_config(base, folder / name, ppo=ppo, **changes), folder / f"{name}.yaml")
    return folder / f"{name}.yaml"


GRPO: dict[str, Any] = {
    "advantage": "grpo",
    "samples_per_prompt": 2,
    "rewards": [{"function": "ppo_runs:letter_sum"}],
}
EMPTY = {"data": []}


@pytest.mark.slow
def test_grpo_from_the_bare_base(base: str, tmp_path: Path) -> None:
    changes = {**GRPO, "save_every": 1, "save_total_limit": 9, "ema_decay": 0.5}
    file = prepared(base, tmp_path, sft=EMPTY, reward=EMPTY, ppo=changes)
    run, cut = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "cut")
    train_ppo.main([str(file)])
    lines = [json.loads(line) for line in run.metrics("ppo").read_text().splitlines()]
    assert lines[0]["ppo/kl_sequence"] == 0 and lines[1]["ppo/kl_sequence"] != 0
    assert list(json.loads(run.evaluation.read_text())["roles"]) == ["base", "ppo", "ema"]
    # an interrupted run ends with the same weights
    shutil.copytree(run.checkpoints("ppo") / "step-1", cut.checkpoints("ppo") / "step-1")
    train_ppo.main([str(file), f"run_dir={cut.root}", "--resume"])
    for folder in ("policy", "policy-ema"):
        whole, resumed = (each.stage("ppo") / folder / WEIGHTS for each in (run, cut))
        assert whole.read_bytes() == resumed.read_bytes()
    # and everything that opens a run folder knows what it is
    loaded = load_run(run)
    model = ChatModel(loaded, Sampling(4), torch.Generator().manual_seed(0))
    assert model.roles == ("base", "policy", "ema")
    compared = list(model.compare([{"role": "user", "content": "What is 1?"}]))
    assert compared[0].kl is None and compared[1].kl is not None
    assert compared[1].start == "base"
    with pytest.raises(ValueError, match=r"--role sft: .* has none"):
        find_role(run, load_config(run.config), "sft")
    folder = export_run(run.root, ExportOptions())
    assert (folder / "policy" / WEIGHTS).is_file() or list(folder.glob(f"*/{WEIGHTS}"))


def test_adapters_that_change_nothing_are_alike(base: str, tmp_path: Path) -> None:
    changes = {**FUNCTION, "reference_refresh_every": 1, "ema_decay": 0.5}
    cfg = ppo_config(base, tmp_path, sft=EMPTY, reward=EMPTY, ppo=changes)
    from ppo_runs import tokenizer_of

    from chatllama.model.roles import adapter_state

    model = build_roles(cfg, RunFolder(tmp_path), tokenizer_of(base)).model
    policy = adapter_state(model, "policy")
    for role in ("reference", "ema"):
        for name, tensor in adapter_state(model, role).items():
            assert torch.equal(tensor, policy[name]) and (tensor.any() != ("lora_B" in name))


def plain_peft(folder: Path, base: str) -> Path:
    """The adapter without what this project adds to PEFT's files."""
    plain = folder.parents[1] / f"plain-{folder.parent.name}"
    shutil.copytree(folder, plain)
    (plain / "chatllama.json").unlink()
    settings = json.loads((plain / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base
    return plain


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True], ids=["of a run", "plain PEFT"])
def test_finished_adapters_take_the_place_of_stages(
    base: str, tmp_path: Path, plain: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run(ppo_config(base, tmp_path / "other"))
    sft, reward = other.sft_adapter, other.reward_adapter
    if plain:
        sft, reward = plain_peft(sft, base), plain_peft(reward, base)
    given = {"sft": {**EMPTY, "adapter": str(sft)}, "reward": {**EMPTY, "adapter": str(reward)}}
    file, run = str(prepared(base, tmp_path, "run", **given)), RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match=r"stage sft of .* has not finished"):
        train_ppo.main([file])
    train_sft.main([file])
    train_rm.main([file])
    said = capsys.readouterr()
    assert f"sft: {sft} takes the place of training" in said.out
    assert ("what cannot be checked" in said.err) == plain
    for ours, theirs in ((run.sft_adapter, sft), (run.reward_adapter, reward)):
        written, source = load_file(ours / WEIGHTS), load_file(Path(theirs) / WEIGHTS)
        assert written.keys() == source.keys()
        assert all(torch.equal(written[name], source[name]) for name in source)
    assert load_adapter(run.sft_adapter).info["stage"] == "sft"
    train_ppo.main([file])
    train_ppo.main([str(prepared(base, tmp_path, "other"))])  # whose stages were trained
    weights = [(each.policy_adapter / WEIGHTS).read_bytes() for each in (run, other)]
    assert weights[0] == weights[1]
    train_sft.main([file])
    assert "has finished before" in capsys.readouterr().out
    changed = load_file(Path(sft) / WEIGHTS)
    save_file({k: v + 1 for k, v in changed.items()}, Path(sft) / WEIGHTS)
    with pytest.raises(ValueError, match=f"{WEIGHTS} has another content"):
        train_sft.main([file])


@pytest.mark.slow
def test_adapters_that_do_not_fit_are_refused(base: str, tmp_path: Path) -> None:
    other = make_run(ppo_config(base, tmp_path / "other"))
    sft = plain_peft(other.sft_adapter, base)
    file = prepared(base, tmp_path, sft=EMPTY, reward=EMPTY)

    def refused(script: Any, message: str, *overrides: str) -> None:
        with pytest.raises(ValueError, match=message):
            script.main([str(file), "ppo=null", "reward=null", "sft=null", *overrides])

    ppo = "ppo.rewards=[{function: 'ppo_runs:count_words'}]"
    ppo_data = f"ppo.data=[{{path: '{tmp_path}/prompts.jsonl'}}]"
    rest = (ppo, ppo_data)

    def adapter(stage: str, folder: object) -> str:
        return f"{stage}.adapter='{folder}'"

    refused(train_sft, "has another shape than `lora`.*write lora: {r: 4",
            adapter("sft", sft), "lora.r=2", *rest)  # fmt: skip
    refused(train_sft, "it is a reward or value", adapter("sft", other.reward_adapter), *rest)
    refused(train_rm, "no score head", adapter("reward", other.sft_adapter), *rest)
    refused(train_sft, "another chat contract", adapter("sft", other.sft_adapter),
            "chat.template=llama2", *rest)  # fmt: skip
    tensors = load_file(sft / WEIGHTS)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.ones(tensors[name].shape[0], 7)}, sft / WEIGHTS)
    refused(train_sft, "does not fit .*of shape", adapter("sft", sft), *rest)
    refused(train_sft, "holds no adapter", adapter("sft", tmp_path), *rest)
