"""Texts that tokenizers read in different ways."""

TEXTS = {
    "empty": "",
    "prose": "Once upon a time, there was a little girl named Lily.",
    "spaces": "two  spaces,   three between, one after ",
    "code": "def f(x):\n\tif x > 1:\n\t\treturn 'a'  # 12345 + 6.75\n\n\n    return None\r\n",
    "emoji": "Smile 😀👩‍👩‍👧 and a flag 🇩🇪!",
    "accents": "café naïve Ångström œuvre ệ",
    "combining": "cafe\u0301 e\u0323\u0302",
    "east": "漢字かな交じり文と中文、한국어도.",
    "right to left": "مرحبا بالعالم שלום עולם",
    "contractions": "I'm, you're, we'LL, they'd; it's HE'S",
    "digits": "1 22 333 4444 55555 1,000,000.00 ½ ٣ Ⅷ",
    "control strings": "<s>Hello</s><|im_end|><|end|> <unk> [INST] x",
    "line ends": "\n\n \n  \t \n",
    "marks": "नमस्ते दुनिया ไทย",
    "signs": "!!!??? -- ... »quoted« “x” $%&/()=",
    "cases": "ALLCAPS camelCase snake_case ßẞ ﬁ",
    "other spaces": "a\u00a0b\u2003c\u3000d\u200be",
    "a word of its own": "an unmergeable one",
    "a space": " ",
    "spaces before": "   x",
}
