"""Downloads from ModelScope, of datasets and of models."""

import logging
import os
import re
from pathlib import Path

from data.base.errors import UserError, one_line


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def download(kind: str, name: str, patterns: list[str]) -> Path:
    """The local folder with the files of a ModelScope `dataset` or `model` that match patterns.

    Raises UserError within a minute if the hub does not answer.
    """
    # Read when modelscope is imported. Its own patience with a hub that never answers is minutes.
    os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS", "10")
    os.environ.setdefault("MODELSCOPE_API_TIMEOUT", "15")
    os.environ.setdefault("MODELSCOPE_API_MAX_RETRIES", "2")
    import modelscope

    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # the one message about a failure is ours
    get = modelscope.dataset_snapshot_download if kind == "dataset" else modelscope.snapshot_download
    try:
        return Path(get(name, allow_patterns=patterns))
    except Exception as error:  # its client raises many kinds
        reason = one_line(error)[:120]
        raise UserError(
            f"cannot get the {kind} {name} from ModelScope ({type(error).__name__}: {reason}). Check the name and "
            f"the network, or give a local copy with --{kind}; without any download: accelerate launch train.py tiny"
        ) from error
