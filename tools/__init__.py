"""What people run by hand, beside a training or after it."""

from loop.console import hush_libraries

hush_libraries()
