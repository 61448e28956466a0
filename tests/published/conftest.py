"""Keeps pytest out of this folder: its modules import packages that the tests do not need."""

collect_ignore_glob = ["*"]
