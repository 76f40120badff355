"""transformers, and PEFT on it: a model, a GGUF file, or a base with an adapter on it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from contract import Task, packed, serve


def loaded(task: Task) -> tuple[Any, Any]:
    """The model and its tokenizer, as `how` says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how, dtype = task["how"], torch.float32
    if how == "gguf_file":
        place = Path(task["model"])
        files = {"gguf_file": place.name}
        model = AutoModelForCausalLM.from_pretrained(place.parent, dtype=dtype, **files)
        return model, AutoTokenizer.from_pretrained(place.parent, **files)
    if how == "AutoPeftModelForCausalLM":
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(task["adapter"], dtype=dtype)
        return model, AutoTokenizer.from_pretrained(task["adapter"])
    if task.get("adapter"):
        from peft import PeftModel

        quantized = {"quantization_config": four_bits()} if how.startswith("PeftModel on") else {}
        base = AutoModelForCausalLM.from_pretrained(task["base"], dtype=dtype, **quantized)
        has_tokenizer = Path(task["adapter"], "tokenizer_config.json").exists()
        tokenizer = AutoTokenizer.from_pretrained(task["adapter" if has_tokenizer else "base"])
        return PeftModel.from_pretrained(base, task["adapter"]), tokenizer
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype)
    return model, AutoTokenizer.from_pretrained(task["model"])


def four_bits() -> Any:
    """What the adapters were trained on."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def repacking(model: Any, off: bool) -> int:
    """In how many layers bitsandbytes' kernel repacks 4-bit weights in place; `off` ends that."""
    layers = [one for one in model.modules() if hasattr(one, "support_avx512bf16_for_cpu")]
    found = sum(bool(one.support_avx512bf16_for_cpu) for one in layers)
    for one in layers if off else ():
        one.support_avx512bf16_for_cpu = False
    return found


def answer(task: Task) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokenizer = loaded(task)
    model.eval()
    repacked = repacking(model, off=task["plain_kernels"])
    rows = []
    for row in task["rows"]:
        prompt = torch.tensor([row["ids"]])
        with torch.no_grad():
            drawn = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=task["new_tokens"],
                do_sample=False,
                pad_token_id=0,
            )[0, prompt.shape[1] :].tolist()
            whole = model(torch.tensor([row["ids"] + row["continuation"]])).logits
        positions = whole[0, len(row["ids"]) - 1 : -1].float().log_softmax(1)
        rows.append(
            {
                "tokens": tokenizer(row["text"])["input_ids"],
                "ids": drawn,
                "text": tokenizer.decode(drawn, skip_special_tokens=True),
                "logprobs": packed(positions.tolist()),
            }
        )
    texts = {str(one.message).partition("\n")[0] for one in caught}
    said = sorted(text for text in texts if "deprecated" not in text)
    return {"rows": rows, "warnings": said, "repacking_layers": repacked}


if __name__ == "__main__":
    serve(answer, "transformers", "peft", "bitsandbytes", "torch")
