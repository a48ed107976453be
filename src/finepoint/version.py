"""The version of finepoint, alone: whoever writes files names it."""

__version__ = "0.1.0"
