"""A finished adapter that takes the place of a stage: of another run, or of plain PEFT.

It is checked and written into the run folder, so that later stages, and everything that opens the
run, find it where training would have left it.
"""

import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import LoraSection
from chatllama.config.schema import Config
from chatllama.model.adapters import SavedAdapter, load_adapter, save_adapter
from chatllama.model.fingerprint import check_base, fingerprint, model_fingerprint, model_folder
from chatllama.model.weight_files import merged, open_model
from chatllama.runs.folder import RunFolder, Stage, base_path
from chatllama.runtime.distributed import barrier, rank
from chatllama.runtime.json_files import read_json
from chatllama.text.chat_format import check_contract, describe_contract
from chatllama.text.tokenizer import load_tokenizer
from trainers.stages import stage as stages

ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def take_over(cfg: Config, run: RunFolder, stage: Stage, lock: str | None) -> None:
    """Makes the adapter that the config gives the stage's result, from lock to record.

    Raises:
        ValueError: it is damaged, of the wrong kind, or does not fit backbone, template or `lora`.
    """
    stages.join(cfg, run, stage, lock)
    tokenizer = stages.open_stage(cfg, run, stage)
    if rank() == 0:
        folder = Path({"sft": cfg.sft, "reward": cfg.reward}[stage].adapter or "")
        saved = _checked(cfg, run, tokenizer, stage, folder)
        info = stages.adapter_info(cfg, run, tokenizer, stage) | {"taken_from": str(folder)}
        place = run.sft_adapter if stage == "sft" else run.reward_adapter
        save_adapter(place, saved.state, saved.lora, info, saved.head)
        print(f"{stage}: {folder} takes the place of training: {place}")
    barrier()
    stages.finish(cfg, run, stage, {})


def _checked(
    cfg: Config, run: RunFolder, tokenizer: PreTrainedTokenizerFast, stage: Stage, folder: Path
) -> SavedAdapter:
    """The adapter in `folder`, if the later stages can go on from it."""
    where = f"{stage}.adapter: {folder}"
    if (folder / "lineage.json").is_file():
        raise ValueError(f"{where} is a run folder: give the adapter in it, {folder / stage}/...")
    saved = load_adapter(folder, plain=True)
    if stage == "reward" and saved.head.keys() != {"weight"}:
        raise ValueError(
            f"{where} has no score head without bias, so it is no reward model (in PEFT: task_type "
            "SEQ_CLS with num_labels 1, whose `score` is in modules_to_save)"
        )
    if stage == "sft":
        if saved.head:
            raise ValueError(f"{where} has a score head: it is a reward or value model")
        _check_shape(cfg.adapter_lora, saved.lora, where)
    base = model_folder(cfg.backbone, base_path(cfg, run))
    if base is not None:
        try:
            merged(open_model(base), saved, torch.float32)
        except ValueError as error:
            raise ValueError(f"{where} does not fit {base}: {error}") from error
    if saved.info.get("contract"):
        check_contract(saved.info.get("contract"), tokenizer, cfg.chat, where)
        check_base(cfg, run, saved.info, where)
    else:
        _check_plain(cfg, run, tokenizer, folder, where)
    return saved


def _check_shape(wanted: LoraSection, found: LoraSection, where: str) -> None:
    """Raises ValueError, with the key to write, where `lora` says another shape."""
    targets = [
        ALL_LINEAR if each.target_modules == "all-linear" else set(each.target_modules)
        for each in (wanted, found)
    ]
    if (wanted.r, wanted.alpha) == (found.r, found.alpha) and targets[0] == targets[1]:
        return
    names = (
        "" if targets[1] == ALL_LINEAR else f", target_modules: [{', '.join(sorted(targets[1]))}]"
    )
    raise ValueError(
        f"{where} has another shape than `lora`, which later stages go on with; write lora: "
        f"{{r: {found.r}, alpha: {found.alpha}{names}}}"
    )


def _check_plain(
    cfg: Config, run: RunFolder, tokenizer: PreTrainedTokenizerFast, folder: Path, where: str
) -> None:
    """Compares what plain PEFT says of its base and tokenizer; warns of what it does not say.

    Raises:
        ValueError: the base that it names has other weights, or the tokenizer beside it differs.
    """
    path = base_path(cfg, run)
    named = str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])
    theirs = fingerprint(Path(named)) if Path(named).is_dir() else None
    if theirs is not None and theirs != model_fingerprint(cfg.backbone, path):
        raise ValueError(f"{where} was trained on {named}, which has other weights than {path}")
    unsaid = [] if theirs or named == path else [f"it names the base {named}, and this is {path}"]
    if (folder / "tokenizer_config.json").is_file():
        own = describe_contract(load_tokenizer(folder), cfg.chat)
        here = describe_contract(tokenizer, cfg.chat)
        keys = ("vocabulary_hash", "chat_template_hash", "bos_token_id", "eos_token_id")
        if differing := [key.removesuffix("_hash") for key in keys if own[key] != here[key]]:
            raise ValueError(f"{where} has a tokenizer of another {', '.join(differing)}")
    else:
        unsaid.append("no tokenizer lies beside it")
    if describe_contract(tokenizer, cfg.chat)["template"] != "tokenizer":
        unsaid.append("PEFT does not say whether it was trained under the chat template")
    if unsaid:
        print(
            f"{where}: taken as it is; what cannot be checked: {'; '.join(unsaid)}",
            file=sys.stderr,
            flush=True,
        )
