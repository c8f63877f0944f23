"""The settings of a run: declared in ``settings``; read, checked and saved by ``config``."""

from utils.config.config import (
    FIELDS,
    SECTION_OF,
    SECTIONS,
    Config,
    ConfigError,
    WithoutEffectError,
    config_from,
    keep_trained,
    load_config,
    make_parser,
    missing_paths,
    to_dict,
)

__all__ = [
    "FIELDS",
    "SECTIONS",
    "SECTION_OF",
    "Config",
    "ConfigError",
    "WithoutEffectError",
    "config_from",
    "keep_trained",
    "load_config",
    "make_parser",
    "missing_paths",
    "to_dict",
]
