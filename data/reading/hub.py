"""Downloads of datasets and of models: from ModelScope, and from Hugging Face if a name begins with hf: ."""

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from data.base.errors import UserError, one_line

MODELSCOPE, HUGGING_FACE = "ModelScope", "Hugging Face"
LOGIN = {MODELSCOPE: "modelscope login", HUGGING_FACE: "hf auth login"}


class HubId(NamedTuple):
    hub: str
    name: str  # owner/name
    revision: str | None  # a branch, tag or commit; None for the hub's own default


def hub_id(text: str) -> HubId | None:
    """[hf:]owner/name[@revision], or None if it is nothing of the kind."""
    if match := re.fullmatch(r"(hf:)?(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", text):
        return HubId(HUGGING_FACE if match[1] else MODELSCOPE, match[2], match[3])
    return None


def page_of(name: str) -> str:
    """The address of a model's page, for a link; empty if it is on no hub."""
    found = hub_id(name)
    site = {MODELSCOPE: "https://modelscope.cn/models", HUGGING_FACE: "https://huggingface.co"}
    return f"{site[found.hub]}/{found.name}" if found else ""


def download(kind: str, text: str, patterns: list[str]) -> Path:
    """The local folder with the files of a `dataset` or `model`, named as `hub_id` reads it, that match patterns. What
    is there already, whole or in part, is not fetched again.

    Raises UserError within a minute if the hub does not answer.
    """
    found = hub_id(text)
    try:
        return Path((from_hugging_face if found.hub == HUGGING_FACE else from_modelscope)(kind, found, patterns))
    except Exception as error:  # the clients raise many kinds
        reason = one_line(error)[:120]
        raise UserError(
            f"cannot get the {kind} {text} from {found.hub} ({type(error).__name__}: {reason}). Check the name and the "
            f"network (one that is private needs `{LOGIN[found.hub]}`), or give a local copy with --{kind}; without "
            "any download: accelerate launch train.py tiny"
        ) from error


def from_modelscope(kind: str, found: HubId, patterns: list[str]) -> str:
    # Read when modelscope is imported. Its own patience with a hub that never answers is minutes.
    os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS", "10")
    os.environ.setdefault("MODELSCOPE_API_TIMEOUT", "15")
    os.environ.setdefault("MODELSCOPE_API_MAX_RETRIES", "2")
    import modelscope

    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # the one message about a failure is ours
    get = modelscope.dataset_snapshot_download if kind == "dataset" else modelscope.snapshot_download
    return get(found.name, revision=found.revision, allow_patterns=patterns)


def from_hugging_face(kind: str, found: HubId, patterns: list[str]) -> str:
    """HF_ENDPOINT (a mirror), HF_TOKEN, HF_HOME and HF_HUB_OFFLINE act as everywhere."""
    from huggingface_hub import snapshot_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return snapshot_download(found.name, repo_type=kind, revision=found.revision, allow_patterns=patterns)
