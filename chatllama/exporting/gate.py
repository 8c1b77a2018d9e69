"""The export gate: reopens an export with plain transformers and peft, and refuses what differs.

Runs alone in a fresh process (`python gate.py FOLDER --base BASE`) and imports nothing of this
package, as the programs of others will not. The folder's chatllama.json holds what is expected:
token ids of a few conversations, their log-probabilities, scores.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging

INFO = "chatllama.json"
VLLM_MAX_RANK = 512
SCORE = "base_model.model.score.weight"
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.05}
"""Largest difference of a log-probability, nats, and of a score."""


class Refused(Exception):
    """The folder is not what its record says; the message names what is wrong."""


def read_record(folder: Path) -> dict[str, Any]:
    """The reference outputs beside the export."""
    for name in (INFO, "README.md"):
        if not (folder / name).is_file():
            raise Refused(f"{folder}: no {name}: not a complete export")
    info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    if "export" not in info:
        raise Refused(f"{folder / INFO}: no `export`: an adapter of a run, not yet exported")
    return info["export"]


def check_config(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The adapter's configuration, if PEFT, vLLM and llama.cpp can all read it."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise Refused(f"{folder}: no adapter_config.json")
    if (folder / "config.json").exists():
        raise Refused(f"{folder}: a config.json: transformers would take it for a whole model")
    config = json.loads(path.read_text(encoding="utf-8"))
    off = dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out"), False)
    plain_config = off | {"alpha_pattern": {}, "rank_pattern": {}, "bias": "none"}
    for key, plain in plain_config.items():
        if config.get(key, plain) != plain:
            raise Refused(f"{path}: {key} is {config[key]!r}, which vLLM and llama.cpp do not read")
    kind, rank, heads = config["peft_type"], config["r"], config.get("modules_to_save") or None
    allowed = ["score"] if record["kind"] == "reward" else None
    strange = sorted({m.split(".")[-1] for m in config["target_modules"]} - LAYERS)
    base = str(config["base_model_name_or_path"])
    for wrong, reason in (
        (kind != "LORA", f"peft_type {kind!r} is not LORA"),
        (not 1 <= rank <= VLLM_MAX_RANK, f"rank {rank}: vLLM serves ranks up to {VLLM_MAX_RANK}"),
        (heads != allowed, f"modules_to_save {heads}, expected {allowed}, as vLLM refuses others"),
        (strange, f"adapts {', '.join(strange)}, which vLLM does not for a LLaMA"),
        (Path(base).is_absolute(), f"base_model_name_or_path {base!r}: a path of this machine"),
    ):
        if wrong:
            raise Refused(f"{path}: {reason}")
    return config


def check_tensors(folder: Path, config: dict[str, Any] | None, layers: int) -> None:
    """Checks that every tensor is there, finite and not all zero; `config` is an adapter's."""
    found: dict[str, torch.Size] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            opened = safe_open(file, framework="pt")
        except Exception as error:
            raise Refused(f"{file}: damaged or cut off: {error}") from error
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            tensor = opened.get_tensor(name)
            found[name] = tensor.shape
            if tensor.numel() == 0:
                raise Refused(f"{file}: tensor {name} is empty")
            if not torch.isfinite(tensor).all():
                raise Refused(f"{file}: tensor {name} holds NaN or infinity")
            if not tensor.any() and not name.endswith("bias"):
                raise Refused(f"{file}: tensor {name} is all zero")
    if not found:
        raise Refused(f"{folder}: no weights")
    if config is None:
        return
    if (config.get("modules_to_save") is not None) != (SCORE in found):
        raise Refused(f"{folder}: {SCORE} and modules_to_save must come together: a lost head")
    for target in config["target_modules"]:
        places = {n.rsplit(".lora_", 1)[0] for n in found if f".{target}.lora_" in n}
        expected = layers if "." not in target else 1
        whole = [p for p in places if {f"{p}.lora_{x}.weight" for x in "AB"} <= found.keys()]
        if len(whole) != expected:
            raise Refused(
                f"{folder}: {len(whole)} complete pairs of tensors for {target}, expected "
                f"{expected}: some are missing"
            )


def same_tokens(tokenizer: Any, text: str, ids: list[int]) -> bool:
    """Whether a text has these token ids, but for blanks after them.

    Some chat templates end the last turn with a line break, which no model is trained on.
    """
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found[: len(ids)] == ids and not tokenizer.decode(found[len(ids) :]).strip()


def check_template(folder: Path, tokenizer_folder: str, record: dict[str, Any]) -> None:
    """Checks that the chat template gives the token ids that the model was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    file = folder / "chat_template.jinja"
    if not file.is_file():
        raise Refused(f"{folder}: no chat_template.jinja")
    template = file.read_text(encoding="utf-8")
    for conversation in record["conversations"]:
        messages = conversation["messages"]
        opens = messages[-1]["role"] == "user"
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, chat_template=template, add_generation_prompt=opens
        )
        if not same_tokens(tokenizer, text, conversation["ids"]):
            raise Refused(
                f"{file}: with the tokenizer of {tokenizer_folder} the template gives other "
                f"token ids than the model was trained on: {text!r}"
            )


@torch.no_grad()
def logits_of(model: Any, record: dict[str, Any]) -> list[torch.Tensor]:
    """Logits (T, V) float32 of every conversation."""
    return [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in record["ids"]]


def compare_logprobs(
    logits: list[torch.Tensor], expected: list[list[float]], record: dict[str, Any], blame: str
) -> float:
    """Largest difference of the next tokens' log-probabilities, if it is rounding."""
    worst = 0.0
    for rows, ids, recorded in zip(logits, record["ids"], expected, strict=True):
        found = rows[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        worst = max(worst, float((found - torch.tensor(recorded)).abs().max()))
    if not worst <= TOLERANCE[record["dtype"]]:  # NaN, too
        raise Refused(
            f"{blame}: log-probabilities differ by {worst:.3g} nats from those of the run "
            f"(allowed: {TOLERANCE[record['dtype']]:g})"
        )
    return worst


def load(kind: Any, path: str, record: dict[str, Any], **options: Any) -> Any:
    """A model in the record's type, with nothing missing."""
    model, report = kind.from_pretrained(
        path, dtype=getattr(torch, record["dtype"]), output_loading_info=True, **options
    )
    missing = sorted(report["missing_keys"])
    if missing and not (missing == ["score.weight"] and record["kind"] == "reward"):
        raise Refused(f"{path}: {missing[0]} is missing from the weights")
    return model.eval()


def check_base(base: str, record: dict[str, Any]) -> None:
    """Checks that the base has the shape of the one that the adapter was trained on."""
    config = AutoConfig.from_pretrained(base)
    for key, expected in record["base"].items():
        if getattr(config, key) != expected:
            found = getattr(config, key)
            raise Refused(f"{base} is the wrong base: {key} {found}, trained on {expected}")


def check_adapter(folder: Path, base: str) -> dict[str, float]:
    """Differences of the adapter on its base from what the run computed."""
    record = read_record(folder)
    config = check_config(folder, record)
    check_base(base, record)
    check_tensors(folder, config, record["base"]["num_hidden_layers"])
    check_template(folder, base, record)
    if record["kind"] == "reward":
        return check_reward(folder, base, record)
    model = load(AutoModelForCausalLM, base, record)
    blame = f"{base} is the wrong base: it has the right shape, but other weights"
    own = logits_of(model, record)
    compare_logprobs(own, record["base_logprobs"], record, blame)
    tuned = logits_of(PeftModel.from_pretrained(model, str(folder)), record)
    difference = compare_logprobs(tuned, record["logprobs"], record, f"{folder}: changed")
    effect = max(float((a - b).abs().max()) for a, b in zip(own, tuned, strict=True))
    return {"logprob_difference": difference, "effect_on_logits": effect}


def check_reward(folder: Path, base: str | None, record: dict[str, Any]) -> dict[str, float]:
    """Difference of the scores, with and without padding, from those of the run."""
    pad = {"pad_token_id": record["pad_token_id"]}
    if base is None:
        model = load(AutoModelForSequenceClassification, str(folder), record)
    else:
        plain = load(AutoModelForSequenceClassification, base, record, num_labels=1, **pad)
        model = PeftModel.from_pretrained(plain, str(folder))
    longest = max(map(len, record["ids"]))
    rows = [ids + [record["pad_token_id"]] * (longest - len(ids)) for ids in record["ids"]]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in record["ids"]]
    with torch.no_grad():
        batch = model(torch.tensor(rows), attention_mask=torch.tensor(mask)).logits[:, 0]
        alone = [float(model(torch.tensor([ids])).logits) for ids in record["ids"]]
    expected = torch.tensor(record["scores"])
    worst = max(float((found - expected).abs().max()) for found in (batch, torch.tensor(alone)))
    if not worst <= TOLERANCE[record["dtype"]]:
        raise Refused(
            f"{folder}: scores differ by {worst:.3g} from those of the run (allowed: "
            f"{TOLERANCE[record['dtype']]:g}): wrong base, or a changed adapter or head"
        )
    return {"score_difference": worst}


def check_merged(folder: Path, base: str | None, adapter: Path | None) -> dict[str, float]:
    """Differences of a merged model from the run, and of its logits from base and adapter."""
    record = read_record(folder)
    if (folder / "adapter_config.json").exists():
        raise Refused(f"{folder}: an adapter_config.json: transformers would add the adapter again")
    check_base(str(folder), record)
    check_tensors(folder, None, record["base"]["num_hidden_layers"])
    check_template(folder, str(folder), record)
    if record["kind"] == "reward-merged":
        return check_reward(folder, None, record)
    found = logits_of(load(AutoModelForCausalLM, str(folder), record), record)
    difference = compare_logprobs(found, record["logprobs"], record, f"{folder}: changed")
    numbers = {"logprob_difference": difference}
    if base is not None and adapter is not None:
        model = PeftModel.from_pretrained(load(AutoModelForCausalLM, base, record), str(adapter))
        pairs = list(zip(logits_of(model, record), found, strict=True))
        numbers["logit_difference"] = max(float((a - b).abs().max()) for a, b in pairs)
        numbers["logit_deviation"] = float(torch.cat([a for a, _ in pairs]).std())
    return numbers


def check_gguf(file: Path) -> dict[str, float]:
    """Difference of a GGUF model, read by transformers, from what the run computed."""
    record, options = read_record(file.parent), {"gguf_file": file.name}
    config = AutoConfig.from_pretrained(file.parent, **options)
    for key, value in record["config"].items():  # which transformers does not read from the file
        setattr(config, key, value)
    options |= {"config": config, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    found = logits_of(model.eval(), record)
    difference = compare_logprobs(found, record["logprobs"], record, f"{file}: changed")
    return {"logprob_difference": difference}


def main(argv: list[str] | None = None) -> int:
    """0 with the differences as JSON on stdout; 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(description="checks what `chatllama export` wrote")
    parser.add_argument("folder", type=Path, help="exported folder, or a .gguf file")
    parser.add_argument("--base", help="the base, for an adapter: folder or hub id")
    about = "for a merged model: compare with this on BASE"
    parser.add_argument("--adapter", type=Path, help=about)
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        if folder.suffix == ".gguf":
            numbers = check_gguf(folder)
        elif (folder / "adapter_model.safetensors").is_file():
            if arguments.base is None:
                parser.error("an adapter needs --base")
            numbers = check_adapter(folder, arguments.base)
        else:
            numbers = check_merged(folder, arguments.base, arguments.adapter)
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    print(json.dumps(numbers))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
