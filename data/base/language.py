"""What a person reads, in the language of the run: English in the code, Chinese in zh.yaml."""

import functools
from pathlib import Path

import yaml

SPOKEN = {"language": "en"}


def speak(language: str) -> None:
    """zh or en, for the messages of this process."""
    SPOKEN["language"] = language


@functools.cache
def chinese() -> dict[str, str]:
    return yaml.safe_load(Path(__file__).with_name("zh.yaml").read_text(encoding="utf-8"))


def tr(text: str, *values) -> str:
    """text with values in the place of {}, in Chinese if that is spoken and known."""
    text = chinese().get(text, text) if SPOKEN["language"] == "zh" else text
    return text.format(*values)
