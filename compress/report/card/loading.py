"""How each export is loaded and served, as its model card says."""

from collections.abc import Iterator

from compress.report.card.facts import THIS_FOLDER, exporter_of, facts_of
from compress.report.engines import engine_text
from compress.report.report import ExportReport, Report


def loading(report: Report, own: ExportReport | None) -> Iterator[str]:
    """The section of the card; `own` is the export whose folder the card goes into, None the folder of several."""
    yield "## How to load it"
    for export in report.exports if own is None else (own,):
        kind, facts = (exporter_of(export), facts_of(report, export, "." if own is None else None))
        yield kind.how_to_load(facts)
        yield kind.how_to_serve(facts)
        yield (
            f"Loaded again in a fresh process, its logits differed from those of the compressed "
            f"model by {export.relative_difference:.1e} (relative, tolerance "
            f"{export.tolerance:.0e}) and agreed on {export.top1_agreement:.1%} of the top tokens."
        )
        if export.engines:
            yield "\n".join(f"- {_sentence(engine_text(found))}" for found in export.engines)

    yield _where(None if own is None else own.repository)


def _where(repository: str | None) -> str:
    if repository is None:
        return (
            f"`{THIS_FOLDER}` is the path of the folder that this card lies in; for what is on the hub, the id of its "
            "repository or, in commands that read files, the folder that it was downloaded into."
        )
    folder = repository.partition("/")[2]
    return (
        f"`hf download {repository} --local-dir {folder}` puts the files into the folder `{folder}`, for commands that "
        f"name it. For a copy that you have, write its path in the place of `{repository}` and of `{folder}`."
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
