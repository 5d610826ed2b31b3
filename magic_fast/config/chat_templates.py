"""Chat templates by name, in Jinja, for ``messages`` of ``role`` and ``content``."""

from __future__ import annotations

from typing import Any

_PROMPT = "{% if add_generation_prompt %}"
_CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}" + _PROMPT + "<|im_start|>assistant\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}" + _PROMPT + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% set first = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set first.system = message['content'] ~ '\n\n' %}"
    "{% elif message['role'] == 'user' %}"
    "[INST] {{ first.system }}{{ message['content'] }} [/INST]{% set first.system = '' %}"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
_ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    + _PROMPT
    + "### Response:\n{% endif %}"
)
_EXAONE = (
    "{% for message in messages %}[|{{ message['role'] }}|]{{ message['content'] }}"
    "{% if message['role'] != 'user' %}[|endofturn|]{% endif %}\n{% endfor %}"
    + _PROMPT
    + "[|assistant|]{% endif %}"
)

TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}


def check_template(value: Any) -> str | None:
    """What is wrong with a ``chat_template:``; None where it is fine."""
    if value is None or not isinstance(value, str):
        return None  # the schema says so
    if value == "auto" or value in TEMPLATES or "{{" in value or "{%" in value:
        return None
    return f"expected auto, one of {', '.join(TEMPLATES)}, or a Jinja template, got {value!r}."
