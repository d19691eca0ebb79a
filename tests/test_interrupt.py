"""Which signals ask a run to stop, and which end it at once."""

import os
import signal

import pytest

from loop.interrupt import Interrupt


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_only_the_same_signal_again_ends_the_process_at_once(first, second, monkeypatch, tmp_path):
    """A launcher that a Ctrl+C ends has a SIGTERM sent to the run, however late: its checkpoint is still written."""
    ended = []
    with Interrupt(tmp_path) as interrupt:
        interrupt.signalled_at[first] = 0.0  # asked long ago
        monkeypatch.setattr(os, "kill", lambda pid, number: ended.append(number))
        interrupt.handle(second, None)
        assert interrupt.requested()
    assert ended == ([second] if first == second else [])
