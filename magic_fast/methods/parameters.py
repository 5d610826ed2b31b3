"""temporary: the table moves here."""
from magic_fast.config.parameters import METHODS, MethodSpec, ParameterSpec  # noqa: F401
