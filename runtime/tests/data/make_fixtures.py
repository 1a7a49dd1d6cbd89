"""Makes the reference data beside this file.

    python make_fixtures.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs gguf, tokenizers, regex, jinja2. Token ids come from two implementations that must agree:
Hugging Face's `tokenizers`, set up as SmolLM2's own tokenizer.json is, and byte-pair encoding
written down here in its plainest form. Rendered chats come from Jinja2 with the settings that
`transformers` gives it.
"""

import json
import pathlib
import sys

import gguf
import jinja2
import jinja2.ext
import regex
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, pre_tokenizers

HERE = pathlib.Path(__file__).parent

TEXTS = [
    "",
    " ",
    "\n",
    "a",
    "Hello, world!",
    "  leading and trailing  ",
    "The quick brown fox jumps over the lazy dog.",
    "It's they're we've I'm you'll he'd IT'S 'tis don't",
    "0 12 345 6789 3.14159 1e-5 1,000,000 0x1F ½ ² Ⅷ ٣٤ 四",
    "tabs\tand\t\ttabs, lines\n\nand\r\nmore \n lines   \n\n\n end",
    "    def f(x: int) -> str:\n        return f\"{x!r}\"  # comment\n\n\nclass A(B):\n\tpass\n",
    "fn main() { let v: Vec<u8> = (0..10).map(|x| x * 2).collect(); println!(\"{v:?}\"); }",
    "SELECT * FROM t WHERE a <> 'b' AND c >= 10;",
    "https://example.com/a?b=c&d=%20#e user@example.com",
    "naïve café Ångström ÉCOLE straße İstanbul ŉ",
    "e\u0301 a\u0308 \u1100\u1161 (decomposed)",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم",
    "你好,世界。こんにちは世界!안녕하세요 세계 ภาษาไทย हिन्दी",
    "😀 👩‍👩‍👧‍👦 🇺🇳 🏳️‍🌈 ☃️ ❤️ 👍🏽",
    "x²+y²=z² ∑∞ ∫∂ ≤≥≠ ←→ ™©® €£¥",
    "\u00a0non\u2003breaking\u3000spaces\u200bzero\ufeffwidth",
    "control \u0000\u0001\u001f\u007f\u0085 characters",
    "bytes beyond the vocabulary \U000fffff \U00055555",
    "private \ue000 \U000f0000 \U0010ffff ends",
    "...!!!???---___===***///\\\\\\|||~~~```",
    "CamelCaseWord snake_case_word kebab-case-word SCREAMING",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c<|endoftext|>",
    "<|im_start> <|im_end| <im_end|> <|nothing|>",
    "<repo_name>x<file_sep>y<jupyter_code>print(1)",
]

MESSAGES = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  What is 2 < 3 & \"so\"?  "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes, é😀."},
    {"role": "user", "content": "Thanks"},
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells <b>weather</b> & 'more' é😀",
            "parameters": {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "number", "default": 1.5}}, "required": []},
            "strict": True, "cached": False, "returns": None, "limits": [1, -2.0, 12345678901234567890],
        },
    }
]

CALL = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": {"z": "Rome", "a": 2}}}],
    },
    {"role": "tool", "content": "sunny", "name": "weather"},
]

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nDefault.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

BLOCKS = """\
{# a comment on its own line #}
{{ bos_token }}
{% for message in messages %}
  {% if message.role == 'system' %}
[SYS]{{ message.content | trim }}[/SYS]
  {% elif loop.index0 is odd %}
  {{ loop.index }}/{{ loop.length }} {{ message.content.strip() }}{{ eos_token }}
  {% else %}
    {% generation %}
{{ message.content }}
    {% endgeneration %}
  {% endif %}
{% endfor %}
end
"""

THINKING = """\
{%- set ns = namespace(last=-1, multi=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string and not(message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.multi = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{{- 'last user: ' ~ ns.last ~ ns.multi ~ none ~ 2.0 ~ '\\n' }}
{%- for message in messages[1:] %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {{- '(' + thought + ')' }}
    {%- endif %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {{- message.role.upper() + ': ' + content + '\\n' }}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- if messages[-1].role != 'user' or messages[0].get('name') %}never{% endif %}
"""

TOOL_USE = """\
{%- macro signature(tool) -%}
    {{ tool.name }}({% for name, p in tool.parameters.properties.items() %}{{ name }}: {{ p.type }}{{ ', ' if not loop.last }}{% endfor %})
{%- endmacro %}
{%- if tools is not none %}
    {%- for tool in tools %}
{{ tool | tojson }}
{{ tool | tojson(indent=2) }}
{{ signature(tool.function) }}
{{ tool.function.parameters | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function %}
{{ '<call>' }}{"name": "{{ call.name }}", "arguments": {{ call.arguments if call.arguments is string else call.arguments | tojson }}}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
{{ '<' ~ message['name'] | default('tool') ~ '>' ~ message.content | replace('n', 'N') }}
    {%- endif %}
{%- endfor %}
{{ [] | tojson }}{{ {} | tojson(indent=4) }}{{ "a\\"b\\\\\\n" | tojson }}
"""

CHATS = [
    ("chatml", CHATML, MESSAGES, True, {}),
    ("chatml without a system message", CHATML, MESSAGES[1:], False, {}),
    ("blocks", BLOCKS, MESSAGES, False, {}),
    ("thinking", THINKING, MESSAGES, True, {}),
    ("not thinking", THINKING, MESSAGES, True, {"enable_thinking": False}),
    ("tools", TOOL_USE, CALL, True, {"tools": TOOLS}),
    ("no tools", TOOL_USE, MESSAGES, True, {}),
]


class Generation(jinja2.ext.Extension):
    """`{% generation %}` as text: its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @staticmethod
    def _body(caller):
        return caller()


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template, messages, add_generation_prompt, extra):
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    args = {"tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>"} | extra
    return env.from_string(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt, **args
    )


class PlainBpe:
    """Byte-pair encoding, one merge at a time."""

    WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, tokens, merges, special):
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.special = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
        printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in printable]
        self.alphabet = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

    def encode(self, text):
        ids = []
        for part in self.special.split(text):
            if self.special.fullmatch(part):
                ids.append(self.ids[part])
                continue
            for piece in regex.split(r"(\p{N})", part):
                for word in self.WORDS.findall(piece):
                    ids += [self.ids[t] for t in self.merge(word)]
        return ids

    def merge(self, word):
        # The vocabulary lacks a few bytes that hardly any text has: they are dropped.
        parts = [self.alphabet[b] for b in word.encode() if self.alphabet[b] in self.ids]
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, 1 << 30) for pair in zip(parts, parts[1:])]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] == 1 << 30:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return parts


def main():
    fields = gguf.GGUFReader(sys.argv[1]).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, types) if kind == 3]

    vocab = {token: i for i, token in enumerate(tokens)}
    reference = tokenizers.Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges]))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    reference.decoder = decoders.ByteLevel()
    reference.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    plain = PlainBpe(tokens, merges, special)

    cases = []
    for text in TEXTS:
        ids = reference.encode(text).ids
        assert ids == plain.encode(text), text
        decoded = reference.decode(ids, skip_special_tokens=False)
        shown = reference.decode(ids, skip_special_tokens=True)
        cases.append({"text": text, "ids": ids, "decoded": decoded, "shown": shown})
    write("smollm2_tokens.json", cases)

    chats = [
        {
            "name": name,
            "template": template,
            "messages": messages,
            "add_generation_prompt": prompt,
            "extra": extra,
            "rendered": render(template, messages, prompt, extra),
        }
        for name, template, messages, prompt, extra in CHATS
    ]
    write("chats.json", chats)


def write(name, cases):
    lines = ",\n".join(json.dumps(case, ensure_ascii=True) for case in cases)
    (HERE / name).write_text(f"[\n{lines}\n]\n")
    print(name, len(cases))


main()
