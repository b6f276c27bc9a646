"""Facts on an export for its model card, and the texts that several formats share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING

from compress.families.correction_options import VLLM_RANKS

if TYPE_CHECKING:
    from compress.bases import Loading

NO_TEXT = "No command for serving is given: the model does not write text."


@dataclass(frozen=True, kw_only=True)
class CardBase:
    """The compressed checkpoint that corrections were made for."""

    name: str
    """Its id on the hub, or its folder's own name."""
    revision: str | None
    """Its commit, for a checkpoint of the hub."""
    kind: str | None
    """The name of its format; None if the report is of a version that did not record it."""
    loading: Loading | None
    """How others load it; None where the format is not known."""
    unserved: tuple[str, ...]
    """Reasons for which the servers of its format refuse it."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts of a run and of one of its exports, from the report; sizes are texts such as "4.2 GB"."""

    folder: str
    """The export's folder on disk as the card's reader writes it: "THIS_FOLDER", or where its repository is put."""
    source: str
    """What libraries take that fetch from the hub by themselves: the repository's id, or the folder on disk."""
    adapter: str | None
    """Its adapter's folder on disk; None if there is none."""
    subfolder: str | None
    """Where that is within the export's folder; None if it is that folder itself, or there is none."""
    file: str | None = None
    """The file that holds the weights, in the folder, for a format that is one file; None for any other."""
    auto_class: str
    """The transformers class that loads the model: "AutoModelForCausalLM"."""
    writes_text: bool
    """Whether the model predicts the next token."""
    stored: str
    """The compressed layers and their form: "10 linear layers of `org/tiny` are stored as 4-bit g32, which takes 4.6
    bits per weight in these layers"."""
    layers: str
    """How many layers of what: "10 linear layers of `org/tiny`"."""
    forms: str
    """Their forms, with numbers of layers: "4-bit g128 + rank 32 (210 layers)"."""
    size: str
    """The size of the whole checkpoint, a base that it does not hold included."""
    original_size: str
    added_size: str
    """The size of what the export adds to its base; of all of it where there is no base."""
    rank: int | None
    """The highest rank of a correction; None if there is none, or the report is of an earlier version."""
    few_bits: bool
    """Whether factors of corrections were rounded to fewer than 16 bits."""
    base: CardBase | None
    """None: the model itself was compressed."""
    refusals: tuple[str, ...] | None
    """Reasons for which servers refuse it; None if the report is of a version that did not record them."""
    ranks_differ: bool
    """Whether layers of its adapter differ in rank, or layers that servers stack with others have none."""
    has_experts: bool
    """Whether experts of a mixture are among the compressed layers."""


def packed_introduction(card: CardFacts) -> str:
    """The first paragraph for a format that holds the layers in their forms, and everything else."""
    if card.base is not None:
        return f"This checkpoint holds the base and its corrections. {whole_size(card)}"
    return f"{card.stored}. {whole_size(card)} Nothing was trained."


def whole_size(card: CardFacts) -> str:
    """The size of the checkpoint beside that of the original."""
    return f"The whole checkpoint takes {card.size}; the original takes {card.original_size}."


def widened_note(card: CardFacts) -> list[str]:
    """A paragraph on how a PEFT adapter stores factors of few bits; none where there are no such factors."""
    if not card.few_bits:
        return []
    return [
        "PEFT has no format for factors of few bits: the adapter stores their values in 16 bits, and the native format "
        "stores the codes."
    ]


def load_with_transformers(card: CardFacts, options: str = "", imports: Sequence[str] = ()) -> str:
    """Code that loads model and tokenizer with transformers; `options` are further arguments of the model's loading.

    `imports`: classes of transformers that these name.
    """
    names = ", ".join([card.auto_class, "AutoTokenizer", *imports])
    return f"""\
```python
from transformers import {names}

model = {card.auto_class}.from_pretrained("{card.source}"{options})
tokenizer = AutoTokenizer.from_pretrained("{card.source}")
```"""


def load_with_gptqmodel(card: CardFacts) -> str:
    """Code that loads a mixture, which transformers would fill with random numbers."""
    return f"""\
As a GPTQ checkpoint, with gptqmodel installed:

```python
from gptqmodel import GPTQModel

model = GPTQModel.load("{card.source}")
```

Not with `{card.auto_class}.from_pretrained`: transformers 5.23 keeps experts in stacked tensors, finds no packed \
ones, and fills them with random numbers after a warning that they are missing."""


def load_adapter_beside(card: CardFacts) -> str:
    """Code that adds an adapter which lies beside its checkpoint to the model that was loaded from this."""
    return f"""\
The low-rank corrections are a PEFT adapter beside it; without it the model is not corrected:

```python
from peft import PeftModel

{adapter_line(card)}
```"""


def adapter_line(card: CardFacts) -> str:
    """The statement that puts the adapter on a model; with `subfolder`, of a folder and of a repository alike."""
    within = "" if card.subfolder is None else f', subfolder="{card.subfolder}"'
    return f'model = PeftModel.from_pretrained(model, "{card.source}"{within})'


def vllm(card: CardFacts) -> str:
    """How vLLM serves a checkpoint that it reads, with its adapter if there is one."""
    if not card.writes_text:
        return NO_TEXT
    if card.refusals:
        return unserved(card.refusals)
    if card.adapter is not None:
        return vllm_lora(card, card.folder, None)
    return f"With vLLM: `vllm serve {card.source}`."


def unserved(reasons: Sequence[str], what: str = "it") -> str:
    """The reasons for which servers refuse an export, or what it belongs to."""
    return "\n".join([f"Servers refuse {what}:", "", *(f"- {reason}" for reason in reasons)])


UNKNOWN_GRID = (
    "No command for serving is given: the report does not tell whether servers take its grid. They take GPTQ of 4 and "
    "8 bits, symmetric, in order, in groups of 32, 64 or 128 or whole rows."
)
"""For a report of a version that did not record why servers refuse an export."""


def other_servers(card: CardFacts) -> str:
    """Whether servers that ignore an adapter's patterns may have it."""
    if not card.ranks_differ:
        return "All layers have one rank: servers that ignore PEFT's patterns (SGLang, TensorRT-LLM) compute the same."
    return (
        "Layers differ in rank: PEFT and vLLM read that from `rank_pattern`; servers that ignore it (SGLang, "
        "TensorRT-LLM) compute something else or refuse it. `--adapter-ranks padded` makes an adapter of one rank."
    )


def vllm_lora(
    card: CardFacts, model: str, revision: str | None, arguments: Sequence[str] = ()
) -> str:
    """How vLLM serves a model with the export's adapter as a LoRA; it takes no rank but those that it knows."""
    if not card.writes_text:
        return NO_TEXT
    if card.rank is None:
        return "The report does not tell the rank of the adapter, which vLLM has to be given (--max-lora-rank)."
    most = next((rank for rank in VLLM_RANKS if rank >= card.rank), None)
    if most is None:
        return f"vLLM serves no adapter of rank {card.rank}: the highest rank it takes is {VLLM_RANKS[-1]}."
    place = card.source if card.subfolder is None else card.adapter
    more = "".join([f" --revision {revision}" if revision else "", *(f" {it}" for it in arguments)])
    return (
        f"With vLLM: `vllm serve {quote(model)}{more} --enable-lora --max-lora-rank {most} "
        f'--lora-modules corrected={place}`. Requests for the corrected model name "corrected".'
    )
