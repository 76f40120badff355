"""Chat templates that write chats as those of model families do, without their tools."""

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

FAMILY_TEMPLATES = {
    # A system text of its own where none is given.
    "qwen-2.5": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful."
    "<|im_end|>\n' }}{% endif %}" + TURNS,
    # Thoughts of earlier turns are left out.
    "qwen-3": """{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}
{{- '<|im_start|>assistant\n' + said + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{%- endif %}""",
    # The system's part is always there, with the day in it.
    "llama-3.1": """{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set system, turns = messages[0].content | trim, messages[1:] %}
{%- else %}{%- set system, turns = '', messages %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') }}
{{- '\n\n' + system + '<|eot_id|>' }}
{%- for m in turns %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}""",
    "llama-2": """{%- if messages[0].role == 'system' %}
{%- set system, turns = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n', messages[1:] %}
{%- else %}{%- set system, turns = '', messages %}{%- endif %}
{%- for m in turns %}
{%- if m.role == 'user' %}
{{- bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + m.content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}""",
    # A system text is refused.
    "gemma-2": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    # It stands before the first user's.
    "gemma-3": """{{ bos_token }}
{%- if messages[0].role == 'system' %}
{%- set before, turns = messages[0].content + '\n\n', messages[1:] %}
{%- else %}{%- set before, turns = '', messages %}{%- endif %}
{%- for m in turns %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\n' + (before if loop.first else '') + m.content | trim }}
{{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}""",
    # It stands before the last user's.
    "mistral": """{%- if messages[0].role == 'system' %}
{%- set system, turns = messages[0].content + '\n\n', messages[1:] %}
{%- else %}{%- set system, turns = '', messages %}{%- endif %}
{{- bos_token }}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('turns') }}{%- endif %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}""",
    "phi-3": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "granite": """{%- if messages[0].role == 'system' %}
{%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}{%- set system, turns = 'You are Granite.', messages %}{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}
{%- for m in turns %}
{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}""",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # As SmolLM3's: what the model is told of itself, with the given text in it.
    "smollm-3": """{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' }}
{{- strftime_now('%d %B %Y') + '\nReasoning Mode: /think\n\n## Custom Instructions\n\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- set turns = messages[1:] %}
{%- else %}{{- 'You are a helpful AI assistant.' }}{%- set turns = messages %}{%- endif %}
{{- '\n\n<|im_end|>\n' }}
{%- for m in turns %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
}
