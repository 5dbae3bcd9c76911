"""Suites: a backbone, its tasks and their experts, described by one YAML file."""
