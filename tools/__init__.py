"""What people run by hand, beside a training or after it."""

from loop.console import hush_libraries
from loop.environment import set_before_torch

hush_libraries()
set_before_torch()
