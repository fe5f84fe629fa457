"""A production machine-learning system in parts: events, features, models, serving, monitoring"""

from .documentation import extend_help

__version__ = "0.2.0.dev0"

extend_help()  # `help()` shows the comment of each parameter
