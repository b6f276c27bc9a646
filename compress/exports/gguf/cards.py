"""How the card says that a GGUF export is loaded and served."""

from __future__ import annotations

from compress.exports.card import NO_TEXT, CardFacts
from compress.exports.gguf.adapter import FILE as ADAPTER_FILE


def how_to_load(card: CardFacts) -> str:
    """With llama.cpp's own program, or with the toolkit."""
    adapter = "" if card.rank is None else f" --lora {card.folder}/{ADAPTER_FILE}"
    note = (
        ""
        if card.rank is None
        else f"\n\n`{ADAPTER_FILE}` holds the low-rank corrections; without it the model is not corrected."
    )
    return f"""\
As a GGUF file, with llama.cpp:

```sh
llama-cli -m {card.folder}/{_file(card)}{adapter}
```

With the toolkit installed, as a transformers model with dequantised weights:

```python
import compress

model = compress.load_export("{card.folder}")
```{note}"""


def how_to_serve(card: CardFacts) -> str:
    """With llama-server, or with ollama, which wants a Modelfile."""
    if not card.writes_text:
        return NO_TEXT
    corrected = card.rank is not None
    adapter = f" --lora {card.folder}/{ADAPTER_FILE}" if corrected else ""
    lines = [f"FROM {card.folder}/{_file(card)}"]
    lines += [f"ADAPTER {card.folder}/{ADAPTER_FILE}"] if corrected else []
    modelfile = "\n".join(lines)
    return f"""\
With llama.cpp: `llama-server -m {card.folder}/{_file(card)}{adapter}`.

With ollama, `ollama create NAME -f Modelfile` with this Modelfile:

```
{modelfile}
```

LM Studio opens the file as it is."""


def _file(card: CardFacts) -> str:
    return card.file or "model.gguf"
