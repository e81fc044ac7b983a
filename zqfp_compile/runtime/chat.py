"""The model's chat template around a prompt, as Hugging Face's tokenizers keep it."""

from __future__ import annotations

import datetime
from typing import Any, NoReturn

from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.output_folder import CHAT_TEMPLATE, TOKENIZER_CONFIG
from zqfp_compile.runtime.folder import ModelFolder


def chat_prompt(folder: ModelFolder, prompt: str) -> str:
    """Return the text that asks the model to answer ``prompt``, special tokens written out.

    The template comes from ``chat_template.jinja`` or ``tokenizer_config.json``. It is a program of whoever
    made the model: it runs in jinja2's sandbox, which keeps it from everything but its own text.

    Raises:
        UsageError: When the model has no template.
        ModelError: When the template fails.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = folder.read_json(TOKENIZER_CONFIG)
    template = _template(folder, config)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            bos_token=_token_text(config.get("bos_token")),
            eos_token=_token_text(config.get("eos_token")),
        )
    except Exception as error:  # a program can raise anything
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{folder.path}: its chat template fails ({reason}); leave --chat out and write the whole prompt"
        ) from error


def _template(folder: ModelFolder, config: dict[str, Any]) -> str:
    text = folder.read_text(CHAT_TEMPLATE)
    if text is not None:
        return text
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise UsageError(
            f"{folder.path}: no chat template; put {CHAT_TEMPLATE} or {TOKENIZER_CONFIG} beside the model "
            "before compiling it, or leave --chat out"
        )
    return template


def _token_text(token: Any) -> str:
    """A token is a text, or an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
