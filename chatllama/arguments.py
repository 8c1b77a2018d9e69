"""The command line that train_sft.py, train_rm.py and train_ppo.py share.

Imports nothing heavy: `--help` and config errors must come at once.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from chatllama import interruption, run_lock
from chatllama.batching import check_batches
from chatllama.config import Config
from chatllama.config_loader import ConfigError, load_config

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
    """What a training script was asked to do."""

    config: Config
    resume: bool
    lock: str | None
    """Token of the lock of the `chatllama run` that started this stage."""


class _Parser(argparse.ArgumentParser):
    """Tells mistakes once, from rank 0, and ends every rank with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with a message."""
        if _is_rank_zero():
            super().error(message)
        raise SystemExit(2)


def parse_stage_arguments(description: str, argv: Sequence[str] | None = None) -> StageArguments:
    """The checked config and flags of a training script's command line.

    Config errors are printed to stderr, once, and end the process with exit code 2. The number of
    ranks (for the batch arithmetic) is the launcher's WORLD_SIZE, 1 without a launcher.

    Args:
        description: what the script does, for `--help`.
        argv: the arguments after the script's name. None: this process's.
    """
    parser = _Parser(
        description=description,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="settings that replace those of the file",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of this stage",
    )
    parser.add_argument("--run-lock", metavar="TOKEN", help=argparse.SUPPRESS)
    # The deepspeed launcher passes this to every script; the ranks' environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        check_batches(config, int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as error:
        if _is_rank_zero():
            print(error, file=sys.stderr)
        raise SystemExit(2) from error
    return StageArguments(config=config, resume=arguments.resume, lock=arguments.run_lock)


def run_stage(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a mistake of the user's ends it with one message and exit code 2.

    The message comes from the rank that met the mistake, without the traceback that only a
    programmer could use (CHATLLAMA_DEBUG=1 shows it). The launcher then stops the other ranks.
    SIGTERM and SIGUSR1 end it with exit code 75 (`interruption.py`).
    """
    interruption.listen()
    try:
        main()
        return
    except interruption.Interrupted as reason:
        code, message = interruption.EXIT_CODE, str(reason) if _is_rank_zero() else ""
    except (ValueError, OSError) as error:
        if os.environ.get("CHATLLAMA_DEBUG") == "1" or not _is_users(error):
            run_lock.release_all()
            raise
        where = "" if _is_rank_zero() else f" (rank {os.environ['RANK']})"
        script = Path(sys.argv[0]).name
        message = f"{script}{where}: error: {error}\n(CHATLLAMA_DEBUG=1 shows where it happened)"
        code = 2
    sys.stdout.flush()
    print(message, file=sys.stderr, end="\n" if message else "", flush=True)
    run_lock.release_all()
    os._exit(code)  # other ranks may be waiting for us inside a collective


def _is_users(error: ValueError | OSError) -> bool:
    """Whether the user can do something about it: a wrong setting, or a disk."""
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
    return isinstance(error, ValueError) or error.errno in disk


def _is_rank_zero() -> bool:
    # Not `distributed.rank`: that module imports torch.
    return os.environ.get("RANK", "0") == "0"
