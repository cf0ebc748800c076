"""Configuration: a YAML file and `key.sub=value` overrides -> a typed, frozen, strict `Config`.

The keys stand in schema.py, reading in file.py, the words of `--help` in help.py, those of errors in errors.py.
"""

from rmcore.config.load import config_from_argv, load_config
from rmcore.config.schema import Config, SourceConfig
from rmcore.host.command import UserError

__all__ = ["Config", "SourceConfig", "UserError", "config_from_argv", "load_config"]
