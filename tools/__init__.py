"""What people run by hand, beside a training or after it."""

from data.base.console import hush_libraries
from loop.start.environment import set_before_torch

hush_libraries()
set_before_torch()
