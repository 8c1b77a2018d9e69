"""What `chatllama run` does again, and why: lineage.json against what is there now."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from chatllama.config.schema import Config
from chatllama.model.fingerprint import check_base, fingerprint
from chatllama.runs.folder import STAGES, RunFolder, Stage, read_lineage
from chatllama.runtime.files import file_hash, write_json
from trainers.stages import lineage
from trainers.stages.decisions import (
    Decision,
    backbone_config,
    check_resumed,
    decide,
    finished_before,
    forget,
    set_aside,
)
from trainers.stages.lineage import differences, gather

MADE: dict[Stage, list[str]] = {
    "sft": ["sft/adapter"],
    "reward": ["reward/adapter", "reward/adapter-1"],
    "ppo": ["ppo/policy", "ppo/value"],
}


def make_base(folder: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": rng.normal(size=(9, 9)), "b": rng.normal(size=3)}, folder / "m.safetensors")
    return folder


class World:
    """A config, its data and base, and a run folder whose stages pretend to have been trained."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, RunFolder(folder / "run")
        self.base = make_base(folder / "base")
        for name in ("sft", "pairs", "held_out"):
            (folder / f"{name}.jsonl").write_text(f'{{"{name}": 1}}\n')

    def config(self, **changes: Any) -> Config:
        def source(name: str) -> list[dict]:
            return [{"path": str(self.folder / f"{name}.jsonl")}]

        values: dict[str, Any] = {
            "run_dir": str(self.run.root),
            "backbone": {"path": str(self.base)},
            "sft": {"data": source("sft")},
            "reward": {"data": source("pairs"), "eval_data": source("held_out"), "ensemble": 2},
            "ppo": {"data": source("sft")},
        }
        for key, value in changes.items():
            names = key.split("__")
            place = values
            for name in names[:-1]:
                place = place.setdefault(name, {})
            place[names[-1]] = value
        return Config.model_validate(values)

    def begin(self, stage: Stage, cfg: Config | None = None) -> None:
        cfg = cfg or self.config()
        lineage.write_record(self.run, stage, check_resumed(cfg, self.run, stage))

    def train(self, stage: Stage, cfg: Config | None = None, content: str = "") -> None:
        """As a stage leaves it."""
        cfg = cfg or self.config()
        self.begin(stage, cfg)
        for name in MADE[stage]:
            folder = self.run.root / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "adapter_model.safetensors").write_text(name + content)
        lineage.finish(cfg, self.run, stage)
        write_json(self.run.result(stage), {"wall_seconds": 1.0, "steps": 100.0})

    def interrupt(self, stage: Stage) -> None:
        self.begin(stage)
        (self.run.checkpoints(stage) / "step-5").mkdir(parents=True)

    def decide(
        self, cfg: Config | None = None, redo_from: Stage | None = None, resume: bool = False
    ) -> dict[Stage, Decision]:
        return decide(cfg or self.config(), self.run, redo_from, resume)

    def actions(self, *args: Any, **kwargs: Any) -> list[str]:
        return [each.action for each in self.decide(*args, **kwargs).values()]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def trained(world: World) -> Iterator[World]:
    for stage in STAGES:
        world.train(stage)
    yield world


def test_nothing_has_been_done(world: World):
    assert world.actions() == ["do", "do", "do"]


def test_what_is_finished_is_kept(trained: World):
    assert [each for each in trained.decide().values()] == [Decision("keep")] * 3


def test_the_record_says_what_a_stage_was_made_from(trained: World):
    records = read_lineage(trained.run)
    assert list(records) == ["sft", "reward", "ppo"]
    reward, ppo = records["reward"], records["ppo"]
    assert reward["config"]["reward.ensemble"] == 2 and "sft.steps" not in reward["config"]
    assert reward["base"] == {
        "path": str(trained.base),
        "fingerprint": fingerprint(trained.base),
        "files": {"m.safetensors": file_hash(trained.base / "m.safetensors")},
    }
    weights = "sft/adapter/adapter_model.safetensors"
    assert records["sft"]["files"] == {weights: file_hash(trained.run.root / weights)}
    assert {Path(name).name for name in reward["data"]} == {"pairs.jsonl", "held_out.jsonl"}
    assert list(reward["parents"]) == ["sft/adapter"]
    assert set(ppo["parents"]) == {"sft/adapter", "reward/adapter", "reward/adapter-1"}
    assert reward["parents"]["sft/adapter"] == records["sft"]["outputs"]["sft/adapter"]
    assert set(ppo["outputs"]) == {"ppo/policy", "ppo/value"}
    assert ppo["packages"]["torch"] and ppo["code"]["source"] and ppo["finished"] >= ppo["begun"]


@pytest.mark.parametrize(
    ("changes", "expected", "reason"),
    [
        ({"ppo__kl_coef": 0.5}, "keep keep again", r"ppo\.kl_coef: 0\.\d+ there, 0\.5 now"),
        ({"generation__top_k": 5}, "keep keep again", r"generation\.top_k: 0 there, 5 now"),
        ({"evaluation__num_prompts": 3}, "keep keep again", r"evaluation\.num_prompts"),
        ({"reward__learning_rate": 0.5}, "keep again again", r"reward\.learning_rate: 5e-05 there"),
        ({"lora__r": 3}, "again again again", r"lora\.r: \d+ there, 3 now"),
        ({"seed": 7}, "again again again", r"seed: 0 there, 7 now"),
    ],
)
def test_changed_settings(trained: World, changes: dict, expected: str, reason: str):
    import re

    decisions = trained.decide(trained.config(**changes))
    assert [each.action for each in decisions.values()] == expected.split()
    again = [each for each in decisions.values() if each.action == "again"]
    assert re.search(reason, again[0].reasons[0]) and len(again[0].reasons) == 1
    for before, each in zip(STAGES[3 - len(again) :], again[1:], strict=False):
        assert each.reasons == (f"{before} is made anew",)


def test_settings_that_change_nothing_learned(trained: World):
    free = {
        "tracking__log_every": 5,
        "ppo__save_every": 1,
        "sft__save_total_limit": 9,
        "deepspeed__stage": 3,
        "backbone__gradient_checkpointing": True,
        "reward__allow_weak": True,
    }
    assert trained.actions(trained.config(**free)) == ["keep"] * 3


def test_microbatches_of_sft_and_reward_change_nothing_learned(trained: World):
    cfg = trained.config(sft__microbatch_size=1, reward__microbatch_size=1)
    assert trained.actions(cfg) == ["keep"] * 3
    # PPO draws its minibatches from whole microbatches
    assert trained.actions(trained.config(ppo__microbatch_size=1)) == ["keep", "keep", "again"]


def test_a_script_on_a_finished_stage(trained: World):
    run, (folder, *_) = trained.run, MADE["ppo"]
    assert finished_before(trained.config(), run, "ppo", False)
    with pytest.raises(ValueError, match=r"(?s)stage ppo of .* done again:\n  ppo\.kl_c"):
        finished_before(trained.config(ppo__kl_coef=0.5), run, "ppo", True)
    (run.root / folder / "adapter_model.safetensors").write_text("other")
    with pytest.raises(ValueError, match=r"is not what the stage wrote.*run --from ppo` make it"):
        finished_before(trained.config(), run, "ppo", False)
    forget(run, "ppo")
    assert not finished_before(trained.config(), run, "ppo", False)


def test_changed_data(trained: World):
    (trained.folder / "held_out.jsonl").write_text('{"held_out": 2}\n')
    decisions = trained.decide()
    assert [each.action for each in decisions.values()] == ["keep", "again", "again"]
    assert decisions["reward"].reasons == (
        f"data {trained.folder / 'held_out.jsonl'} has another content",
    )


def test_touched_or_removed_data_are_no_reason(trained: World):
    os.utime(trained.folder / "sft.jsonl", (1, 1))
    (trained.folder / "pairs.jsonl").unlink()
    assert trained.actions() == ["keep"] * 3


def test_a_new_file_in_a_folder_of_data(world: World):
    (world.folder / "many").mkdir()
    (world.folder / "many" / "a.jsonl").write_text("1")
    cfg = world.config(sft__data=[{"path": str(world.folder / "many")}])
    world.train("sft", cfg)
    (world.folder / "many" / "b.jsonl").write_text("1")
    (reason,) = world.decide(cfg)["sft"].reasons
    assert "b.jsonl is new" in reason


def test_another_base_at_the_same_path(trained: World):
    make_base(trained.base, seed=1)
    decisions = trained.decide()
    assert [each.action for each in decisions.values()] == ["again"] * 3
    assert decisions["sft"].reasons == (f"the base model has other weights ({trained.base})",)


def test_an_equal_base_or_equal_data_at_another_path_are_no_reason(trained: World):
    moved = trained.base.rename(trained.folder / "moved")
    assert trained.actions(trained.config(backbone__path=str(moved))) == ["keep"] * 3
    data = (trained.folder / "sft.jsonl").rename(trained.folder / "other.jsonl")
    cfg = trained.config(backbone__path=str(moved), sft__data=[{"path": str(data)}])
    assert trained.actions(cfg)[0] == "keep"
    data.write_text("another content")
    assert trained.actions(cfg)[0] == "again"


def test_a_stage_that_was_trained_again_by_hand(trained: World):
    trained.train("sft", content="other")
    decisions = trained.decide()
    assert [each.action for each in decisions.values()] == ["keep", "again", "again"]
    assert decisions["reward"].reasons == ("it was made from another sft/adapter",)


def test_versions_are_told_and_no_reason(trained: World):
    records = read_lineage(trained.run)
    records["reward"]["packages"]["torch"] = "1.0"
    records["reward"]["code"]["source"] = "old"
    write_json(trained.run.lineage, records)
    decisions = trained.decide()
    assert [each.action for each in decisions.values()] == ["keep"] * 3
    torch_note, code_note = decisions["reward"].notes
    assert torch_note.startswith("torch 1.0 then, ") and "another source" in code_note


def test_results_of_before_there_was_a_lineage_are_kept(trained: World):
    trained.run.lineage.unlink()
    decisions = trained.decide()
    assert [each.action for each in decisions.values()] == ["keep"] * 3
    assert "has no record of it" in decisions["sft"].notes[0]


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_damaged_results_are_named(trained: World, damage: str):
    file = trained.run.reward_adapter / "adapter_model.safetensors"
    os.truncate(file, 3) if damage == "truncated" else file.unlink()
    what = "is not what" if damage == "truncated" else "is missing"
    message = rf"adapter/adapter_model\.safetensors {what}.* run --from reward` make"
    with pytest.raises(ValueError, match=message):
        trained.decide()
    assert trained.actions(redo_from="reward") == ["keep", "forget", "forget"]


def test_an_interrupted_stage_asks_for_resume(world: World):
    world.train("sft")
    world.interrupt("reward")
    with pytest.raises(ValueError, match=r"stage reward .* add --resume .* or --from reward"):
        world.decide()
    assert world.actions(resume=True) == ["keep", "go on", "do"]
    assert world.actions(redo_from="reward") == ["keep", "forget", "do"]


def test_finished_members_of_an_ensemble_are_something_to_go_on_from(world: World):
    world.train("sft")
    world.begin("reward")
    write_json(world.run.checkpoints("reward") / "members.json", [])
    assert world.actions(resume=True) == ["keep", "go on", "do"]
    (world.run.checkpoints("reward") / "members.json").unlink()
    assert world.actions() == ["keep", "do", "do"]
    (world.run.checkpoints("reward") / "member-1/reward/checkpoints/step-3").mkdir(parents=True)
    assert world.actions(resume=True) == ["keep", "go on", "do"]


def test_an_interrupted_stage_goes_on_with_its_own_settings_only(world: World):
    world.train("sft")
    world.interrupt("reward")
    cfg = world.config(reward__epochs=3.0)
    with pytest.raises(ValueError, match=r"cannot go on:\n  reward\.epochs: 1\.0 there, 3\.0 now"):
        world.decide(cfg, resume=True)
    with pytest.raises(
        ValueError, match=r"(?s)begun otherwise.*\n  reward\.epochs: .*remove .*check"
    ):
        check_resumed(cfg, world.run, "reward")
    world.train("sft", content="other")
    with pytest.raises(ValueError, match="made from another sft/adapter"):
        check_resumed(world.config(), world.run, "reward")


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", {"sft__batch_size": 4, "sft__microbatch_size": 4}),
        ("sft", {"sft__max_length": 77}),
        ("sft", {"lora__r": 3}),
        ("reward", {"reward__adam_betas": [0.5, 0.6]}),
        ("reward", {"reward__center_coef": 0.5}),
        ("ppo", {"ppo__kl_coef": 0.7}),
        ("ppo", {"ppo__epochs": 1}),
        ("ppo", {"generation__max_new_tokens": 5}),
        ("ppo", {"seed": 5}),
    ],
    ids=str,
)
def test_what_earlier_steps_were_made_with_may_not_change(
    world: World, stage: Stage, changes: dict[str, Any]
):
    for earlier in STAGES[: STAGES.index(stage)]:
        world.train(earlier)
    world.interrupt(stage)
    cfg = world.config(**changes)
    key = next(iter(changes)).replace("__", ".")
    if not key.startswith(("lora", "seed")):
        with pytest.raises(ValueError, match=rf"cannot go on:\n  {key}: .* there, .* now"):
            world.decide(cfg, resume=True)
    with pytest.raises(ValueError, match=rf"begun otherwise.*\n  {key}: .* there, .* now"):
        check_resumed(cfg, world.run, stage)


def test_what_evaluates_may_change_while_ppo_is_interrupted(world: World):
    world.train("sft")
    world.train("reward")
    world.interrupt("ppo")
    cfg = world.config(evaluation__num_prompts=3)
    assert world.actions(cfg, resume=True)[2] == "go on"
    assert check_resumed(cfg, world.run, "ppo")["finished"] is None


def test_a_result_that_was_removed_may_be_made_with_another_evaluation(trained: World):
    (trained.run.checkpoints("ppo") / "step-1").mkdir(parents=True)
    trained.run.result("ppo").unlink()
    cfg = trained.config(evaluation__num_prompts=3)
    begun = read_lineage(trained.run)["ppo"]["begun"]
    assert check_resumed(cfg, trained.run, "ppo")["begun"] == begun


CONSTANT = {f"{stage}__lr_schedule": "constant" for stage in STAGES}


def prolongable(world: World) -> Config:
    """Every stage finished after 100 steps with a constant rate, and a checkpoint of each."""
    cfg = world.config(**CONSTANT)
    for stage in STAGES:
        world.train(stage, cfg)
        (world.run.checkpoints(stage) / "step-90").mkdir(parents=True)
    return cfg


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"ppo__steps": 140}, "keep keep prolong"),
        ({"ppo__steps": 101, "ppo__learning_rate": 0.5}, "keep keep prolong"),
        ({"sft__steps": 140}, "prolong again again"),
        ({"sft__epochs": 2.0}, "prolong again again"),
        ({"ppo__steps": 95}, "keep keep again"),  # of fewer there is no result
        ({"ppo__steps": 140, "ppo__kl_coef": 0.5}, "keep keep again"),
        ({"ppo__steps": 140, "ppo__lr_schedule": "linear"}, "keep keep again"),
        ({"ppo__learning_rate": 0.5}, "keep keep again"),
        ({"sft__epochs": 0.5}, "again again again"),
    ],
)
def test_a_finished_stage_is_prolonged_by_more_steps(world: World, more: dict, expected: str):
    prolongable(world)
    cfg = world.config(**CONSTANT | more)
    assert " ".join(world.actions(cfg, resume=True)) == expected
    without = world.decide(cfg)
    assert [each.action for each in without.values()] == expected.replace(
        "prolong", "again"
    ).split()
    said = [each.reasons for each in without.values() if "--resume" in str(each.reasons)]
    assert bool(said) == ("prolong" in expected)


@pytest.mark.parametrize(("stage", "key"), [("ppo", "steps"), ("sft", "steps"), ("sft", "epochs")])
def test_a_stage_that_is_prolonged_keeps_its_adapters_and_can_be_interrupted(
    world: World, stage: Stage, key: str
):
    prolongable(world)
    cfg = world.config(**CONSTANT, **{f"{stage}__{key}": 140 if key == "steps" else 3.0})
    assert finished_before(cfg, world.run, stage, True) is False
    with pytest.raises(
        ValueError, match=r"must be done again:\n  .*\n .*--resume it would be prol"
    ):
        finished_before(cfg, world.run, stage, False)
    before = (world.run.root / MADE[stage][0] / "adapter_model.safetensors").read_text()
    world.begin(stage, cfg)
    assert not world.run.result(stage).is_file()
    assert (world.run.root / MADE[stage][0] / "adapter_model.safetensors").read_text() == before
    if stage == "ppo":
        assert world.actions(cfg, resume=True) == ["keep", "keep", "go on"]
    assert read_lineage(world.run)[stage]["changed"][0][0].startswith(f"{stage}.{key}: ")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_whose_last_checkpoint_was_not_kept_is_not_prolonged(world: World, stage: Stage):
    prolongable(world)
    (world.run.checkpoints(stage) / "step-90").rmdir()
    write_json(world.run.members, [{}, {}])  # the reward ensemble's
    cfg = world.config(**CONSTANT, **{f"{stage}__steps": 140})
    with pytest.raises(ValueError, match=rf"{stage} .* after 100 steps, .*no checkpoint of it is"):
        world.decide(cfg, resume=True)
    with pytest.raises(ValueError, match=r"no checkpoint of it is left"):
        finished_before(cfg, world.run, stage, True)


@pytest.mark.parametrize(
    ("finished", "saved", "sizes"),
    [(0, True, [1]), (1, True, [2]), (1, False, [1]), (2, False, [2])],
)
def test_an_ensemble_can_leave_out_the_members_that_are_not_begun(
    world: World, finished: int, saved: bool, sizes: list[int]
):
    world.train("sft")
    world.begin("reward", world.config(reward__ensemble=3))
    if finished:
        write_json(world.run.members, [{}] * finished)
    if saved:
        (world.run.reward_run(finished).checkpoints("reward") / "step-5").mkdir(parents=True)
    for size in (1, 2):
        cfg = world.config(reward__ensemble=size, **({"reward__steps": 5} if saved else {}))
        if size in sizes:
            assert check_resumed(cfg, world.run, "reward")["config"]["reward.ensemble"] == size
            world.begin("reward", world.config(reward__ensemble=3))
        else:
            with pytest.raises(ValueError, match=r"reward\.ensemble: 3 there"):
                check_resumed(cfg, world.run, "reward")


def test_a_changed_parent_ends_an_interrupted_child(world: World):
    world.train("sft")
    world.interrupt("reward")
    assert world.actions(world.config(sft__epochs=2.0)) == ["again", "again", "do"]


def test_nothing_of_an_old_result_is_lost(trained: World):
    for expected in ("ppo-1", "ppo-2"):
        write_json(trained.run.evaluation, {"roles": {}})
        assert set_aside(trained.run, "ppo").name == expected
        aside = trained.run.root / "previous" / expected
        assert (aside / "policy").is_dir() and (aside / "evaluation.json").is_file()
        assert "ppo" in json.loads((aside / "lineage.json").read_text())
        assert not trained.run.stage("ppo").exists() and "ppo" not in read_lineage(trained.run)
        trained.train("ppo")


def test_forgetting_a_stage(trained: World):
    (trained.run.checkpoints("ppo") / "step-1").mkdir(parents=True)
    forget(trained.run, "ppo")
    assert trained.actions() == ["keep", "keep", "do"]


def test_a_backbone_made_here_binds_its_settings(world: World):
    text = [{"path": str(world.folder / "t.txt"), "format": "text"}]
    scratch = {"from_scratch": {"data": text}}
    cfg = world.config(backbone=scratch)
    world.run.backbone.mkdir(parents=True)
    info = {"stage": "backbone", "config": backbone_config(cfg)}
    write_json(world.run.backbone / "chatllama.json", info)
    assert world.actions(cfg) == ["do"] * 3
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 now\nUse run_dir=\.\.\. for a new run"):
        world.decide(world.config(backbone=scratch, seed=1), redo_from="sft")


# --- the base an adapter fits ---------------------------------------------------------------------


def test_a_fingerprint_sees_weights_and_not_files(tmp_path: Path):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 40)), rng.normal(size=(7,))
    for name in ("one", "two", "last", "type"):
        (tmp_path / name).mkdir()
    save_file({"a": a, "b": b}, tmp_path / "one" / "model.safetensors")
    save_file({"b": b}, tmp_path / "two" / "model-1.safetensors")
    save_file({"a": a}, tmp_path / "two" / "model-2.safetensors")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    other = a.copy()
    other[-1, -1] += 1e-9
    save_file({"a": other, "b": b}, tmp_path / "last" / "model.safetensors")
    save_file({"a": a.astype("f4"), "b": b}, tmp_path / "type" / "model.safetensors")
    found = {fingerprint(tmp_path / name) for name in ("one", "last", "type")}
    assert len(found) == 3 and fingerprint(tmp_path) is None
    index = {"weight_map": {"a": "model-2.safetensors", "c": "model-3.safetensors"}}
    write_json(tmp_path / "two" / "model.safetensors.index.json", index)
    assert fingerprint(tmp_path / "two") is None  # still being downloaded
    (tmp_path / "one" / "model.safetensors").write_bytes(struct.pack("<Q", 99) + b"{")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        fingerprint(tmp_path / "one")


def test_an_adapter_of_another_base_is_refused(world: World):
    cfg = world.config()
    info = {"base": "the/first", "base_fingerprint": fingerprint(world.base)}
    check_base(cfg, world.run, info, "runs/x/sft/adapter")
    check_base(cfg, world.run, {"base": "made before fingerprints"}, "adapter")
    make_base(world.base, seed=1)
    with pytest.raises(
        ValueError, match=r"x/sft/adapter was trained on another base: the/first .*"
    ):
        check_base(cfg, world.run, info, "runs/x/sft/adapter")


def test_a_record_of_the_same_things_differs_in_nothing(world: World):
    one = gather(world.config(), world.run, "sft", {})
    two = gather(world.config(), world.run, "sft", one)
    assert differences(one, two) == []


def test_keys_that_an_older_record_does_not_know_had_their_defaults(world: World):
    record = gather(world.config(), world.run, "ppo", {})
    now = json.loads(json.dumps(record))
    for key in ("generation.top_k", "ppo.ema_decay", "ppo.epochs", "lora.target_modules"):
        del record["config"][key]
    assert differences(record, now) == []
    now["config"] |= {"generation.top_k": 5, "ppo.epochs": 3}
    assert differences(record, now) == [
        "generation.top_k: 0 there, 5 now",
        "ppo.epochs: 4 there, 3 now",
    ]


@pytest.mark.parametrize("key", ["generation.compile", "backbone.liger_kernel", "ppo.save_every"])
def test_keys_that_bind_no_longer_are_passed_over_in_older_records(world: World, key: str):
    now = gather(world.config(), world.run, "ppo", {})
    assert key not in now["config"]
    record = json.loads(json.dumps(now))
    record["config"][key] = "what it was"
    assert differences(record, now) == []


def test_a_section_that_was_null_did_not_have_its_defaults(world: World):
    now = gather(world.config(), world.run, "sft", {})
    record = json.loads(json.dumps(now))
    lora = [key for key in now["config"] if key.startswith("lora.")]
    for key in lora:
        del record["config"][key]
    record["config"]["lora"] = None
    assert [line.partition(":")[0] for line in differences(record, now)] == sorted(
        key for key in lora if now["config"][key] is not None
    )


@pytest.mark.parametrize(
    ("schedule", "steps", "goes_on"),
    [("constant", 40, True), ("constant", 6, True), ("linear", 5, True), ("linear", 6, False),
     ("cosine", 40, False)],
)  # fmt: skip
def test_steps_may_change_where_no_learning_rate_depends_on_them(
    world: World, schedule: str, steps: int, goes_on: bool
):
    world.train("sft")
    world.train("reward")
    before = world.config(ppo__lr_schedule=schedule, ppo__steps=30)
    world.begin("ppo", before)
    (world.run.checkpoints("ppo") / "step-5").mkdir(parents=True)
    cfg = world.config(ppo__lr_schedule=schedule, ppo__steps=steps, ppo__save_every=7)
    if not goes_on:
        with pytest.raises(ValueError, match=rf"ppo\.steps: 30 there, {steps} now"):
            check_resumed(cfg, world.run, "ppo")
        return
    assert world.actions(cfg, resume=True)[2] == "go on"
    assert check_resumed(cfg, world.run, "ppo")["changed"] == [
        [f"ppo.steps: 30 before, {steps} now"]
    ]
    with pytest.raises(ValueError, match=r"ppo\.epochs: 4 there, 5 now"):
        check_resumed(world.config(ppo__epochs=5), world.run, "ppo")


def test_moved_data_and_bases_may_be_gone_on_with(world: World):
    world.interrupt("sft")
    for name in ("base", "sft.jsonl"):
        (world.folder / name).rename(world.folder / f"moved-{name}")
    cfg = world.config(
        backbone={"path": str(world.folder / "moved-base")},
        sft={"data": [{"path": str(world.folder / "moved-sft.jsonl")}]},
    )
    assert len(check_resumed(cfg, world.run, "sft")["changed"][0]) == 2
    (world.folder / "moved-sft.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match=r"sft\.data: "):
        check_resumed(cfg, world.run, "sft")


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        ("mine:score", "/here/mine:score", True),  # of a version that recorded no folder
        ("/here/mine:score", "/here/mine:score", True),
        ("/here/mine:score", "/other/mine:score", False),
        ("/here/mine:score", "mine:score", False),
        ("mine:score", "/here/mine:other", False),
    ],
)
def test_functions_of_a_record_may_lack_the_folder(world: World, before: str, now: str, kept: bool):
    def config(name: str) -> Config:
        return world.config(
            evaluation__gold=name, ppo__rewards=[{"adapter": "run"}, {"function": name}]
        )

    for each in STAGES:
        world.train(each, config(before))
    decision = world.decide(config(now))["ppo"]
    assert decision.action == ("keep" if kept else "again")
    assert kept or {reason.split(":")[0] for reason in decision.reasons} == {
        "evaluation.gold", "ppo.rewards"
    }  # fmt: skip
