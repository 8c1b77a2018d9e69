"""`chatllama push`: an exported folder on the hub. Nothing else here sends anything."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from chatllama.runs.folder import INFO

CARD = "README.md"


def push(folder: Path, repository: str, private: bool) -> str:
    """Uploads every file of an exported folder; returns the address.

    The repository is made if there is none. The token is that of `hf auth login`, or HF_TOKEN.

    Raises:
        ValueError: the folder is no export, or the hub refuses.
    """
    if (folder / "lineage.json").is_file():
        raise ValueError(
            f"{folder} is a run folder: `chatllama export {folder}` first, then push what it "
            f"writes, such as {folder}/export/adapter"
        )
    for name in (INFO, CARD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no folder that `chatllama export` wrote: no {name}")
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="chatllama push")
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{repository}: the hub refuses ({reason}). A token with the right to write comes "
            "from `hf auth login`"
        ) from error
    return str(url)
