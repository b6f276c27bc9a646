"""What every export format promises, asked of all that are registered and of one that another distribution brings."""

import ast
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from documents import ROOT
from outside import announce
from test_on_base import base, on_base
from workspaces import fill, quicken, recipe

import compress
from compress.callbacks import no_progress
from compress.cli.main import main
from compress.config.publishing import refuse_bad_id
from compress.config.recipe import Recipe
from compress.errors import CheckpointError, PluginError, RecipeError
from compress.exports.base import EXPORTS, Exporter, MadeOf, Traits, Use, formats_for
from compress.exports.load import format_of, load_export, recognised, stored_in
from compress.exports.verification.places import PROBE
from compress.exports.verification.probe import file_digests, read_probe
from compress.exports.verification.verify import check, verify
from compress.families.base import METHODS
from compress.inspection.checkpoint import inspect
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.planning.plan import Plan
from compress.report.card.card import model_card
from compress.report.report import ExportReport, Report

HALF = "half"
NAMES = sorted({*EXPORTS, HALF})
METHODS_TRIED = (
    EoRA(rank=4, base=GPTQ(group_size=32)),
    GPTQ(group_size=32),
    RTN(group_size=32, bits=8),
)
"""The first of them that a format holds is exported."""


@dataclass(frozen=True)
class Written:
    """One run with one export."""

    plan: Plan
    report: Report
    folder: Path

    @property
    def export(self) -> ExportReport:
        return self.report.exports[0]

    @property
    def kind(self) -> type[Exporter]:
        return EXPORTS[self.export.format]

    @property
    def card(self) -> str:
        return (self.folder / "README.md").read_text(encoding="utf-8")


Run = Callable[[str], Written]


@pytest.fixture(scope="module", autouse=True)
def _outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example of docs/extend, as installing its distribution leaves it; what it registers goes with the module."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "docs" / "extend" / "half_export.py", site)
    announce(site, "half-export", "compress.exports", {HALF: "half_export:HalfExporter"})
    sys.path.insert(0, str(site))
    yield
    sys.path.remove(str(site))
    if sys.modules.pop("half_export", None) is not None:
        EXPORTS.forget(HALF)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The export of a format, made once for all tests."""
    known: dict[str, Written] = {}

    def run(name: str) -> Written:
        if name not in known:
            known[name] = _write(name, fill(tmp_path_factory.mktemp(name)))
        return known[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        quicken(patch)
        yield run


def _write(name: str, workspace: Path) -> Written:
    job = _job(name, workspace)
    plan = compress.plan(job).plan
    report = compress.run(job)
    return Written(plan, report, workspace / "out" / report.exports[0].folder)


def _job(name: str, workspace: Path) -> Recipe:
    if Use.MODEL not in EXPORTS[name].traits.uses:
        base(workspace)
        return on_base(workspace, export=(name,))
    shape = (64, 32)
    fit = (method for method in METHODS_TRIED if not EXPORTS[name].problem(method, shape))
    return recipe(workspace, export=(name,), method=next(fit))


def damaged(folder: Path, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    """A copy of an export, links to its files but for those that are changed."""
    copied = tmp_path / "copy"
    for path in folder.rglob("*"):
        target = copied / path.relative_to(folder)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    change(copied)
    return copied


@pytest.mark.parametrize("name", NAMES)
def test_the_planned_bytes_are_those_of_the_tensors_that_are_written(
    written: Run, name: str
) -> None:
    found = written(name)
    bytes_of_tensors = sum(tensor.nbytes for _, tensor in found.kind.tensors(found.folder))
    assert found.plan.written_bytes(name) == bytes_of_tensors > 0
    assert found.kind.stored(found.folder).tensor_bytes == bytes_of_tensors
    whole = stored_in(found.folder).tensor_bytes
    assert found.plan.export_bytes(name) == found.export.tensor_bytes == whole
    assert (whole > bytes_of_tensors) == found.kind.traits.needs_base


@pytest.mark.parametrize("name", NAMES)
def test_no_scale_or_offset_changes_where_a_server_casts_it_to_the_models_dtype(
    written: Run, name: str
) -> None:
    found = written(name)
    of_grids = re.compile(r"(scales?|offsets|biases)$")
    numbers = {n: t for n, t in found.kind.tensors(found.folder) if of_grids.search(n)}
    assert bool(numbers) == (name in {"compressed-tensors", "gptq", "mlx", "native"})
    for tensor in numbers.values():
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(tensor.to(dtype).double(), tensor.double())


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_recognised_by_its_own_format_and_by_no_other_special_one(
    written: Run, name: str
) -> None:
    folder = written(name).folder
    claims = {each for each in EXPORTS if EXPORTS[each].is_in(folder)}
    ordinary = {each for each in claims if EXPORTS[each].traits.ordinary}
    assert claims - ordinary == ({name} - ordinary)
    assert recognised(folder) is format_of(folder) is EXPORTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_back_gives_the_logits_of_the_compressed_model(
    written: Run, name: str
) -> None:
    folder = written(name).folder
    probe, _ = read_probe(folder)
    expected = probe.logits
    with torch.inference_mode():
        logits = load_export(folder)(input_ids=probe.input_ids).logits[0, probe.positions].float()
    tolerance = check(folder, "cpu").tolerance
    assert float((logits - expected).norm() / expected.norm()) <= tolerance
    assert tolerance == written(name).export.tolerance


@pytest.mark.parametrize("name", NAMES)
def test_an_export_is_verified_under_its_own_name(written: Run, name: str) -> None:
    found = check(written(name).folder, "cpu")
    assert found.passed
    assert found.loader == name


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_loading_reads_is_verified(written: Run, name: str, tmp_path: Path) -> None:
    files = [*file_digests(written(name).folder)]
    assert files

    def add_a_blank(copied: Path) -> None:
        with (copied / files[0]).open("ab") as stream:
            stream.write(b" ")

    folder = damaged(written(name).folder, tmp_path, add_a_blank)
    with pytest.raises(CheckpointError, match=re.escape(files[0]) + ".*have changed"):
        check(folder, "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_of_the_weights_is_found(written: Run, name: str, tmp_path: Path) -> None:
    weights = max(
        (
            path
            for path in written(name).folder.rglob("*")
            if path.name != PROBE.name and path.is_file()
        ),
        key=lambda path: (path.suffix != ".json", path.suffix != ".html", path.stat().st_size),
    ).relative_to(written(name).folder)

    def flip(copied: Path) -> None:
        data = bytearray((copied / weights).read_bytes())
        data[-1] ^= 1
        (copied / weights).write_bytes(data)

    with pytest.raises(CheckpointError, match="have changed"):
        check(damaged(written(name).folder, tmp_path, flip), "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_format_cannot_hold_is_refused_with_layer_and_format(name: str) -> None:
    for method in METHODS.values():
        planned, shapes = {"blocks.7.up": method()}, {"blocks.7.up": (33, 48)}
        try:
            EXPORTS[name].check(planned, shapes)
        except RecipeError as error:
            assert f"{name} cannot hold blocks.7.up: " in str(error)
        else:
            assert EXPORTS[name].problem(method(), (33, 48)) == ""


@pytest.mark.parametrize("name", NAMES)
def test_what_servers_refuse_is_warned_of(name: str) -> None:
    """Of 3 bits with zero points in every layer, and in one of a set that servers compute as one."""
    odd, kind = RTN(bits=3, group_size=48, symmetry="asymmetric"), EXPORTS[name]  # type: ignore[arg-type]
    parts = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    shapes = dict.fromkeys(parts, (96, 96))
    refused = []
    for compressors in (dict.fromkeys(parts, odd), {parts[0]: odd, parts[1]: RTN(bits=4)}):
        refused.append(kind.refusals(compressors, shapes))
        assert set(refused[-1]) <= set(kind.warnings(compressors, shapes))
    expected = {"gptq": (True, True), "compressed-tensors": (False, True)}
    assert tuple(map(bool, refused)) == expected.get(name, (False, False))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_does_not_write_a_format_refuses_it(name: str, workspace: Path) -> None:
    for use in set(Use) - EXPORTS[name].traits.uses:
        job = recipe(workspace, export=(name,))
        if use is Use.ON_BASE:
            base(workspace)
            job = on_base(workspace, export=(name,))
        with pytest.raises(RecipeError, match=f"export: {name} is written by runs .*, not {use}"):
            compress.plan(job)
    assert all((name in formats_for(use)) == (use in EXPORTS[name].traits.uses) for use in Use)


# The card


def sections(card: str) -> dict[str, str]:
    """Text by title; the introduction's title is empty."""
    parts = re.split(r"^## (.*)$", card.split("---\n", 2)[2], flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_card_loads_the_export_by_its_own_text(written: Run, name: str) -> None:
    loading = sections(written(name).card)["How to load it"]
    assert name in loading.lower()
    assert "THIS_FOLDER" in loading
    for block in re.findall(r"```python\n(.*?)```", loading, flags=re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_how_large_the_export_is(written: Run, name: str) -> None:
    assert re.search(r"\d [kMG]B", sections(written(name).card)[""])


@pytest.mark.parametrize("name", NAMES)
def test_the_card_of_several_exports_has_each_format_once(written: Run, name: str) -> None:
    """With another format's name in its place, the card has that one's words."""
    found = written(name)
    other = next(each for each in NAMES if each != name and not EXPORTS[each].traits.needs_base)
    both = compress_report_with(found.report, name, other)
    card = model_card(both)
    for each in (name, other):
        assert f"| {each} | `{each}` | " in card
        assert f" | {EXPORTS[each].traits.weights} |" in card
    loading = sections(card)["How to load it"]
    assert loading.count("THIS_FOLDER/" + name) >= 1 <= loading.count("THIS_FOLDER/" + other)


def compress_report_with(report: Report, *names: str) -> Report:
    """The report of a run with an export in each of these formats."""
    data: dict[str, Any] = json.loads(report.to_json())
    (export,) = data["exports"]
    data["exports"] = [export | {"format": name, "folder": name, "adapter": None} for name in names]
    return Report.from_json(json.dumps(data))


def test_every_format_has_words_of_its_own(written: Run) -> None:
    for member in ("how_to_load", "how_to_serve", "introduction"):
        texts = [getattr(kind, member) for kind in EXPORTS.values()]
        assert all(text.__func__ is not getattr(Exporter, member).__func__ for text in texts)
    cards = [sections(written(name).card)["How to load it"].partition(":")[0] for name in NAMES]
    assert len(set(cards)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [None, 4])
def test_the_name_of_a_repository_ends_in_the_format(name: str, bits: int | None) -> None:
    made = MadeOf(bits=bits, method="EoRA", rank=64)
    refuse_bad_id(f"me/Model-135M{EXPORTS[name].repository_suffix(made)}", "publish_as")
    others = {kind.repository_suffix(made) for kind in EXPORTS.values()}
    assert len(others) == len(EXPORTS)


@pytest.mark.parametrize("name", NAMES)
def test_the_front_matter_is_what_the_format_says(written: Run, name: str) -> None:
    found = written(name)
    matter = yaml.safe_load(found.card.split("---\n")[1])
    assert matter["library_name"] == found.kind.traits.library
    assert found.kind.traits.relation in ("quantized", "adapter", "finetune", "merge")


def test_a_report_of_a_format_that_is_not_installed_is_refused_by_the_card(written: Run) -> None:
    report = compress_report_with(written("native").report, "nowhere")
    with pytest.raises(CheckpointError, match="'nowhere' is no format that is installed here"):
        model_card(report)


# Inspection


@pytest.mark.parametrize("name", NAMES)
def test_inspection_tells_every_byte_of_an_export(written: Run, name: str) -> None:
    found = written(name)
    told = inspect(str(found.folder), progress=no_progress)
    assert told.n_bytes == found.export.tensor_bytes
    assert len(told.layers) >= len(found.report.layers)
    assert all(tensor.stored for tensor in told.tensors)
    contents = found.kind.contents(found.folder, no_progress)
    if contents is None:
        assert told.ordinary is not None
    else:
        assert told.ordinary is None
        assert name in told.format or found.kind.traits.needs_base


# The definition


def test_a_format_that_leaves_something_out_is_refused_when_it_is_defined() -> None:
    with pytest.raises(PluginError, match=r"'empty' .* lacks .*how_to_load, .*traits"):

        class Empty(Exporter, name="empty"):  # type: ignore[call-arg]
            pass

    assert "empty" not in EXPORTS


def test_no_constant_of_a_format_has_a_default() -> None:
    with pytest.raises(TypeError, match="13 required keyword-only arguments"):
        Traits()  # type: ignore[call-arg]


def test_two_formats_that_recognise_a_folder_are_refused(
    written: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EXPORTS["gptq"], "is_in", classmethod(lambda *_: True))
    with pytest.raises(CheckpointError, match="looks like gptq and native at once"):
        load_export(written("native").folder)


# Another distribution's format, from the command line


@pytest.mark.usefixtures("quick_verification")
def test_the_commands_know_a_format_of_another_distribution(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(workspace, export=(HALF,)).to_yaml(), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert HALF in capsys.readouterr().out
    assert main(["plan", str(path)]) == 0
    assert f"whole checkpoint, {HALF}: " in capsys.readouterr().out
    assert main(["run", str(path)]) == 0
    out = workspace / "out"
    assert "are halved after compression" in (out / "README.md").read_text()
    assert main(["inspect", str(out)]) == 0
    assert "half, written by half-export" in capsys.readouterr().out
    assert main(["report", str(out)]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("quick_verification")
def test_a_fresh_process_verifies_a_format_of_another_distribution(workspace: Path) -> None:
    compress.run(recipe(workspace, export=(HALF,)))
    assert verify(workspace / "out").loader == HALF
