"""Chat templates in small, with what is peculiar in published ones, and tokenizers that know their marks."""

from __future__ import annotations

from typing import Any, NamedTuple

from support import tiny_models


class Dialect(NamedTuple):
    """How a family of models talks."""

    template: str
    special: tuple[str, ...] = ()
    """Marks that are special tokens, which decoding leaves out."""
    added: tuple[str, ...] = ()
    """Marks that are tokens, but stay in the text."""


TURNS = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>"
"""All messages but for what follows."""
END = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"

HERMES = (
    TURNS + "{{ m.content }}" + CALLS + '<tool_call>\n{"name": "{{ f.name }}", "arguments": '
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}}\n</tool_call>{% endfor %}" + END
)
QWEN = (
    TURNS + "{{ m.content }}" + CALLS + "<tool_call>\n<function={{ f.name }}>\n"
    "{% for k, v in f.arguments | items %}<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n"
    "</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}" + END
)
GLM = (
    TURNS + "{{ m.content }}" + CALLS + "<tool_call>{{ f.name }}\n{% for k, v in f.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}"
    "</tool_call>{% endfor %}" + END
)
COMPACT_GLM = (
    GLM.replace("{{ f.name }}\n", "{{ f.name }}")
    .replace("</arg_key>\n", "</arg_key>")
    .replace("</arg_value>\n", "</arg_value>")
)
MINIMAX = (
    TURNS
    + "{{ m.content }}{% if m.tool_calls %}<minimax:tool_call>\n"
    + CALLS
    + '<invoke name="{{ f.name }}">\n{% for k, v in f.arguments.items() %}<parameter name="{{ k }}">'
    "{{ v if v is string else v | tojson }}</parameter>\n{% endfor %}</invoke>\n{% endfor %}"
    "</minimax:tool_call>{% endif %}" + END
)
KIMI = (
    TURNS
    + "{{ m.content }}{% if m.tool_calls %}<|tool_calls_section_begin|>"
    + CALLS
    + "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>"
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}<|tool_call_end|>{% endfor %}"
    "<|tool_calls_section_end|>{% endif %}" + END
)
DEEPSEEK = (  # a content beside calls is a turn of its own, even an empty one; arguments have to be text
    TURNS
    + "{% if m.tool_calls %}<｜tool▁calls▁begin｜>"
    + CALLS
    + "<｜tool▁call▁begin｜>{{ f.name + '<｜tool▁sep｜>' + f.arguments }}<｜tool▁call▁end｜>{% endfor %}"
    "<｜tool▁calls▁end｜></s>{% endif %}"
    "{% if 'content' in m and m.content is not none %}{{ '<again>' if m.tool_calls }}"
    "{{ m.content }}</s>{% endif %}" + END
)
FENCED_DEEPSEEK = DEEPSEEK.replace(
    "{{ f.name + '<｜tool▁sep｜>' + f.arguments }}",
    "{{ c.type }}<｜tool▁sep｜>{{ f.name + '\n```json\n' + f.arguments + '\n```' }}",
)
ARGUMENT = (
    "{% macro said(v) %}{% if v is string %}{{ '<|\"|>' + v + '<|\"|>' }}{% elif v is boolean %}"
    "{{ 'true' if v else 'false' }}{% elif v is mapping %}{{ '{' }}{% for k, p in v | dictsort %}{{ k }}:"
    "{{ said(p) }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}{% elif v is sequence %}["
    "{% for p in v %}{{ said(p) }}{{ ',' if not loop.last }}{% endfor %}]{% else %}{{ v }}{% endif %}"
    "{% endmacro %}"
)
GEMMA_CALLS = (
    CALLS + "<|tool_call>call:{{ f.name }}{{ said(f.arguments) if f.arguments is mapping else "
    "'{' + f.arguments + '}' }}<tool_call|>{% endfor %}"
)
GEMMA_THOUGHT = (
    "{% if m.tool_calls and m.reasoning %}<|channel>thought\n{{ m.reasoning }}<channel|>{% endif %}"
)
GEMMA_TOOLS = (
    "{{ '<|think|>' if enable_thinking | default(false) }}"
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
)
GEMMA_END = (  # a model's turn goes on behind results
    "{% if add_generation_prompt %}{{ '<assistant>' if not ns.open }}"
    "{{ '<|channel>thought\n<channel|>' if not enable_thinking | default(false) }}{% endif %}"
)
GEMMA = (
    ARGUMENT
    + GEMMA_TOOLS
    + "{% set ns = namespace(open=false) %}{% for m in messages %}<{{ m.role }}>"
    + GEMMA_THOUGHT
    + GEMMA_CALLS
    + "{% for r in m.tool_responses or [] %}<|tool_response>response:{{ r.name }}"
    "{value:{{ said(r.response) }}}<tool_response|>{% endfor %}"
    "{% set ns.open = m.tool_responses and not m.content %}"
    "{{ m.content.split('<channel|>')[-1] }}{% endfor %}" + GEMMA_END
)
NEW_GEMMA = (  # which looks for the results behind the message
    ARGUMENT + GEMMA_TOOLS + "{% set ns = namespace(open=false) %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|tool_response>response:{{ m.tool_call_id }}{value:{{ said(m.content) }}}"
    "<tool_response|>{% set ns.open = true %}{% else %}{% set ns.open = false %}<{{ m.role }}>"
    + GEMMA_THOUGHT
    + GEMMA_CALLS
    + "{{ m.content.split('<channel|>')[-1] }}{% endif %}{% endfor %}"
    + GEMMA_END
)
LFM = (
    "{% macro said(v) %}{% if v is string %}'{{ v }}'{% elif v is mapping %}{{ v | tojson }}{% else %}"
    "{{ v | string }}{% endif %}{% endmacro %}"
    + TURNS
    + "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}<|tool_call_start|>["
    + CALLS
    + "{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ said(v) }}{{ ', ' if not loop.last }}"
    "{% endfor %}){{ ', ' if not loop.last }}{% endfor %}]<|tool_call_end|>{% endif %}" + END
)
OLD_LFM = "{{ '<|tool_list_start|>' if tools }}" + TURNS + "{{ m.content }}" + END
OLD_GRANITE = "{# <|tool_call|> #}" + TURNS + "{{ m.content }}" + END
GRANITE = (
    TURNS
    + "{{ m.content }}{% if m.tool_calls %}<|tool_call|>["
    + CALLS
    + "{{ f | tojson }}{{ ', ' if not loop.last }}{% endfor %}]{% endif %}"
    + END
)
IDS = "{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs should be 9 characters') }}{% endif %}"
MISTRAL = (
    TURNS
    + "{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS] ["
    + CALLS
    + IDS
    + """{{ (f | tojson)[:-1] }}, "id": "{{ c.id }}"}{{ ', ' if not loop.last }}{% endfor %}]{% endif %}"""
    "{% if m.role == 'tool' %}{{ m.tool_call_id[8] }}{% endif %}" + END
)
NEW_MISTRAL = (
    TURNS + "{{ m.content }}" + CALLS + IDS + "[TOOL_CALLS]{{ f.name }}[ARGS]"
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}{% endfor %}" + END
)
MISTRAL_4 = (  # which says far in front whether to think, and takes no other effort
    "{% set effort = reasoning_effort if reasoning_effort is defined and reasoning_effort else 'none' %}"
    "{% if effort not in ['none', 'high'] %}{{ raise_exception('must be none or high') }}{% endif %}"
    """[MODEL_SETTINGS]{"reasoning_effort": "{{ effort }}"}[/MODEL_SETTINGS]"""
    + NEW_MISTRAL.replace(
        "{{ m.content }}",
        "{{ '[THINK]' + m.reasoning_content + '[/THINK]' if m.reasoning_content }}{{ m.content }}",
    )
)
HARMONY = (  # as strict as the published one, and with its notions of what is a thought
    "<|start|>system<|message|>Valid channels: analysis, commentary, final.<|end|>"
    "{% for t in tools or [] %}{{ '// ' + t.function.description }} type {{ t.function.name }}"
    "{{ t.function.parameters.properties | length }};{% endfor %}{% set ns = namespace(name=none) %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if '<|channel|>final<|message|>' in m.content %}{{ raise_exception('channel tags') }}{% endif %}"
    "{% if 'tool_calls' in m %}{% if m.content and m.thinking %}{{ raise_exception('both') }}{% endif %}"
    "{% if m.thinking or m.content %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking or m.content }}<|end|>{% endif %}{% set f = m.tool_calls[0].function %}"
    "<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>"
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}<|call|>{% set ns.name = f.name %}"
    "{% else %}<|start|>assistant<|channel|>{{ 'analysis' if 'thinking' in m else 'final' }}<|message|>"
    "{{ m.content }}<|end|>{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>{{ 'functions.' + ns.name }} to=assistant<|channel|>commentary"
    "<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>"
    "{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
DSML = (  # as published for V3.2, but as a template
    TURNS
    + "{{ m.content }}{{ '\n\n<｜DSML｜function_calls>\n' if m.tool_calls }}"
    + CALLS
    + """{{ '<｜DSML｜invoke name="' + f.name + '">\n' }}{% for k, v in f.arguments.items() %}"""
    """<｜DSML｜parameter name="{{ k }}" string="{{ 'true' if v is string else 'false' }}">"""
    "{{ v if v is string else v | tojson }}{{ '</｜DSML｜parameter>\n' }}{% endfor %}"
    "{{ '</｜DSML｜invoke>\n' }}{% endfor %}{{ '</｜DSML｜function_calls>' if m.tool_calls }}" + END
)
LLAMA = "{# <|header_start|> #}" + TURNS + "{{ m.content }}"
LLAMA_JSON = (
    LLAMA + CALLS + '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}{% endfor %}' + END
)
LLAMA_PYTHON = (  # whose template has no way to write a number, or a quote within a string
    "{# Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)] #}"
    + LLAMA
    + "{{ '[' if m.tool_calls }}"
    + CALLS
    + """{{ f.name }}({% for k in f.arguments %}{{ k }}="{{ f.arguments[k] }}"{{ ', ' if not loop.last }}"""
    "{% endfor %}){{ ', ' if not loop.last }}{% endfor %}{{ ']' if m.tool_calls }}" + END
)

_TOOL_CALL = ("<tool_call>", "</tool_call>")
_GLM = (*_TOOL_CALL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_DEEPSEEK = tuple(
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
)
_GEMMA = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")
_LFM = ("<|tool_call_start|>", "<|tool_call_end|>")
DIALECTS = {
    "hermes": Dialect(HERMES, added=_TOOL_CALL),
    "qwen": Dialect(QWEN, added=_TOOL_CALL),
    "glm": Dialect(GLM, added=_GLM),
    "compact glm": Dialect(COMPACT_GLM, special=_GLM),
    "deepseek": Dialect(DEEPSEEK, special=_DEEPSEEK),
    "fenced deepseek": Dialect(FENCED_DEEPSEEK, added=_DEEPSEEK),
    "mistral": Dialect(MISTRAL, special=("[TOOL_CALLS]",)),
    "new mistral": Dialect(NEW_MISTRAL, special=("[TOOL_CALLS]", "[ARGS]")),
    "mistral 4": Dialect(MISTRAL_4, special=("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")),
    "dsml": Dialect(DSML, special=("｜DSML｜",)),
    "dsml v4": Dialect(DSML.replace("function_calls", "tool_calls"), added=("｜DSML｜",)),
    "minimax": Dialect(MINIMAX, added=("<minimax:tool_call>", "</minimax:tool_call>")),
    "kimi": Dialect(
        KIMI,
        special=(
            *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
            *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ),
    ),
    "gemma": Dialect(GEMMA, special=_GEMMA),
    "new gemma": Dialect(NEW_GEMMA, special=_GEMMA),
    "lfm": Dialect(LFM, special=_LFM),
    "old lfm": Dialect(OLD_LFM, special=_LFM),
    "old granite": Dialect(OLD_GRANITE, special=("<|tool_call|>",)),
    "granite": Dialect(GRANITE, special=("<|tool_call|>",)),
    "harmony": Dialect(
        HARMONY,
        special=tuple(
            f"<|{name}|>" for name in ("start", "end", "message", "channel", "constrain", "return", "call")
        ),
    ),
}


LLAMAS = {
    "llama json": Dialect(LLAMA_JSON, special=("<|python_start|>", "<|python_end|>")),
    "llama python": Dialect(LLAMA_PYTHON, special=("<|python_start|>", "<|python_end|>")),
}
"""Whose calls have no marks around them."""

THINKING = Dialect(
    HERMES.replace("<assistant>", "<assistant>{{ '<think>\n' if enable_thinking | default(true) else '' }}")
)
"""Whose prompts begin a thought, unless that is turned off."""
HYBRID = Dialect(
    HERMES.replace(
        "{{ m.content }}",
        "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' if m.reasoning_content }}{{ m.content }}",
    ).replace(
        "<assistant>",
        "<assistant>{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking }}",
    ),
    added=(*_TOOL_CALL, "<think>", "</think>"),
)
"""Whose models begin thoughts themselves, as Qwen3 does; with thoughts off, the prompt has an empty one."""


def tokenizer_of(dialect: Dialect) -> Any:
    """The tiny tokenizer with the template, and the marks as tokens; not larger than the tiny models'."""
    return tiny_models.tiny_tokenizer(dialect.special, dialect.added, dialect.template)
