"""Options in YAML files, which may come from anybody: read within limits and checked one by one."""

from .checked_yaml import read

__all__ = ["read"]
