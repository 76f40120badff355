"""Thirty chats labelled by hand: the whole rendered text, [[ ... ]] around what is trained on."""

U, A, S, T = "user", "assistant", "system", "tool"

CHATS = [
    # --- chatml
    ("chatml", [(U, "Hi"), (A, "Hello")],
     "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello<|im_end|>]]\n"),
    ("chatml", [(S, "Be brief."), (U, "2 + 2?"), (A, "4"), (U, "And 3?"), (A, "5")],
     "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
     "<|im_start|>assistant\n[[4<|im_end|>]]\n<|im_start|>user\nAnd 3?<|im_end|>\n"
     "<|im_start|>assistant\n[[5<|im_end|>]]\n"),
    ("chatml", [(U, "a"), (A, "b", 0), (U, "c"), (A, "d")],
     "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
     "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]\n"),
    ("chatml", [(U, "assistant\nno"), (A, "user\nyes\n")],
     "<s><|im_start|>user\nassistant\nno<|im_end|>\n"
     "<|im_start|>assistant\n[[user\nyes\n<|im_end|>]]\n"),
    ("chatml", [(U, "Look it up"), (A, "lookup()"), (T, "42"), (A, "It is 42 🙂")],
     "<s><|im_start|>user\nLook it up<|im_end|>\n<|im_start|>assistant\n[[lookup()<|im_end|>]]\n"
     "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n[[It is 42 🙂<|im_end|>]]\n"),
    ("chatml", [(U, "Hi"), (A, "Hello"), (U, "Bye")],
     "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello<|im_end|>]]\n"
     "<|im_start|>user\nBye<|im_end|>\n"),
    # --- llama-3
    ("llama-3", [(U, "Hi"), (A, "Hello")],
     "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n[[Hello<|eot_id|>]]"),
    ("llama-3", [(S, "Be brief."), (U, "Why?"), (A, "So.")],
     "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n[[So.<|eot_id|>]]"),
    ("llama-3", [(U, "Hi"), (A, "f()"), (T, "1"), (A, "One")],
     "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n[[f()<|eot_id|>]]"
     "<|start_header_id|>ipython<|end_header_id|>\n\n1<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n[[One<|eot_id|>]]"),
    ("llama-3", [(U, "a"), (A, "b"), (A, "c")],
     "<s><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n[[b<|eot_id|>]]"
     "<|start_header_id|>assistant<|end_header_id|>\n\n[[c<|eot_id|>]]"),
    ("llama-3", [(U, "é🙂"), (A, "ü 🙃 end  ")],
     "<s><|start_header_id|>user<|end_header_id|>\n\né🙂<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n[[ü 🙃 end  <|eot_id|>]]"),
    ("llama-3", [(U, "a"), (A, "b"), (U, "c"), (A, "d", 0)],
     "<s><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n[[b<|eot_id|>]]"
     "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\nd<|eot_id|>"),
    # --- llama-2
    ("llama-2", [(U, "Hi"), (A, "Hello")],
     "<s>[INST] Hi [/INST][[ Hello </s>]]"),
    ("llama-2", [(S, "Be brief."), (U, "Hi"), (A, "Hello")],
     "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST][[ Hello </s>]]"),
    ("llama-2", [(U, "a"), (A, "b"), (U, "c"), (A, "d")],
     "<s>[INST] a [/INST][[ b </s>]]<s>[INST] c [/INST][[ d </s>]]"),
    ("llama-2", [(S, "s"), (U, "a"), (A, "b"), (U, "c"), (A, "d"), (U, "e")],
     "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST][[ b </s>]]<s>[INST] c [/INST][[ d </s>]]"
     "<s>[INST] e [/INST]"),
    ("llama-2", [(U, "[/INST] x"), (A, "[INST] y")],
     "<s>[INST] [/INST] x [/INST][[ [INST] y </s>]]"),
    ("llama-2", [(U, "a"), (A, "b", 0), (U, "c"), (A, "two\nlines")],
     "<s>[INST] a [/INST] b </s><s>[INST] c [/INST][[ two\nlines </s>]]"),
    # --- alpaca
    ("alpaca", [(U, "Hi"), (A, "Hello")],
     "<s>### Instruction:\nHi\n\n### Response:\n[[Hello</s>]]\n\n"),
    ("alpaca", [(S, "Be brief."), (U, "Hi"), (A, "Hello")],
     "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\n[[Hello</s>]]\n\n"),
    ("alpaca", [(U, "a"), (A, "b"), (U, "c"), (A, "d")],
     "<s>### Instruction:\na\n\n### Response:\n[[b</s>]]\n\n"
     "### Instruction:\nc\n\n### Response:\n[[d</s>]]\n\n"),
    ("alpaca", [(U, "### Response:\nno"), (A, "### Instruction:\nyes")],
     "<s>### Instruction:\n### Response:\nno\n\n"
     "### Response:\n[[### Instruction:\nyes</s>]]\n\n"),
    ("alpaca", [(U, "a"), (U, "b"), (A, "c ")],
     "<s>### Instruction:\na\n\n### Instruction:\nb\n\n### Response:\n[[c </s>]]\n\n"),
    ("alpaca", [(U, "a"), (A, "b", 0), (U, "c"), (A, "🙂")],
     "<s>### Instruction:\na\n\n### Response:\nb</s>\n\n"
     "### Instruction:\nc\n\n### Response:\n[[🙂</s>]]\n\n"),
    # --- plain
    ("plain", [(U, "Hi"), (A, "Hello")],
     "<s>User:\nHi\nAssistant:\n[[Hello</s>]]\n"),
    ("plain", [(S, "Be brief."), (U, "Hi"), (A, "Hello"), (U, "Bye"), (A, "Bye")],
     "<s>System:\nBe brief.\nUser:\nHi\nAssistant:\n[[Hello</s>]]\n"
     "User:\nBye\nAssistant:\n[[Bye</s>]]\n"),
    ("plain", [(U, "f?"), (A, "f()"), (T, "4"), (A, "Four")],
     "<s>User:\nf?\nAssistant:\n[[f()</s>]]\nTool:\n4\nAssistant:\n[[Four</s>]]\n"),
    ("plain", [(U, "Assistant:\nno"), (A, "User:\nyes\n\n")],
     "<s>User:\nAssistant:\nno\nAssistant:\n[[User:\nyes\n\n</s>]]\n"),
    ("plain", [(U, "a"), (A, "b", 0), (U, "c"), (A, "d", 1)],
     "<s>User:\na\nAssistant:\nb</s>\nUser:\nc\nAssistant:\n[[d</s>]]\n"),
    ("plain", [(U, ""), (A, "x"), (U, "y"), (A, "")],
     "<s>User:\n\nAssistant:\n[[x</s>]]\nUser:\ny\nAssistant:\n[[</s>]]\n"),
]  # fmt: skip


def messages_of(turns):
    return [
        {"role": role, "content": content, **({"weight": weight[0]} if weight else {})}
        for role, content, *weight in turns
    ]


def labelled(text):
    """The text without its brackets, and whether each of its characters is trained on."""
    plain, trained, learn = [], [], False
    while text:
        if text.startswith(("[[", "]]")) and (text[0] == "[") != learn:
            learn, text = text[0] == "[", text[2:]
            continue
        plain.append(text[0])
        trained.append(learn)
        text = text[1:]
    return "".join(plain), trained
