"""One YAML file is a whole run. `schema` documents every option, `load` checks and loads it.

Importing this package imports neither torch nor trl; `TrainArguments` lives beside the code that needs them.
"""

from __future__ import annotations

from kdtrain.config.arguments import TrainArguments
from kdtrain.config.diagnose import Diagnostic, InvalidConfigError
from kdtrain.config.json_schema import json_schema
from kdtrain.config.load import CheckResult, ConfigLoader, check_config
from kdtrain.config.schema import RunConfig
from kdtrain.errors import ConfigError

__all__ = [
    "CheckResult",
    "ConfigError",
    "ConfigLoader",
    "Diagnostic",
    "InvalidConfigError",
    "RunConfig",
    "TrainArguments",
    "check_config",
    "json_schema",
]
