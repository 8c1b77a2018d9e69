"""What can be refused before a process is launched, in one list.

Reads config.json, headers of weight files and names of data files; no weights and no records. What
needs torch, which takes seconds to import, is looked at where nothing else is wrong.
"""

from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from pathlib import Path

from chatllama.config.base import load_function
from chatllama.config.errors import ConfigError
from chatllama.config.loader import load_config
from chatllama.config.nearest import files_like
from chatllama.config.schema import Config
from chatllama.config.sources import DataSource, language_codes
from chatllama.config.stage_checks import check_stages
from chatllama.model.llama_config import check_model_folder, check_trainable, check_weights
from chatllama.reporting.tracker import TRACKERS
from chatllama.runs.folder import STAGES, RunFolder, Stage
from chatllama.runtime.hub import model_folder
from chatllama.runtime.waiting import doing
from data.reading.files import find_aligned, find_files
from trainers.stages.arguments import load_stage_config

Ranks = Callable[[Config], object]
"""Raises ValueError if a config's batches do not divide over the processes of a launch."""
HUB_SECONDS = 10.0


def load_checked_config(
    path: str, overrides: Collection[str], stages: Collection[Stage], ranks: Ranks
) -> Config:
    """`load_stage_config`, and every problem of the stages that have not finished, in one list.

    Args:
        stages: that may run; those that have finished are left out.

    Raises:
        ConfigError: with the problems.
    """
    given = load_config(path, [*overrides])
    try:
        cfg, unsettled = load_stage_config(path, [*overrides]), ""
    except ConfigError:
        raise
    except ValueError as error:  # the backbone has no tokenizer that could be asked
        cfg, unsettled = given, str(error)
    run = RunFolder(Path(cfg.run_dir))
    pending: list[Stage] = [s for s in cfg.stages if s in stages and not run.result(s).is_file()]
    own = Path(path).resolve() == run.config.resolve()  # holds every default
    problems = input_problems(cfg, pending, None if own else given)
    for check in (check_stages, *([ranks] if pending else [])):
        try:
            check(cfg)
        except ConfigError as error:
            problems += error.problems
        except ValueError as error:
            problems.append(str(error))
    if pending and not problems:
        with doing(f"looking at {cfg.backbone.path or 'the backbone'}"):
            problems = model_problems(cfg)
    if problems or unsettled:
        raise ConfigError(path, problems or [unsettled])
    return cfg


def input_problems(cfg: Config, stages: Collection[Stage], given: Config | None) -> list[str]:
    """What the stages need and the config names wrongly, without a look into the model.

    Args:
        given: the config before defaults were written out, to see which lengths were asked for.
    """
    if not stages:
        return []
    problems, positions = _backbone_problems(cfg)
    problems += _package_problems(cfg)
    if cfg.backbone.from_scratch is not None and not RunFolder(Path(cfg.run_dir)).backbone.is_dir():
        problems += _source_problems("backbone.from_scratch.data", cfg.backbone.from_scratch.data)
    problems += _adapter_problems(cfg, stages)
    for stage in STAGES:
        section = {"sft": cfg.sft, "reward": cfg.reward, "ppo": cfg.ppo}[stage]
        if stage in stages and section.data:
            for key in ("data", "eval_data", "decontaminate", "ptx_data"):
                problems += _source_problems(f"{stage}.{key}", vars(section).get(key, []))
            if stage == "ppo":
                problems += _function_problems(cfg)
            if positions is not None:
                problems += _length_problems(cfg, stage, positions, given)
    return problems


def _adapter_problems(cfg: Config, stages: Collection[Stage]) -> Iterator[str]:
    """Finished adapters that the config gives and that are not there."""
    given = {"sft.adapter": cfg.sft.adapter, "reward.adapter": cfg.reward.adapter}
    if "ppo" in stages:
        terms = enumerate(cfg.ppo.rewards)
        given |= {f"ppo.rewards.{i}.adapter": term.adapter for i, term in terms}
    for key, folder in given.items():
        if folder not in (None, "run") and not (Path(folder) / "adapter_config.json").is_file():
            yield f"{key}: {folder} holds no adapter (no adapter_config.json)"


def _backbone_problems(cfg: Config) -> tuple[list[str], int | None]:
    """Problems, and the longest text that the model reads, in tokens, where it is known."""
    section = cfg.backbone
    if section.from_scratch is not None:
        wrong = [FLASH_WITHOUT_MODEL] if section.attn_implementation == "flash_attention_2" else []
        return wrong, section.from_scratch.max_positions
    path = str(section.path)
    try:
        values = check_model_folder(model_folder(path, section.revision, _read_files(cfg)))
        check_trainable(path, values)
        return [], values.get("max_position_embeddings")
    except ValueError as error:
        near = "" if Path(path).exists() else files_like(path)
        return [_with_key(error) + near], None


def model_problems(cfg: Config) -> list[str]:
    """Kernels that do not work here or for this model, and weights that are not its own."""
    section = cfg.backbone
    if section.from_scratch is not None:
        return []
    path, trusted = str(section.path), section.trust_remote_code
    from chatllama.model.backbone import check_kernels, read_config

    try:
        folder = model_folder(path, section.revision, _read_files(cfg))
        config = read_config(path, folder, trusted)
        check_kernels(section, config)
        if Path(path).is_dir() and not trusted:  # own code may have other tensors
            check_weights(config, folder)
    except ValueError as error:
        return [_with_key(error)]
    return []


def _read_files(cfg: Config) -> list[str]:
    """What is fetched of a hub id before anything is launched."""
    return ["config.json", *(["*.py"] if cfg.backbone.trust_remote_code else [])]


def _with_key(error: ValueError) -> str:
    return f"{'' if str(error).startswith('backbone.') else 'backbone.path: '}{error}"


FLASH_WITHOUT_MODEL = (
    "backbone.attn_implementation: flash_attention_2 computes in 16 bits, and a model that is made "
    "from text (backbone.from_scratch) is trained in float32; choose sdpa"
)


def _package_problems(cfg: Config) -> Iterator[str]:
    section = cfg.backbone
    if section.attn_implementation == "flash_attention_2" and find_spec("flash_attn") is None:
        yield (
            "backbone.attn_implementation: flash_attention_2 needs the package flash-attn (CUDA "
            "only), which is not installed; choose sdpa"
        )
    if section.quantization != "none" and find_spec("bitsandbytes") is None:
        yield (
            f"backbone.quantization: {section.quantization} needs the extra: pip install "
            "'chatllama[bitsandbytes]'"
        )
    for name in cfg.tracking.report_to:
        if name not in TRACKERS:
            yield f"tracking.report_to: {name!r} is none of {', '.join(TRACKERS)}"
        elif find_spec(name) is None:
            yield f"tracking.report_to: {name} needs the extra: pip install 'chatllama[{name}]'"


def _function_problems(cfg: Config) -> Iterator[str]:
    terms = ((f"ppo.rewards.{i}.function", term.function) for i, term in enumerate(cfg.ppo.rewards))
    for key, name in (*terms, ("evaluation.gold", cfg.evaluation.gold)):
        try:
            if name is not None:
                load_function(name, key)
        except ValueError as error:
            yield str(error)


def _source_problems(key: str, sources: Collection[DataSource]) -> Iterator[str]:
    for number, source in enumerate(sources):
        place = f"{key}.{number}.path"
        try:
            found = None
            if source.languages is not None:
                found = find_aligned(source.path, language_codes(source.languages))
            if found or find_files(source.path, source.split) is not None:
                continue
        except ValueError as error:
            yield f"{place}: {error}"
            continue
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            HfApi().dataset_info(source.path, timeout=HUB_SECONDS)
        except RepositoryNotFoundError:
            yield (
                f"{place}: no file {source.path!r} here, and no data set of that name on the hub "
                f"(or one that needs `hf auth login`){files_like(source.path)}"
            )
        except Exception:  # no network: the stage finds it in the cache, or says that it is not
            continue


def _length_problems(
    cfg: Config, stage: Stage, positions: int, given: Config | None
) -> Iterator[str]:
    """Lengths beyond what the model can read; a default is lowered by the stage instead."""
    if stage == "ppo":
        prompt, new = cfg.ppo.max_prompt_length, cfg.generation.max_new_tokens
        asked = given is not None and "max_prompt_length" in given.ppo.model_fields_set
        if new >= positions or (asked and prompt + new > positions):
            yield (
                f"ppo.max_prompt_length {prompt} + generation.max_new_tokens {new} are "
                f"{prompt + new} tokens, and the model reads {positions} (max_position_embeddings)"
            )
        return
    section = given and {"sft": given.sft, "reward": given.reward}[stage]
    if section and "max_length" in section.model_fields_set and section.max_length > positions:
        yield (
            f"{stage}.max_length {section.max_length}: the model reads {positions} tokens "
            "(max_position_embeddings)"
        )
