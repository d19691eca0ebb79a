"""The templates of the reports, and how figures are written in them."""

import math
import statistics
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from model.export import TEMPLATES as CARDS
from model.export import plain
from tools.reports.record import collapse


def quote(text: str) -> str:
    """Text of a model as a Markdown quotation that shows each of its characters."""
    lines = [plain(line.rstrip()) for line in collapse(text or "-").splitlines()]
    return "\n".join(f"> {line}\\" if line and after else f"> {line}".rstrip()
                     for line, after in zip(lines, [*lines[1:], ""], strict=True))  # fmt: skip


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds as H:MM:SS."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def with_error(value: float, error: float, sign: str = "+") -> str:
    """+0.0196 ± 0.0071; the error only if it is known."""
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if is_number(error) else "")


def spread(values: list[float]) -> str:
    """Mean ± standard deviation of those that are finite; the deviation if there are several."""
    values = [*filter(math.isfinite, values)]
    if not values:
        return "-"
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def is_number(value) -> bool:
    return isinstance(value, float) and math.isfinite(value)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["quote"] = quote
TEMPLATES.filters["duration"] = duration
TEMPLATES.filters |= {"cell": CARDS.filters["cell"], "code": CARDS.filters["code"]}
# A run from before these were measured has none.
TEMPLATES.filters["percent"] = lambda share: f"{100 * share:.1f} %" if is_number(share) else "-"
TEMPLATES.filters["error"] = with_error
TEMPLATES.filters["spread"] = spread
TEMPLATES.filters["loss"] = lambda loss: f"{loss:.4f}" if is_number(loss) else "-"
