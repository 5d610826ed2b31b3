"""Configurations to start from; installed as ``magic_fast.examples``."""
