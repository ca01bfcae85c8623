"""The conversation templates of MGM's language models: what the original's `conversation.py` says, as data and as
Jinja.

`TEMPLATES` is for training (prompts and loss masks, see `conversation.py`), `CHAT_TEMPLATES` for processors and
tokenizers. Both give the same prompt, except that a chat template writes the BOS token that a tokenizer adds by itself.
In the Jinja, a turn's images come first, one `<image>` and a newline each, as in the original's training data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Template:
    """One conversation format.

    Attributes:
        style: how turns and loss masks are laid out: gemma, two, llama_2, llama_3, chatml or plain.
        user, assistant: what introduces a turn.
        system: the system text, with its markup.
        end: what closes a turn (`llama_2`, `two`, `gemma`: an answer).
        bos: whether tokenizers of these models put BOS in front.
    """

    style: str
    user: str
    assistant: str
    system: str
    end: str
    bos: bool = True


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_HEADER_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
# Not a slip of ours: the original trained its Llama-3 models with the system role in front of answers.
_HEADER_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"

TEMPLATES = {
    "gemma": Template("gemma", "<start_of_turn>user\n", "<start_of_turn>model\n", "", "<eos>"),
    "vicuna_v1": Template("two", "USER", "ASSISTANT", _VICUNA_SYSTEM, "</s>"),
    "llama_3": Template("llama_3", _HEADER_USER, _HEADER_SYSTEM, _HEADER_SYSTEM + _LLAMA_3_SYSTEM, "<|eot_id|>"),
    "mistral_instruct": Template("llama_2", "[INST] ", " [/INST]", "", "</s>"),
    "chatml_direct": Template(
        "chatml",
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
        "<|im_start|>system\nAnswer the questions.",
        "<|im_end|>",
        bos=False,
    ),
    "plain": Template("plain", "", "", "", "\n"),
}
# The original's other names for these, as its scripts use them.
ALIASES = {"v1": "vicuna_v1", "default": "vicuna_v1", "mistral_direct": "chatml_direct", "v0_plain": "plain"}

ALIGNMENT = {
    "gemma": "gemma",
    "llama_3": "llama_3",
    "vicuna_v1": "plain",
    "mistral_instruct": "plain",
    "chatml_direct": "plain",
}
"""The template that the original aligns a language model with, by the one it then instructs it with: `--version` of the
two trainings in scripts/{gemma,llama3,llama,mixtral,yi}/train/stage_1_2_*.sh."""


def get_template(name: str) -> Template:
    """A template by its name or one of the original's aliases."""
    try:
        return TEMPLATES[ALIASES.get(name, name)]
    except KeyError:
        raise ValueError(f"no conversation template {name!r}; there are {', '.join(sorted(TEMPLATES))}") from None


_IMAGES_FIRST = (
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
)
_IN_ORDER = (
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- else -%}{{- ('\\n' if loop.previtem is defined and loop.previtem['type'] == 'text' else '') + '<image>\\n' -}}"
    "{%- endif -%}{%- endfor -%}"
)
_CHAT = (
    # One message: images, then text. `content` may also be a plain string.
    "{%- macro render(message) -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    f"{_IMAGES_FIRST}"
    "{%- endif -%}{%- endmacro -%}"
    "{{- BOS -}}"
    "{%- set system = render(messages[0]) if messages[0]['role'] == 'system' else '' -%}"
    "{{- SYSTEM -}}"
    "{%- for message in messages if message['role'] != 'system' -%}"
    "{%- set text = render(message) -%}"
    "{%- if message['role'] == 'assistant' -%}"
    # What counts as generated (`return_assistant_tokens_mask`): the answer and what closes it, not its introduction.
    "{{- ASSISTANT -}}{%- generation -%}{{- text + END -}}{%- endgeneration -%}"
    "{%- else -%}{{- USER -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- PROMPT -}}{%- endif -%}"
)


def in_order(chat_template: str) -> str:
    """The chat template with a turn's images where they stand among its texts, each on a line of its own, not in front
    of them; another's template is what it was.
    """
    return chat_template.replace(_IMAGES_FIRST, _IN_ORDER)


def _quote(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _chat(system: str, user: str, assistant: str, end: str, prompt: str, bos: str = "bos_token") -> str:
    """A chat template from Jinja expressions in `system` and `user`, and plain strings in the other arguments."""
    parts = {"BOS": bos, "SYSTEM": system, "USER": user}
    parts |= {"ASSISTANT": _quote(assistant), "END": _quote(end), "PROMPT": _quote(prompt)}
    template = _CHAT
    for name, expression in parts.items():
        template = template.replace(f"- {name} -", f"- {expression} -").replace(f"+ {name} -", f"+ {expression} -")
    return template


def _headed(template: Template, system_head: str) -> str:
    """Formats whose every turn is a header, the text and `end`."""
    default = template.system.removeprefix(system_head)
    return _chat(
        system=f"{_quote(system_head)} + (system or {_quote(default)}) + {_quote(template.end)}",
        user=f"{_quote(template.user)} + text + {_quote(template.end)}",
        assistant=template.assistant,
        end=template.end,
        prompt=template.assistant,
        bos="bos_token" if template.bos else "''",
    )


CHAT_TEMPLATES = {
    "gemma": _chat(
        # Gemma has no system turn: a system message is said by the user.
        system="('<start_of_turn>user\\n' + system + '<end_of_turn>\\n') if system else ''",
        user="'<start_of_turn>user\\n' + text + '<end_of_turn>\\n'",
        assistant="<start_of_turn>model\n",
        end="<end_of_turn>\n<eos>",
        prompt="<start_of_turn>model\n",
    ),
    "vicuna_v1": _chat(
        system=f"(system or {_quote(_VICUNA_SYSTEM)}) + ' '",
        user="'USER: ' + text + ' '",
        assistant="ASSISTANT: ",
        end="</s>",
        prompt="ASSISTANT:",
    ),
    "llama_3": _headed(TEMPLATES["llama_3"], _HEADER_SYSTEM),
    "mistral_instruct": _chat(
        # Neither has Mistral: a system message opens the first instruction.
        system="''",
        user="('<s>' if not loop.first else '') + '[INST] '"
        " + ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '') + text + ' [/INST]'",
        assistant=" ",
        end=" </s>",
        prompt="",
    ),
    "chatml_direct": _headed(TEMPLATES["chatml_direct"], "<|im_start|>system\n"),
    "plain": _chat(
        # The alignment stage: an image and its caption, nothing else.
        system="''",
        user="text.replace('<image>\\n', '<image>')",
        assistant="",
        end="\n",
        prompt="",
    ),
}


def template_for(text_config: Any, vocabulary: dict[str, int]) -> str:
    """The name of the template that the original trains and evaluates this language model with.

    Args:
        text_config: the language model's configuration.
        vocabulary: token -> id.
    """
    if text_config.model_type == "gemma":
        return "gemma"
    if text_config.model_type in ("mistral", "mixtral"):
        return "mistral_instruct"
    if "<|eot_id|>" in vocabulary:
        return "llama_3"
    return "chatml_direct" if "<|im_start|>" in vocabulary else "vicuna_v1"
