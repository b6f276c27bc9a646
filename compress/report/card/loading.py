"""How each export is loaded, as its model card says."""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from shlex import quote

from calibration.heads import Head
from calibration.outputs import AUTO_CLASSES
from compress.families.correction_options import VLLM_RANKS
from compress.report.card.metadata import base_name
from compress.report.report import ExportReport, Report

_LOAD_NATIVE = """
Packed, with the toolkit (compress-llm) installed:

```python
import compress  # registers the format
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

Codes, where there are any, stay packed in memory and are expanded for every product.
`compress.load_unpacked("{folder}")` expands them once: faster, in as much memory as dense weights or factors take.

Without the toolkit, `from_pretrained("{folder}", trust_remote_code=True)` runs the code beside the weights.
"""

_LOAD_GPTQ = """
As GPTQ, for transformers with gptqmodel:

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{folder}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""

_SERVE = """
With vLLM: `vllm serve {folder}{lora}`.
"""

_LORA = " --enable-lora --max-lora-rank {most} --lora-modules corrected={adapter}"

_LOAD_BESIDE = """
The low-rank correction is a PEFT adapter beside it; without it the model is the uncorrected one:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "{folder}")
```
"""

_LOAD_PLAIN = """
As ordinary weights in full precision, for every tool; not smaller than the original:

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""

_LOAD_ADAPTER = """
A PEFT adapter for the checkpoint `{base}`, which is loaded as the tool that wrote it wants:

```python
from peft import PeftModel
from transformers import {auto}

model = {auto}.from_pretrained("{base}"{revision})
model = PeftModel.from_pretrained(model, "{folder}")
```
"""

_LOADING: Mapping[str, str] = {
    "native": _LOAD_NATIVE,
    "gptq": _LOAD_GPTQ,
    "dense": _LOAD_PLAIN,
    "adapter": _LOAD_ADAPTER,
}


def loading(report: Report, own: ExportReport | None) -> Iterator[str]:
    """The section of the card; `own` is the export whose folder the card goes into, None the folder of several."""
    yield "## How to load it"
    for export in report.exports if own is None else (own,):
        root = "." if own is None else own.folder
        folder = _folder(export.folder, root)
        auto = AUTO_CLASSES[Head(report.head)].__name__
        base = base_name(report.base) if report.base else ""
        commit = report.base.revision if report.base else None
        revision = f', revision="{commit}"' if commit else ""
        text = _LOADING.get(export.format, _LOAD_PLAIN)
        yield text.format(folder=folder, auto=auto, base=base, revision=revision).strip()
        if export.adapter is not None and export.adapter != export.folder:
            yield _LOAD_BESIDE.format(folder=_folder(export.adapter, root)).strip()
        yield from _serving(report, export, folder, root)
        yield (
            f"Loaded again in a fresh process, its logits differed from those of the compressed "
            f"model by {export.relative_difference:.1e} (relative, tolerance "
            f"{export.tolerance:.0e}) and agreed on {export.top1_agreement:.1%} of the top tokens."
        )


def _serving(report: Report, export: ExportReport, folder: str, root: str) -> Iterator[str]:
    """With vLLM, which takes an adapter as a LoRA of a rank that it knows, and no native checkpoint."""
    served, stands_on = folder, export.format
    if report.base is not None and export.format == "adapter":
        stands_on = report.base.format.partition(",")[0]
        commit = report.base.revision
        served = quote(base_name(report.base)) + (f" --revision {commit}" if commit else "")
    if stands_on == "native" or report.head != Head.NEXT_TOKEN:
        return
    if export.adapter is None:
        yield _SERVE.format(folder=served, lora="").strip()
        return
    rank = max((layer.rank for layer in report.layers if layer.rank is not None), default=None)
    if rank is None:  # a report of an earlier version
        return
    most = next((each for each in VLLM_RANKS if each >= rank), None)
    if most is None:
        yield f"vLLM serves no adapter of rank {rank}; {VLLM_RANKS[-1]} is its most."
        return
    lora = _LORA.format(most=most, adapter=_folder(export.adapter, root))
    told = _SERVE.format(folder=served, lora=lora).strip()
    yield f'{told} Requests for the corrected model name "corrected".'


def _folder(folder: str, root: str) -> str:
    """A folder of the output as seen from `root`, the folder of the output that has this card."""
    return PurePosixPath("THIS_FOLDER", PurePosixPath(folder).relative_to(root)).as_posix()
