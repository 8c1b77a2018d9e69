import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, LORA, REWARD_LORA, ragged_batch, role_model, tiny_llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from chatllama.config.model import LoraSection
from chatllama.model import adapters as adapter_files
from chatllama.model.adapters import WEIGHTS, check_tensors, load_adapter, save_adapter
from chatllama.model.roles import Adapter, Role, RoleModel, acting_as, adapter_state
from chatllama.model.scoring import score_sequences
from chatllama.runs.folder import INFO

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def model() -> RoleModel:
    return role_model(tiny_llama())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(model: RoleModel, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy`, `reward` and `value` adapters; read them, never write into them."""
    folder = tmp_path_factory.mktemp("adapters")
    info = {"base": str(base), "contract": {"hash": "abc"}, "stage": "ppo"}
    save_adapter(folder / "policy", adapter_state(model, "policy"), LORA, info)
    roles: tuple[Role, ...] = ("reward", "value")
    for role in roles:
        head = model.heads[role].state_dict()
        save_adapter(folder / role, adapter_state(model, role), REWARD_LORA, info, head)
    return folder


@pytest.fixture
def policy(written: Path, tmp_path: Path) -> Path:
    """A copy of the policy adapter, to be damaged."""
    return shutil.copytree(written / "policy", tmp_path / "policy")


def small_state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    state = {NAME: torch.ones(2, 3), NAME.replace("lora_A", "lora_B"): torch.ones(3, 2)}
    return {**state, **changes}


def role_scores(model: RoleModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded tokens (id 0 only in padding), their mask, and the reward role's scores."""
    batch = ragged_batch(pad_id=0)
    with torch.no_grad():
        return batch.tokens, batch.mask, score_sequences(model, batch.tokens, batch.mask)


def policy_logits(model: RoleModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), acting_as(model, "policy"):
        return model.llama(input_ids=tokens).logits


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["policy", "reward", "value"])
def test_an_adapter_reads_back_as_it_was(model: RoleModel, written: Path, base: Path, role: Role):
    saved = load_adapter(written / role)
    expected = adapter_state(model, role)
    assert saved.state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved.state[name], tensor)
    section = LORA if role == "policy" else REWARD_LORA
    assert (saved.lora.r, saved.lora.alpha) == (section.r, section.alpha)
    assert saved.info == {"base": str(base), "contract": {"hash": "abc"}, "stage": "ppo"}
    head = {} if role == "policy" else model.heads[role].state_dict()
    assert saved.head.keys() == head.keys()
    assert all(torch.equal(saved.head[name], tensor) for name, tensor in head.items())


def test_a_role_continues_a_saved_adapter(model: RoleModel, written: Path):
    saved = load_adapter(written / "policy")
    again = RoleModel(tiny_llama(), {"policy": Adapter(saved.lora, saved.state)})
    tokens = ragged_batch().tokens
    assert torch.equal(policy_logits(again, tokens), policy_logits(model, tokens))


def test_the_folder_is_an_adapter_and_not_a_model(written: Path):
    names = {path.name for path in (written / "policy").iterdir()}
    assert names == {WEIGHTS, INFO, "adapter_config.json"}
    assert {path.name for path in written.iterdir()} == {"policy", "reward", "value"}


@pytest.mark.parametrize(("role", "saved"), [("policy", None), ("reward", ["score"])])
def test_the_config_says_what_other_programs_need(
    written: Path, base: Path, role: Role, saved: list[str] | None
):
    config = json.loads((written / role / "adapter_config.json").read_text())
    assert config["modules_to_save"] == saved  # vLLM refuses any but score
    assert config["task_type"] == ("CAUSAL_LM" if saved is None else "SEQ_CLS")
    assert config["base_model_name_or_path"] == str(base)
    assert config["use_rslora"] is False and not config["alpha_pattern"]  # llama.cpp ignores them


def test_weights_are_written_as_float32(tmp_path: Path):
    state = {name: tensor.bfloat16() for name, tensor in small_state().items()}
    save_adapter(tmp_path / "a", state, LoraSection(r=2), {"base": "b"})
    assert {t.dtype for t in load_file(tmp_path / "a" / WEIGHTS).values()} == {torch.float32}


def test_target_modules_named_by_layer_survive(tmp_path: Path):
    lora = LoraSection(r=2, target_modules=["layers.1.self_attn.q_proj"])
    model = RoleModel(tiny_llama(), {"policy": Adapter(lora, trainable=True)})
    state = {name: torch.ones_like(t) for name, t in adapter_state(model, "policy").items()}
    assert len(state) == 2
    save_adapter(tmp_path / "a", state, lora, {"base": "b"})
    saved = load_adapter(tmp_path / "a")
    RoleModel(tiny_llama(), {"policy": Adapter(saved.lora, saved.state)})


# --- other programs ------------------------------------------------------------------------------


def test_plain_peft_gives_the_training_models_logits(model: RoleModel, written: Path, base: Path):
    tokens = ragged_batch().tokens
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(written / "policy")
    )
    with torch.no_grad():
        actual = loaded(input_ids=tokens).logits
    assert torch.equal(actual, policy_logits(model, tokens))


def test_a_classification_model_gives_the_same_scores(model: RoleModel, written: Path, base: Path):
    tokens, mask, scores = role_scores(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=0
    )
    loaded = PeftModel.from_pretrained(classifier, str(written / "reward"))
    with torch.no_grad():
        actual = loaded(input_ids=tokens, attention_mask=mask.long()).logits[:, 0]
    torch.testing.assert_close(actual, scores, rtol=0, atol=1e-5)
    assert scores.std() > 0.1


FRESH_PROCESS = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

base, adapters, inputs, outputs = sys.argv[1:]
batch = torch.load(inputs)
policy = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(base), adapters + "/policy"
)
classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
reward = PeftModel.from_pretrained(classifier, adapters + "/reward")
with torch.no_grad():
    logits = policy(input_ids=batch["tokens"]).logits
    scores = reward(input_ids=batch["tokens"], attention_mask=batch["mask"].long()).logits[:, 0]
torch.save({"logits": logits, "scores": scores}, outputs)
assert not [name for name in sys.modules if name.split(".")[0] in ("chatllama", "trainers")]
"""


@pytest.mark.slow
def test_a_fresh_process_without_this_package_agrees(
    model: RoleModel, written: Path, base: Path, tmp_path: Path
):
    tokens, mask, scores = role_scores(model)
    inputs, outputs = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    torch.save({"tokens": tokens, "mask": mask}, inputs)
    command = [sys.executable, "-I", "-c", FRESH_PROCESS, base, written, inputs, outputs]
    done = subprocess.run(
        [str(part) for part in command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(outputs)
    assert torch.equal(result["logits"], policy_logits(model, tokens))
    torch.testing.assert_close(result["scores"], scores, rtol=0, atol=1e-5)


# --- what is refused -----------------------------------------------------------------------------

BAD_TENSORS = {
    "empty": (torch.zeros(0), r"is empty \(not gathered under ZeRO-3\?\)"),
    "zero": (torch.zeros(2, 3), "is all zero: it was never trained"),
    "NaN": (torch.tensor([[1.0, math.nan]]), "holds NaN or infinity"),
    "infinite": (torch.tensor([[1.0, -math.inf]]), "holds NaN or infinity"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_bad_tensor_is_refused_and_the_old_adapter_stays(
    kind: str, model: RoleModel, policy: Path
):
    tensor, message = BAD_TENSORS[kind]
    state = {**adapter_state(model, "policy"), NAME: tensor}
    with pytest.raises(ValueError, match=f"policy: tensor {NAME} {message}"):
        save_adapter(policy, state, LORA, {"base": "b"})
    assert load_adapter(policy).info["contract"] == {"hash": "abc"}


def test_a_head_of_zeros_is_refused_but_that_of_a_critic(tmp_path: Path):
    """A critic begins at 0, and stays there where no answer of a run had a reward."""
    state = {name: torch.zeros_like(tensor) for name, tensor in small_state().items()}
    weight, bias = torch.zeros(1, HIDDEN), torch.zeros(1)
    lora, folder = LoraSection(r=2), tmp_path / "a"
    with pytest.raises(ValueError, match=r"score\.weight is all zero"):
        save_adapter(folder, small_state(), lora, {"base": "b"}, {"weight": weight})
    save_adapter(folder, small_state(), lora, {"base": "b"}, {"weight": weight + 1.0})
    save_adapter(folder, state, lora, {"base": "b"}, {"weight": weight, "bias": bias})
    assert not load_adapter(folder).head["weight"].any()


def test_no_tensors_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="x: the adapter holds no tensors"):
        check_tensors({}, "x")
    with pytest.raises(ValueError, match="holds no tensors"):
        save_adapter(tmp_path / "a", {}, LORA, {"base": "b"})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", [WEIGHTS, INFO, "adapter_config.json"])
def test_a_missing_file_is_named(policy: Path, name: str):
    (policy / name).unlink()
    with pytest.raises(ValueError, match=rf"policy: no {name}; is this an adapter"):
        load_adapter(policy)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=f"nothing: no {WEIGHTS}"):
        load_adapter(tmp_path / "nothing")


@pytest.mark.parametrize("name", [WEIGHTS, INFO, "adapter_config.json"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.98])
def test_a_file_cut_off_is_refused(policy: Path, name: str, part: float):
    content = (policy / name).read_bytes()
    (policy / name).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=r"policy(: |/\w+\.json is )damaged"):
        load_adapter(policy)


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_bad_tensor_on_disk_is_refused(kind: str, policy: Path):
    tensor, message = BAD_TENSORS[kind]
    save_file({**load_file(policy / WEIGHTS), NAME: tensor}, policy / WEIGHTS)
    with pytest.raises(ValueError, match=f"policy: tensor {NAME} {message}"):
        load_adapter(policy)


def test_an_adapter_of_another_backbone_is_refused(policy: Path):
    save_file({**load_file(policy / WEIGHTS), NAME: torch.ones(4, 7)}, policy / WEIGHTS)
    saved = load_adapter(policy)
    with pytest.raises(ValueError, match=rf"{NAME} has shape \(4, 7\), the backbone needs \(4, 32"):
        RoleModel(tiny_llama(), {"policy": Adapter(saved.lora, saved.state)})


def test_an_adapter_config_of_another_kind_is_refused(policy: Path):
    (policy / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(ValueError, match=r"adapter_config\.json: peft_type is 'PROMPT_TUNING'"):
        load_adapter(policy)


# --- interrupted saves ---------------------------------------------------------------------------


def tamper(path: Path) -> None:
    tensors = load_file(path)
    tensors[NAME][0, 0] += 1.0
    save_file(tensors, path)


@pytest.mark.parametrize("moment", ["writing", "config", "reopening", "renaming"])
def test_an_interrupted_save_leaves_the_old_adapter(
    moment: str, model: RoleModel, policy: Path, monkeypatch
):
    write, rename = save_file, Path.rename

    def cut_off(tensors, path, metadata):
        write(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    def altered(tensors, path, metadata):
        write(tensors, path, metadata)
        tamper(path)

    def refuse(*_):
        raise OSError("no space left")

    def refuse_new(self, target):
        if self.name.endswith(".tmp") and not target.name.endswith(".old"):
            raise OSError("no space left")
        return rename(self, target)

    if moment == "writing":
        monkeypatch.setattr(adapter_files, "save_file", cut_off)
    elif moment == "config":
        monkeypatch.setattr(adapter_files, "write_json", refuse)
    elif moment == "reopening":
        monkeypatch.setattr(adapter_files, "save_file", altered)
    else:
        monkeypatch.setattr(Path, "rename", refuse_new)
    state = {name: tensor + 1 for name, tensor in adapter_state(model, "policy").items()}
    with pytest.raises((KeyboardInterrupt, OSError, ValueError)) as caught:
        save_adapter(policy, state, LORA, {"base": "b", "contract": {"hash": "new"}})
    if moment == "reopening":
        assert f"tensor {NAME} did not read back equal" in str(caught.value)
    old = load_adapter(policy)
    assert old.info["contract"] == {"hash": "abc"}
    assert torch.equal(old.state[NAME], adapter_state(model, "policy")[NAME])

    monkeypatch.undo()  # what the interruption left lying about does not matter
    save_adapter(policy, state, LORA, {"base": "b", "contract": {"hash": "new"}})
    assert load_adapter(policy).info["contract"] == {"hash": "new"}
    assert torch.equal(load_adapter(policy).state[NAME], state[NAME])
    assert {path.name for path in policy.parent.iterdir()} == {"policy"}
