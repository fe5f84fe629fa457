"""A production machine-learning system in parts: events, features, models, serving, monitoring"""

from .documentation import extend_help
from .extras import explain_imports

__version__ = "0.2.0.dev0"

explain_imports()  # a package that is missing is told by the extra that brings it
extend_help()  # `help()` shows the comment of each parameter
