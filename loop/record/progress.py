"""The progress bar, and the speed of the training."""

import time

from tqdm import tqdm

from data.base.console import is_main_process, say
from data.base.language import tr


class Progress:
    def __init__(self, max_steps: int, step: int):
        self.max_steps = max_steps
        self.bar = tqdm(
            total=max_steps,
            initial=step,
            bar_format="{percentage:3.0f}% {n}/{total} [{elapsed}<{remaining}{postfix}]",  # within 80 columns
            disable=None if is_main_process() else True,
        )
        self.seconds, self.num_tokens, self.num_steps = 0.0, 0, 0  # trained since the last row of train metrics
        self.trained = 0.0  # seconds since the last evaluation
        self.resume()

    def resume(self) -> None:
        """Restarts the clock: the time since the last step is not training time."""
        self.clock = time.perf_counter()

    def stepped(self, num_tokens: int) -> float:
        """The seconds that the step took."""
        self.seconds += (seconds := time.perf_counter() - self.clock)
        self.trained += seconds
        self.num_tokens += num_tokens
        self.num_steps += 1
        self.bar.update()
        self.resume()
        return seconds

    def take_trained(self) -> float:
        """Seconds trained since the last call; if nothing was, those of the evaluation that goes on."""
        trained, self.trained = self.trained, 0.0
        return trained or time.perf_counter() - self.clock

    def take_speed(self) -> dict[str, float]:
        """Over the steps since the last call, evaluations and checkpoints left out."""
        speed = {
            "perf/tokens_per_s": self.num_tokens / self.seconds,
            "perf/step_time_s": self.seconds / self.num_steps,
        }
        self.seconds, self.num_tokens, self.num_steps = 0.0, 0, 0
        return speed

    def show(self, step: int, row: dict) -> None:
        shown = {"loss": f"{row['train/loss']:.4f}", "lr": f"{row['train/learning_rate']:.3g}"}
        shown["tokens_per_s"] = f"{row['perf/tokens_per_s']:,.0f}"
        self.bar.set_postfix(shown)
        if self.bar.disable:  # no terminal: a log file reads lines, not a bar
            shown["eta"] = tqdm.format_interval((self.max_steps - step) * row["perf/step_time_s"])
            listed = ", ".join(f"{name}={text}" for name, text in shown.items())
            say(tr("step {}/{}  {}", step, self.max_steps, listed))
