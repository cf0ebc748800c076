"""Configuration: a YAML file and `key.sub=value` overrides become a typed, frozen, strict `Config`.

schema.py defines the keys (with loss.py, lora.py, optim.py and parallel.py), layers.py reads files and overrides,
load.py builds the `Config`, errors.py explains mistakes, help.py prints `--help`.
"""

from rmcore.config.load import config_from_argv, config_from_values, load_config
from rmcore.config.schema import Config, SourceConfig
from rmcore.host.command import UserError

__all__ = ["Config", "SourceConfig", "UserError", "config_from_argv", "config_from_values", "load_config"]
