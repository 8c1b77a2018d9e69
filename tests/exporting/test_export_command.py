"""`chatllama export` end to end on a tiny run, and the gate against damaged exports."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from llama_cpp_answers import llama_cpp_text
from openai import OpenAI
from peft import PeftModel
from ppo_runs import VOCABULARY, TinyRun
from safetensors.torch import load_file, save_file
from serving_setup import serving
from tiny_gguf import byte_level_tokenizer
from tiny_models import FORMS, LORA, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from chatllama.config.loader import dump_config
from chatllama.exporting import export as command
from chatllama.exporting import gate
from chatllama.exporting.cli import ExportOptions
from chatllama.exporting.export import export_run, run_gate
from chatllama.exporting.gate import INFO, Refused, check_adapter, check_merged, read_record
from chatllama.generation.sampling import Sampling
from chatllama.importing.gguf_checkpoint import import_gguf
from chatllama.importing.gguf_file import GgufFile
from chatllama.inference.answerer import Answerer
from chatllama.inference.load import load_run
from chatllama.model.adapters import WEIGHTS, load_adapter, save_adapter
from chatllama.model.families import family_of
from chatllama.model.fingerprint import fingerprint
from chatllama.model.weight_files import merged, open_model
from chatllama.runs.folder import RunFolder, write_record
from chatllama.text.detokenizing import stream_text
from chatllama.text.padding import pad_right
from chatllama.text.tokenizer import load_tokenizer
from trainers.stages.lineage import gather

PREFIX = "base_model.model.model.layers"
Q_B = f"{PREFIX}.0.self_attn.q_proj.lora_B.weight"


@dataclass(frozen=True)
class Exported:
    """A run and everything that `export` writes of it."""

    run: RunFolder
    base: str
    out: Path


def in_this_process(arguments: list[str | Path]) -> dict[str, float]:
    """The gate without the seconds that a process takes; raises what it refuses with."""
    paths = [Path(str(a)) for a in arguments if not str(a).startswith("--")]
    if paths[0].suffix == ".gguf":
        return gate.check_gguf(paths[0])
    if (paths[0] / WEIGHTS).is_file():
        return check_adapter(paths[0], str(paths[1]))
    base, adapter = (str(paths[1]), paths[2]) if len(paths) > 1 else (None, None)
    return check_merged(paths[0], base, adapter)


def make_exported(folder: Path, tokenizer: Path, **changes: Any) -> Exported:
    tiny = TinyRun.make(folder, tokenizer, **changes)
    run = RunFolder(tiny.folder)
    cfg = tiny.config(**{k: v for k, v in changes.items() if k not in ("members", "form")})
    dump_config(cfg, run.config)
    sft = load_adapter(run.sft_adapter)
    state = {
        n: t + 0.05 * torch.sin(torch.arange(t.numel())).view_as(t) for n, t in sft.state.items()
    }
    save_adapter(run.policy_adapter, state, LORA, {**sft.info, "stage": "ppo"})
    run.result("sft").write_text('{"steps": 3}')
    record = gather(cfg, run, "sft", {})
    data = {
        str(folder / "secret" / "mine.jsonl"): {"sha256": "5ea" * 21},
        "hub/set": {"sha256": None},
    }
    write_record(run, "sft", record | {"data": data})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_gate", in_this_process)
        options = ExportOptions(merged=True, reward=True, gguf=True)
        return Exported(run, tiny.base, export_run(run.root, options))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Exported:
    """Read it, never write into it."""
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    folder = tmp_path_factory.mktemp("exported")
    return make_exported(folder, tiny_tokenizer_dir, members=2, chat={"template": "llama2"})


pytestmark = pytest.mark.slow


def test_what_is_written(exported: Exported) -> None:
    folders = {path.name for path in exported.out.iterdir()}
    rewards = {"reward", "reward-1", "reward-merged", "reward-merged-1"}
    assert folders == {"adapter", "merged", "gguf"} | rewards
    files = {path.name for path in (exported.out / "adapter").iterdir()}
    card = {"README.md", "chat_template.jinja", INFO}
    words = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    assert files == {WEIGHTS, "adapter_config.json"} | card | words
    home = str(exported.run.root.parent)
    for path in exported.out.rglob("*"):
        if path.is_file():
            assert home.encode() not in path.read_bytes(), path
    config = json.loads((exported.out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base" and config["modules_to_save"] is None
    text = (exported.out / "adapter" / "README.md").read_text()
    assert "[INST] Write a note about the garden. [/INST]" in text
    assert "--max-lora-rank 8 " in text and "logprob difference" in text
    assert "LoRA rank 4, alpha 6" in text
    assert f"- fingerprint of its weights: {fingerprint(Path(exported.base))}\n" in text
    assert "- sft: 3 steps" in text and f"- mine.jsonl: SHA-256 {'5ea' * 21}\n" in text
    assert "hub/set" not in text and f", torch {torch.__version__}, " in text


def test_plain_peft_the_server_chat_and_the_merged_model_say_the_same(exported: Exported) -> None:
    from chatllama.inference.chat_model import ChatModel

    loaded = load_run(exported.run)
    answerer = Answerer(loaded, "policy")
    ends = {"eos_token_id": 2, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 12}
    base = AutoModelForCausalLM.from_pretrained(exported.base)
    peft: Any = PeftModel.from_pretrained(base, str(exported.out / "adapter"))
    bare: Any = AutoModelForCausalLM.from_pretrained(exported.base)
    whole: Any = AutoModelForCausalLM.from_pretrained(exported.out / "merged")
    tokenizer = AutoTokenizer.from_pretrained(exported.out / "merged")
    chat = ChatModel(loaded, Sampling(12, temperature=0.0), torch.Generator())
    said: dict[str, str] = {}
    for question in ("Anna paints", "the river?", "Who is quiet  again"):
        messages: Any = [{"role": "user", "content": question}]
        ids = answerer.render(messages)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        answers = [m.generate(torch.tensor([ids]), **ends)[0, len(ids) :] for m in (peft, whole)]
        assert torch.equal(*answers)
        spoken = "".join(stream_text(loaded.tokenizer, iter(answers[0].tolist())))
        assert "".join(chat.answer(messages, "policy")) == spoken
        said[question] = spoken
        assert not torch.equal(
            bare.generate(torch.tensor([ids]), **ends)[0, len(ids) :], answers[0]
        )
    assert len(set(said.values())) > 1
    with serving(exported.run) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        asking = {"model": "policy", "temperature": 0, "max_tokens": 12}
        for question, spoken in said.items():
            messages = [{"role": "user", "content": question}]
            answer: Any = client.chat.completions.create(messages=messages, **asking)
            assert answer.choices[0].message.content == spoken


def test_merged_tensors_by_hand() -> None:
    from chatllama.config.model import LoraSection
    from chatllama.model.adapters import SavedAdapter
    from chatllama.model.weight_files import ModelFiles

    name = "model.layers.0.mlp.up_proj.weight"
    weights = {name: torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "model.norm.weight": torch.ones(2)}
    files = ModelFiles(
        {n: tuple(t.shape) for n, t in weights.items()},
        dict.fromkeys(weights, torch.float32),
        weights.__getitem__,
    )
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    state = {
        key.format("A"): torch.tensor([[1.0, 0.5]]),
        key.format("B"): torch.tensor([[2.0], [4.0]]),
    }
    # alpha / r = 3: adds 3 * [[2, 1], [4, 2]]
    adapter = SavedAdapter(LoraSection(r=1, alpha=3.0), state, {}, {})
    found = merged(files, adapter, torch.float32)
    assert found.tensor(name).tolist() == [[7.0, 5.0], [15.0, 10.0]]
    assert merged(files, adapter, torch.float16).tensor("model.norm.weight").dtype == torch.float16
    state[key.format("B")] = torch.full((2, 1), 1e5)
    with pytest.raises(ValueError, match=r"too large for torch\.float16: choose another --dtype"):
        merged(files, adapter, torch.float16).tensor(name)
    state[key.format("A")] = torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"of shape \(2, 3\); the base has \(2, 2\)"):
        merged(files, adapter, torch.float32)


def test_half_precision_and_the_base_name(exported: Exported, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command, "run_gate", in_this_process)
    options = ExportOptions(role="sft", merged=True, dtype="bfloat16", base_name="me/base")
    out = export_run(exported.run.root, options, tmp_path / "out")
    assert {t.dtype for t in load_file(out / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"


# --- the gate ------------------------------------------------------------------------------------


def test_a_fresh_process_judges(exported: Exported, tmp_path: Path) -> None:
    numbers = run_gate([exported.out / "adapter", "--base", exported.base])
    assert numbers["logprob_difference"] < 1e-4 and numbers["effect_on_logits"] > 0.1
    folder = shutil.copytree(exported.out / "adapter", tmp_path / "adapter")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the export gate: refused: .*a config\.json"):
        run_gate([folder, "--base", exported.base])


def test_a_refused_export_is_not_published(exported: Exported, tmp_path: Path, monkeypatch) -> None:
    def refuse(arguments: list[str | Path]) -> dict[str, float]:
        raise ValueError("the export gate: no")

    monkeypatch.setattr(command, "run_gate", refuse)
    with pytest.raises(ValueError, match="the export gate: no"):
        export_run(exported.run.root, ExportOptions(), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_export_that_fails_leaves_nothing(
    error: type[BaseException], exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("full disk")

    monkeypatch.setattr(command, "run_gate", in_this_process)
    monkeypatch.setattr(command, "write_model_gguf", fail)
    with pytest.raises(error):
        export_run(exported.run.root, ExportOptions(gguf=True), tmp_path / "out")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["adapter"]


# --- a model like SmolLM2: byte-level, ChatML, BOS and pad are tokens of turns --------------------


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("instruct")
    byte_level_tokenizer(folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        # As the publisher's config.json has it: padding is the end of a turn.
        patch.setattr(LlamaForCausalLM, "save_pretrained", padded_with_eos)
        return make_exported(folder, folder / "tokenizer", chat={"template": "tokenizer"})


def padded_with_eos(model: LlamaForCausalLM, folder: Path) -> None:
    model.config.pad_token_id = 2
    PreTrainedModel.save_pretrained(model, folder)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 2


def test_the_gguf_of_a_byte_level_model(instruct: Exported, tmp_path: Path) -> None:
    file = GgufFile(instruct.out / "gguf" / "model.gguf")
    assert file.text("tokenizer.ggml.pre") == "smollm"
    assert not file.flag("tokenizer.ggml.add_bos_token", True)
    text = (instruct.out / "gguf" / "Modelfile").read_text()
    assert 'TEMPLATE """{{- if .System }}<|im_start|>system' in text and "SYSTEM" not in text
    back = import_gguf(instruct.out / "gguf" / "model.gguf", tmp_path / "back")
    theirs = load_file(instruct.out / "merged" / "model.safetensors")
    found = load_file(back / "model.safetensors")
    assert found.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.items())
    for folder in ("adapter", "merged", "reward"):
        assert "space token" not in (instruct.out / folder / "README.md").read_text()
        record = json.loads((instruct.out / folder / INFO).read_text())["export"]
        assert len(record["conversations"]) == 3


def test_the_snippets_of_the_cards_give_the_runs_scores(instruct: Exported) -> None:
    """On a base whose padding is the end of a turn, in a batch with padding, without one."""
    for name in ("reward", "reward-merged"):
        folder = instruct.out / name
        card, record = (folder / "README.md").read_text(), read_record(folder)
        snippet = card.split("```python\n")[1].split("```")[0]
        snippet = snippet.replace('"base"', repr(instruct.base)).replace("THIS_FOLDER", str(folder))
        names: dict[str, Any] = {}
        exec(snippet, names)
        answered = [pair for pair in zip(record["ids"], record["scores"], strict=True)][1:]
        rows, mask = pad_right([ids for ids, _ in answered], record["pad_token_id"])
        with torch.no_grad():
            found = names["model"].eval()(rows, attention_mask=mask.long()).logits[:, 0]
        assert found.tolist() == pytest.approx([score for _, score in answered], abs=1e-4)
        assert f"Padding is\ntoken {record['pad_token_id']}" in card
    assert LlamaConfig.from_pretrained(instruct.out / "merged").pad_token_id == 0


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "attention_factor": 1.4}
YARN |= {"original_max_position_embeddings": 32}
ROTATED: dict[str, dict[str, Any]] = {
    "llama, yarn": {"rope_parameters": YARN},
    "qwen2, yarn": {"rope_parameters": {**YARN, "factor": 4.0, "attention_factor": None}},
    "llama, dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4}},
}


@pytest.mark.parametrize("form", [*FORMS, *ROTATED])
def test_every_family_is_exported(form: str, tmp_path: Path) -> None:
    """The gate has compared adapters, merged models and GGUF files with what the run computed."""
    byte_level_tokenizer(tmp_path / "tokenizer", "qwen2")
    chat = {"template": "tokenizer"}
    with pytest.MonkeyPatch.context() as patch:
        if form in ROTATED:
            patch.setitem(FORMS, form, ROTATED[form])
        if window := FORMS[form].get("sliding_window"):  # GGUF has none; the gate's texts are short
            patch.setitem(FORMS, form, FORMS[form] | {"sliding_window": 200})
            assert window < 200
        if form.startswith("qwen3, biases"):
            with pytest.raises(ValueError, match="attention_bias, which llama"):
                make_exported(tmp_path / "biased", tmp_path / "tokenizer", form=form, chat=chat)
            patch.setitem(FORMS, form, FORMS[form] | {"attention_bias": False})
        exported = make_exported(tmp_path, tmp_path / "tokenizer", form=form, chat=chat)
    base = AutoModelForCausalLM.from_pretrained(exported.base)
    merged_model = AutoModelForCausalLM.from_pretrained(exported.out / "merged")
    assert type(merged_model) is type(base)
    tuned: Any = PeftModel.from_pretrained(base, str(exported.out / "adapter"))
    rows = torch.arange(3, 253)[None]  # beyond the window
    with torch.no_grad():
        found, expected = merged_model(rows).logits, tuned(rows).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gguf, family = exported.out / "gguf" / "model.gguf", family_of(base.config).gguf
    assert GgufFile(gguf).number(f"{family}.context_length") == (200 if window else 256)
    back = load_file(import_gguf(gguf, tmp_path / "back") / "model.safetensors")
    written = load_file(exported.out / "merged" / "model.safetensors")
    assert back.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in back.items())
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    tokenizer = load_tokenizer(exported.base)
    for ids in ([1, 5, 9, 30], [20, 21, 22], [100, 8, 7, 3, 60], list(range(3, 103))):
        answer = tuned.generate(torch.tensor([ids]), **settings)[0, len(ids) :]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        assert llama_cpp_text(gguf, ids, 12) == text


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_first(
    instruct: Exported, tmp_path: Path
) -> None:
    run = shutil.copytree(instruct.run.root.parent, tmp_path / "copy") / "run"
    file = tmp_path / "copy" / "base" / "tokenizer.json"
    pipeline = json.loads(file.read_text())
    section = {"type": "Split", "pattern": {"String": "§"}, "behavior": "Isolated", "invert": False}
    pipeline["pre_tokenizer"]["pretokenizers"].insert(0, section)
    file.write_text(json.dumps(pipeline))
    lineage = json.loads((run / "lineage.json").read_text())
    for record in lineage.values():  # changed on purpose
        record["base"]["files"].pop("tokenizer.json", None)
    (run / "lineage.json").write_text(json.dumps(lineage))
    config = (run / "config.yaml").read_text().replace(instruct.base, str(file.parent))
    (run / "config.yaml").write_text(config.replace(str(instruct.run.root), str(run)))
    with pytest.raises(ValueError, match="splits text as one of gpt-2, smollm"):
        export_run(run, ExportOptions(merged=True, gguf=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_tensor(name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        del tensors[name]
        if value is not None:
            tensors[name] = value
        save_file(tensors, folder / WEIGHTS)

    return change


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def cut_off(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def scale_up(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({n: t * 1.5 for n, t in tensors.items()}, folder / WEIGHTS)


def edit_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("[INST] ", "[INST]"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty tensor": (change_tensor(Q_B, torch.zeros(0)), f"tensor {Q_B} is empty"),
    "zero tensor": (change_tensor(Q_B, torch.zeros(32, 4)), f"tensor {Q_B} is all zero"),
    "NaN": (change_tensor(Q_B, torch.full((32, 4), torch.nan)), f"tensor {Q_B} holds NaN"),
    "missing tensor": (change_tensor(Q_B, None), "1 complete pairs of tensors for q_proj, exp"),
    "cut off": (cut_off, "damaged or cut off"),
    "other weights": (scale_up, "adapter: changed: log-probabilities differ"),
    "template": (edit_template, "the template gives other token ids"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat_template.jinja"),
    "rank": (change_config(r=1024), "rank 1024: vLLM serves ranks up to 512"),
    "whole modules": (change_config(modules_to_save=["lm_head"]), r"modules_to_save \[.lm_head"),
    "adapted head": (change_config(target_modules=["lm_head"]), "adapts lm_head, which vLLM"),
    "DoRA": (change_config(use_dora=True), "use_dora is True"),
    "rslora": (change_config(use_rslora=True), "use_rslora is True"),
    "absolute path": (change_config(base_model_name_or_path="/x/llama"), "a path of this machine"),
    "a model's config": (lambda f: (f / "config.json").write_text("{}"), "take it for a whole"),
    "no card": (lambda f: (f / "README.md").unlink(), "no README.md: not a complete export"),
    "no record": (lambda f: (f / INFO).unlink(), f"no {INFO}: not a complete export"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_gate_names_the_damage(exported: Exported, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(exported.out / "adapter", tmp_path / "adapter")
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(Refused, match=message):
        check_adapter(folder, exported.base)


@pytest.mark.parametrize("kind", ["weights", "shape"])
def test_the_wrong_base_is_refused(exported: Exported, tmp_path: Path, kind: str) -> None:
    shutil.copytree(exported.base, tmp_path / "base")
    if kind == "weights":
        other = tiny_llama(VOCABULARY)
        other.model.embed_tokens.weight.data.mul_(1.1)
        message = "wrong base: it has the right shape, but other weights"
    else:
        config = LlamaConfig(**{**tiny_llama(VOCABULARY).config.to_dict(), "num_hidden_layers": 3})
        other = LlamaForCausalLM(config)
        message = "is the wrong base: num_hidden_layers 3, trained on 2"
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(Refused, match=message):
        check_adapter(exported.out / "adapter", str(tmp_path / "base"))


def test_a_reward_model_without_its_head_is_refused(exported: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.out / "reward", tmp_path / "reward")
    change_tensor("base_model.model.score.weight", None)(folder)
    with pytest.raises(Refused, match="must come together: a lost head"):
        check_adapter(folder, exported.base)
    changed = load_file(exported.out / "reward" / WEIGHTS)
    head = "base_model.model.score.weight"
    save_file({**changed, head: changed[head] * 1.5}, folder / WEIGHTS)
    with pytest.raises(Refused, match="scores differ by"):
        check_adapter(folder, exported.base)


def test_a_changed_merged_model_is_refused(exported: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.out / "merged", tmp_path / "merged")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name] * 1.2}, folder / "model.safetensors")
    with pytest.raises(Refused, match="changed: log-probabilities differ"):
        check_merged(folder, None, None)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors")
    with pytest.raises(Refused, match=f"{name} is missing from the weights"):
        check_merged(folder, None, None)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(Refused, match="would add the adapter again"):
        check_merged(folder, None, None)


# --- full fine-tuning ----------------------------------------------------------------------------


def test_after_full_fine_tuning_there_is_no_sft_adapter(
    tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_gate", in_this_process)
    tiny = TinyRun.make(tmp_path, tiny_tokenizer_dir, lora=None, chat={"template": "llama2"})
    run = RunFolder(tiny.folder)
    dump_config(tiny.config(lora=None, chat={"template": "llama2"}), run.config)
    shutil.copytree(tiny_tokenizer_dir, run.full_model, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="SFT trained all weights: there is no adapter"):
        export_run(run.root, ExportOptions())
    out = export_run(run.root, ExportOptions(merged=True))
    assert {path.name for path in out.iterdir()} == {"merged"}
    found, expected = open_model(out / "merged"), open_model(run.full_model)
    for name in expected.shapes:
        assert torch.equal(found.tensor(name), expected.tensor(name))


def test_what_a_run_lacks_is_named(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        export_run(tmp_path, ExportOptions())
    with pytest.raises(ValueError, match=r"--role ema: .* has none"):
        export_run(exported.run.root, ExportOptions(role="ema"), tmp_path)


# --- llama.cpp -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_llama_cpp_says_the_same(exported: Exported, tmp_path: Path, lora: bool) -> None:
    """Greedy tokens of the merged file, or of base and adapter file, equal plain PEFT's."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from chatllama.config.model import ChatSection
    from chatllama.exporting.gguf_writer import write_model_gguf
    from chatllama.text.tokenizer import load_tokenizer

    file, options = exported.out / "gguf" / "model.gguf", {}
    if lora:
        file = tmp_path / "base.gguf"
        base_config = cast(LlamaConfig, tiny_llama(VOCABULARY).config)
        tokenizer = load_tokenizer(exported.base)
        files = open_model(Path(exported.base))
        write_model_gguf(file, files, base_config, tokenizer, ChatSection(), "", "base")
        options = {"lora_path": str(exported.out / "gguf" / "adapter.gguf")}
    # Keys and values in float32 (type 0), or near-ties fall otherwise.
    model: Any = llama_cpp.Llama(
        str(file), n_ctx=128, n_threads=1, type_k=0, type_v=0, verbose=False, **options
    )
    peft: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(exported.base), str(exported.out / "adapter")
    )
    tokenizer = AutoTokenizer.from_pretrained(exported.out / "merged")
    for question in ("Anna paints", "the river?", "Who  is quiet"):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=True) == ids
        model.reset()
        found: list[int] = []
        for token in model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if token == 2 or len(found) == 12:
                break
        inputs = torch.tensor([ids])
        expected = peft.generate(
            inputs, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert found == expected[0, len(ids) :].tolist()
    model.close()
