"""Files of a run and of its base, compared with the hashes that lineage.json holds.

Adapters are read whole every time. A base is read whole where a stage begins; otherwise large files
that are as they were are known from the cache of `runtime/digests.py`. `trainers/stages/lineage.py`
writes the records.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chatllama.config.schema import Config
from chatllama.model.fingerprint import fingerprint, folder_hash, model_folder
from chatllama.runs.folder import STAGES, RunFolder, Stage, backbone_path, read_lineage
from chatllama.runtime.digests import file_hashes

BASE_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "*.jinja",
    "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
"""Names of the files of a base that are read."""
_HUB_BLOB = re.compile("[0-9a-f]{64}")


def output_files(run: RunFolder, folders: Iterable[str]) -> dict[str, str]:
    """Path below the run -> SHA-256 of every file in the folders of a stage's results."""
    places = [path for name in folders for path in (run.root / name).glob("*") if path.is_file()]
    hashes = file_hashes(sorted(places))
    return {path.relative_to(run.root).as_posix(): sha for path, sha in hashes.items()}


def check_outputs(
    run: RunFolder,
    stages: Iterable[Stage] = STAGES,
    below: str = "",
    *,
    fresh: bool = True,
    complete: bool = True,
) -> None:
    """Compares the results of stages with what lineage.json says they wrote.

    Args:
        below: only of this folder, as a path below the run; empty: of all.
        fresh: as in `file_hashes`.
        complete: a missing file is an error, too.

    Raises:
        ValueError: one is another: names the file, or with records of older versions the folder.
    """
    records = read_lineage(run)
    for stage in stages:
        record = records.get(stage, {})
        expected: dict[str, str | None] = record.get("files") or record.get("outputs") or {}
        expected = {
            n: sha for n, sha in expected.items() if not below or f"{n}/".startswith(f"{below}/")
        }
        found = _hashes_of(run, expected, fresh)
        for name, sha in expected.items():
            if found[name] == sha or (found[name] is None and not complete):
                continue
            what = "is not what the stage wrote" if found[name] else "is missing"
            raise ValueError(
                f"{run.root / name} {what}: it was changed or damaged since {record['finished']}. "
                f"Copy it again from where it is whole, or let `chatllama run --from {stage}` make "
                "it again; if you replaced it on purpose, remove its entry from lineage.json"
            )


def _hashes_of(run: RunFolder, names: Iterable[str], fresh: bool) -> dict[str, str | None]:
    """Path below the run -> hash of the file or folder there; None: not there."""
    places = {name: run.root / name for name in names}
    hashes = file_hashes([path for path in places.values() if path.is_file()], fresh)
    return {name: hashes.get(path) or folder_hash(path) for name, path in places.items()}


def check_adapter(folder: Path) -> None:
    """Raises ValueError if a run wrote the adapter `folder` and it is not as it was written.

    One that lies elsewhere than in RUN/<stage>/ cannot be compared.
    """
    place = folder.absolute()
    if len(place.parents) > 1 and place.parent.name in STAGES:
        run = RunFolder(place.parents[1])
        name = place.relative_to(run.root).as_posix()
        check_outputs(run, [place.parent.name], name)


def base_record(cfg: Config, run: RunFolder, fresh: bool = False) -> dict[str, Any]:
    """Path, fingerprint and SHA-256 of the files of the original backbone, as lineage.json has it.

    `files` is empty where a hub model has not been downloaded yet; `commit` is the hub's.

    Raises:
        ValueError: a file in the hub's cache is damaged.
    """
    path = backbone_path(cfg.backbone, run)
    folder = model_folder(cfg.backbone, path)
    record: dict[str, Any] = {"path": path, "fingerprint": None, "files": {}}
    if folder is None:
        return record
    places = sorted({file for pattern in BASE_FILES for file in folder.glob(pattern)})
    hashes = file_hashes([file for file in places if file.is_file()], fresh)
    for file, sha in hashes.items():
        blob = file.resolve()  # the hub names a large file after its hash
        if _HUB_BLOB.fullmatch(blob.name) and blob.name != sha:
            raise ValueError(
                f"{file} is damaged: it is not the file that the hub has under its name. Remove "
                f"{blob} to download it again"
            )
    record["fingerprint"] = fingerprint(folder)
    record["files"] = {file.name: sha for file, sha in hashes.items()}
    if folder.parent.name == "snapshots":
        record["commit"] = folder.name
    return record


def check_base_files(
    run: RunFolder, now: Mapping[str, Any], stages: Iterable[Stage] = STAGES
) -> None:
    """Compares the base with the one that stages were trained on.

    A base with another fingerprint is another one (`fingerprint.py::check_base`), and files that
    only one of the two has are not compared: the same weights may lie in other files.

    Args:
        now: `base_record` of the base.

    Raises:
        ValueError: a file is another: names it.
    """
    records = read_lineage(run)
    for stage in stages:
        before = records.get(stage, {}).get("base", {})
        if before.get("fingerprint") != now["fingerprint"]:
            continue
        for name, sha in before.get("files", {}).items():
            if now["files"].get(name, sha) == sha:
                continue
            commit = before.get("commit")
            pin = f" (or set backbone.revision to {commit})" if commit else ""
            raise ValueError(
                f"{now['path']}: {name} is not the file that stage {stage} was trained on: it was "
                f"changed or damaged since {records[stage]['begun']}. Copy it again{pin}, or train "
                "anew with `chatllama run --from sft`; if you changed it on purpose, remove its "
                f"entry from {run.lineage}"
            )


def tell_unknown(run: RunFolder, stages: Iterable[Stage] = STAGES) -> None:
    """Prints a line to stderr where an older version made the stages' results."""
    records = read_lineage(run)
    if not all(
        records.get(stage, {}).get("files") for stage in stages if run.stage(stage).is_dir()
    ):
        print(
            f"{run.lineage} does not hold the hashes of all results, as an older version made "
            "some: damage to them or to the base may go unnoticed",
            file=sys.stderr,
        )


def check_opened(cfg: Config, run: RunFolder) -> bool:
    """Compares the base of a run that is opened; False where it has not been downloaded yet.

    The adapters are compared when they are read.

    Raises:
        ValueError: a file is another: names it.
    """
    if cfg.lora is None:
        check_outputs(run, ["sft"], "sft/model", fresh=False)
        return True
    now = base_record(cfg, run)
    check_base_files(run, now)
    return bool(now["files"])
