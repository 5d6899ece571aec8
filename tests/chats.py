"""Conversations and templates that several tests share."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
# Says how many messages there are in front of them.
CHANGING = "{{ messages | length }}" + CHATML
# Without a system's messages, which it refuses.
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + CHATML
)


def chat(*contents, system=None):
    """Messages of user and assistant in turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    messages += [
        {"role": roles[number % 2], "content": content} for number, content in enumerate(contents)
    ]
    return messages
