"""Configuration: a YAML file and `key.sub=value` overrides become a typed, frozen, strict `Config`.

schema.py (with loss.py and lora.py) defines the keys, layers.py reads files and overrides, load.py puts them together,
errors.py explains mistakes, help.py prints `--help`.
"""

from rmcore.config.load import config_from_argv, config_from_values, load_config
from rmcore.config.schema import Config, SourceConfig
from rmcore.host.command import UserError

__all__ = ["Config", "SourceConfig", "UserError", "config_from_argv", "config_from_values", "load_config"]
