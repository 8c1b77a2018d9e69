"""The command line and the exit codes that train_sft.py, train_rm.py and train_ppo.py share.

It imports nothing heavy, so that `--help` and config errors answer at once.
"""

import argparse
import errno
import glob
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

from chatllama.config.base import with_folder
from chatllama.config.batch_sizes import check_batches
from chatllama.config.loader import dump_config, load_config
from chatllama.config.model import ChatSection
from chatllama.config.schema import Config
from chatllama.config.stage_checks import check_stages
from chatllama.runs import interruption
from chatllama.runs import lock as run_lock
from chatllama.runs.folder import RunFolder, Stage, check_run_dir
from chatllama.runs.outcome import record_failure
from chatllama.runtime import lent_terminal
from chatllama.runtime.command_line import printable, shown_only
from chatllama.runtime.gpu import let_memory_grow
from chatllama.runtime.waiting import doing
from chatllama.text.tokenizer_files import own_template_exists
from trainers.stages.launcher import SCRIPTS

_EXAMPLES = """\
examples:
  deepspeed %(prog)s configs/quickstart.yaml
  python %(prog)s configs/quickstart.yaml sft.steps=20 lora.r=8     (one process, no launcher)
  deepspeed %(prog)s configs/quickstart.yaml --resume

Values are YAML: lora=null, deepspeed.stage=3, 'sft.data=[{path: mine.jsonl}]'.
Every key with its meaning and default: configs/reference.yaml.
"""


@dataclass(frozen=True)
class StageArguments:
    """The parsed command line of a training script."""

    config: Config
    resume: bool
    lock: str | None
    """Token of the lock of the `chatllama run` that started this stage."""

    @property
    def run(self) -> RunFolder:
        """The run folder of the config."""
        return RunFolder(Path(self.config.run_dir))


WHERE = "\n(CHATLLAMA_DEBUG=1 shows where it happened)"
LOST_RANK_SECONDS = 5.0
"""Wait in which the launcher, which checks every second, can end a rank whose peer is gone."""
LOST_RANK_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class _Parser(argparse.ArgumentParser):
    """Prints errors once per machine and ends every rank with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with a message."""
        if _is_printing_rank():
            super().error(message)
        raise SystemExit(2)


def parse_stage_arguments(description: str, argv: Sequence[str] | None = None) -> StageArguments:
    """The checked config and flags of a training script's command line.

    Config errors are printed to stderr once and end the process with exit code 2. The world size
    for the batch arithmetic is the launcher's WORLD_SIZE, 1 without a launcher.
    """
    let_memory_grow()
    parser = _Parser(
        description=description,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, hidden = parser.add_argument, argparse.SUPPRESS
    add("config", metavar="CONFIG", help="YAML file of the run")
    about = "settings that replace those of the file"
    add("overrides", metavar="section.key=value", nargs="*", help=about)
    about = "go on from the newest checkpoint, with any number of ranks and any ZeRO stage"
    add("--resume", action="store_true", help=about)
    add("--run-lock", metavar="TOKEN", help=hidden)
    # The deepspeed launcher passes this to every script; LOCAL_RANK holds the same number.
    add("--local_rank", "--local-rank", type=int, help=hidden)
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_stage_config(arguments.config, arguments.overrides)
        check_stages(config)
        check_batches(config, int(os.environ.get("WORLD_SIZE", "1")))
        check_run_dir(Path(config.run_dir))
    except ValueError as error:
        if _is_printing_rank():
            print(printable(str(error)), file=sys.stderr)
        raise SystemExit(2) from error
    return StageArguments(config=config, resume=arguments.resume, lock=arguments.run_lock)


def load_stage_config(path: str | Path, overrides: Sequence[str]) -> Config:
    """The config, with absolute paths, and with chat template and its day as the run starts.

    Paths count from the current folder, so that the run can be opened from any other. The
    config.yaml of a run folder belongs to that folder, wherever it has been moved.
    """
    cfg = Config.model_validate(_absolute(load_config(path, overrides).model_dump()))
    own = RunFolder(Path(path).parent)
    given = any(each.startswith("run_dir=") for each in overrides)
    if own.config == Path(path) and own.lineage.is_file() and not given:
        cfg = cfg.model_copy(update={"run_dir": str(own.root)})
    return cfg.model_copy(update={"chat": _settled_chat(cfg)})


def _settled_chat(cfg: Config) -> ChatSection:
    """The section `chat` with `auto` and the template's day as the run folder records them.

    In a new run: the template that the backbone's tokenizer has, else llama2; today.
    """
    recorded = RunFolder(Path(cfg.run_dir)).config
    chat = cfg.chat
    if chat.template != "auto" and (chat.template != "tokenizer" or chat.date is not None):
        return chat
    old = load_config(recorded) if recorded.is_file() else None
    if chat.template == "auto":
        # llama2 was the default before, so a run of it goes on with it.
        kept = old and old.backbone.path == cfg.backbone.path and old.chat.template == "llama2"
        own = not kept and own_template_exists(cfg.backbone)
        chat = chat.model_copy(update={"template": "tokenizer" if own else "llama2"})
    if chat.template == "tokenizer" and chat.date is None:
        known = old is not None and old.chat.template == "tokenizer"
        day = old.chat.date if old and known else date.today().isoformat()
        chat = chat.model_copy(update={"date": day})
    return chat


def record_config(cfg: Config, run: RunFolder) -> None:
    """Writes RUN/config.yaml."""
    dump_config(cfg.model_copy(update={"run_dir": str(run.root.absolute())}), run.config)


def _absolute(tree: Any) -> Any:
    """The values of a config with the paths absolute that name something in the current folder.

    Others are ids of the hub, or samples that come with this package. Functions of a module in the
    current folder get that folder's name.
    """
    if isinstance(tree, list):
        return [_absolute(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    place = glob.escape(str(tree.get("path"))) + ".*" if tree.get("languages") else ""
    made: dict[str, Any] = {}
    for key, value in tree.items():
        made[key] = _absolute(value)
        if not isinstance(value, str):
            continue
        if key in ("function", "gold"):
            made[key] = with_folder(value)
        elif key in ("nvme_path", "adapter_dir") or (
            key in ("path", "adapter", "model") and _is_here(key, value, place)
        ):
            made[key] = str(Path(value).absolute())
    return made


def _is_here(key: str, path: str, pair: str) -> bool:
    """Whether a path names a file or folder, files by a pattern, or those of the pattern `pair`."""
    if not path or Path(path).is_absolute() or (key, path) == ("adapter", "run"):
        return False
    pattern = path if re.search("[*?]", path) else pair
    return Path(path).exists() or (bool(pattern) and any(Path().glob(pattern)))


def run_stage(main: Callable[[], None]) -> None:
    """Runs a script's `main`; the first error of a job is printed and ends all of its ranks.

    An error that the user can correct is one message, without traceback (CHATLLAMA_DEBUG=1 shows
    it), and exit code 2. Under a launcher the rank with the error exits at once, so that the
    launcher stops the others, which may wait for it inside a collective and print nothing.
    Signals end the stage with exit code 75, Ctrl-C with 130 (`interruption.py`). Output that cannot
    be written is dropped.
    """
    interruption.listen()
    lent_terminal.take_terminal()
    lent_terminal.log_apart(None)
    with shown_only("stdout", "stderr"):
        _run_stage(main)
    lent_terminal.give_back()


def _run_stage(main: Callable[[], None]) -> None:
    waits = doing("loading libraries") if _is_printing_rank() else nullcontext()
    try:
        with waits:
            main()
        return
    except interruption.Interrupted as reason:
        # `chatllama run` says it in its own words.
        is_said = _is_printing_rank() and not lent_terminal.is_lent()
        code, message = reason.exit_code, str(reason) if is_said else ""
    except SystemExit as end:
        if end.code:
            _release_other_nodes()
        raise
    except Exception as error:
        code, message = _recorded(error)
    sys.stdout.flush()
    print(printable(message), file=sys.stderr, end="\n" if message else "", flush=True)
    run_lock.release_all()
    if code not in (interruption.EXIT_CODE, interruption.CTRL_C_CODE):
        _release_other_nodes()
    os._exit(code)  # other ranks may wait for this one inside a collective


def _recorded(error: Exception) -> tuple[int, str]:
    """`_failure`, which RUN/<stage>/failed.json keeps too, where this run folder is ours."""
    code, message = 1, f"error: {type(error).__name__}: {error}"
    try:
        code, message = _failure(error)
    finally:
        stage = _stage_of_script()
        if stage is not None and not isinstance(error, run_lock.InUse):
            reason = message.partition("error: ")[2].removesuffix(WHERE)
            with suppress(OSError, SystemExit):  # a full disk; a config that has changed
                record_failure(parse_stage_arguments("").run, stage, reason, code)
    return code, message


def _failure(error: Exception) -> tuple[int, str]:
    """Exit code and message; raises an error of the code itself if there is no launcher."""
    debugging = os.environ.get("CHATLLAMA_DEBUG") == "1"
    if isinstance(error, ValueError | OSError) and _is_correctable(error) and not debugging:
        text = str(error) if isinstance(error, ValueError) else _disk_message(error)
        return 2, _prefixed(f"error: {text}{WHERE}")
    if _is_out_of_memory(error) and not debugging:
        return 2, _prefixed(f"error: {_out_of_memory(error)}")
    if "WORLD_SIZE" not in os.environ:
        run_lock.release_all()
        raise error
    if "EADDRINUSE" in str(error):
        return 2, _prefixed(
            f"error: port {os.environ.get('MASTER_PORT')} is taken by another program. Give "
            "`deepspeed` a free one with --master_port, `chatllama run` with --master-port; "
            "without it `chatllama run` chooses one on a single machine"
        )
    if "Timed out waiting" in str(error):
        from chatllama.runtime.distributed import wait_limit

        return 1, _prefixed(
            f"error: another rank did not answer within {wait_limit().total_seconds() / 60:g} "
            "minutes (deepspeed.timeout_minutes): it hangs, or was stopped. Go on from the newest "
            "checkpoint with --resume"
        )
    if _lost_a_rank(error):
        interruption.restore_default_handlers()
        time.sleep(LOST_RANK_SECONDS)
        return 1, _prefixed(
            f"error: another rank has gone ({str(error).splitlines()[0]}). Its own output says "
            "why, on its own node; without one it was killed, often for lack of memory"
        )
    traceback.print_exc()
    return 1, _prefixed(f"error: {type(error).__name__}: {error}")


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a GPU or of the machine."""
    names = ("OutOfMemoryError", "MemoryError")  # torch's own class without importing torch
    return type(error).__name__ in names or "can't allocate memory" in str(error)


def _out_of_memory(error: Exception) -> str:
    """The message, with the plan of the stage that this script is."""
    from trainers.stages.memory import out_of_memory

    reason = (str(error).strip() or "no more memory").splitlines()[0]
    stage = _stage_of_script()
    return out_of_memory(parse_stage_arguments("").config, stage, reason) if stage else reason


def _stage_of_script() -> Stage | None:
    """The stage whose script this process is."""
    stages: dict[str, Stage] = {script: stage for stage, script in SCRIPTS.items()}
    return stages.get(Path(sys.argv[0]).name)


def _disk_message(error: OSError) -> str:
    """The path that cannot be read or written, the reason and the remedy."""
    place = f"{error.filename}: " if error.filename else ""
    return (
        f"{place}{error.strerror}. Earlier checkpoints are as they were: make room or give the "
        "right to read and write, and go on with --resume"
    )


def _is_correctable(error: ValueError | OSError) -> bool:
    """Whether the user can correct it: a wrong setting, or a disk."""
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
    return isinstance(error, ValueError) or error.errno in disk


def _release_other_nodes() -> None:
    """Joins the process group, so that ranks elsewhere do not wait for one that failed early."""
    if int(os.environ.get("CROSS_SIZE", "1")) > 1:
        from chatllama.runtime.distributed import meet

        meet()


def _lost_a_rank(error: Exception) -> bool:
    """Whether a collective failed because another rank ended."""
    from torch.distributed import DistError

    text = str(error)
    return isinstance(error, DistError) or any(words in text for words in LOST_RANK_WORDS)


def _prefixed(message: str) -> str:
    """The message after script, rank and host; a job of one machine omits rank 0 and host."""
    nodes, rank = os.environ.get("CROSS_SIZE", "1"), os.environ.get("RANK", "0")
    where = "" if (nodes, rank) == ("1", "0") else f" (rank {rank})"
    if nodes != "1":
        where = f" (rank {rank} on {socket.gethostname()})"
    return f"{Path(sys.argv[0]).name}{where}: {message}"


def _is_printing_rank() -> bool:
    """Whether this is rank 0, or with several machines, whose errors may differ, local rank 0."""
    # Not `distributed.rank`: that module imports torch.
    several = os.environ.get("CROSS_SIZE", "1") != "1"
    return os.environ.get("LOCAL_RANK" if several else "RANK", "0") == "0"
