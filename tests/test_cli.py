"""The command line: what argv becomes, what help shows, how errors end."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from reports import make_report

from compress.cli.commands import COMMANDS
from compress.cli.main import main
from compress.config.flags import Flags, Parser
from compress.config.options import build
from compress.config.recipe import Recipe
from compress.errors import LayerError, RecipeError


class Tool:
    """What a field of another options class is declared as."""


@dataclass(frozen=True, kw_only=True)
class Saw(Tool):
    """Cuts."""

    teeth: int = field(default=24, metadata={"help": "how many (50 % is a share)"})
    force: float = field(default=1.0, metadata={"help": "in newtons", "metavar": "NEWTONS"})


@dataclass(frozen=True, kw_only=True)
class Drill(Tool):
    """Bores."""

    force: float = field(default=2.0, metadata={"help": "in newtons", "metavar": "NEWTONS"})
    holder: Tool = field(default_factory=Saw, metadata={"help": "what holds it"})


@dataclass(frozen=True, kw_only=True)
class Job:
    """The root."""

    wood: tuple[str, ...] = field(default=("oak",), metadata={"help": "kinds", "group": "general"})
    n_boards: int = field(default=1, metadata={"help": "boards", "group": "general"})
    tool: Tool = field(default_factory=Drill, metadata={"help": "which", "group": "method"})
    score: str = field(default="high", metadata={"help": "aim", "group": "evaluation"})


TOOLS = {"saw": Saw, "drill": Drill}


def job(arguments: Sequence[str], values: dict[str, object] | None = None) -> Job:
    mapping, _ = Flags(Job, TOOLS).parse(values or {}, arguments, Parser("job", "", ""))
    return build(Job, mapping, "job", TOOLS)


def help_of(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        job([*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_no_flags_give_the_defaults() -> None:
    assert job([]) == Job()


def test_full_corrections_and_unique_endings_mean_the_same() -> None:
    expected = Job(tool=Drill(holder=Saw(teeth=3)))
    for flag in ("--tool.holder.teeth", "--holder.teeth", "--teeth"):
        assert job([flag, "3"]) == job([f"{flag}=3"]) == expected
    assert job(["--n-boards", "2"]) == job(["--n_boards", "2"]) == Job(n_boards=2)


def test_an_ambiguous_ending_is_refused_with_its_candidates() -> None:
    with pytest.raises(RecipeError) as caught:
        job(["--force", "3"])
    assert str(caught.value) == (
        "--force: could be --tool.force or --tool.holder.force; write one of these"
    )
    assert job(["--tool.force", "3"]).tool == Drill(force=3.0)
    assert job(["--holder.force", "3"]).tool == Drill(holder=Saw(force=3.0))


def test_a_beginning_of_a_flag_is_not_a_flag() -> None:
    with pytest.raises(RecipeError, match=r"--teet: no such option \(did you mean --teeth\?\)"):
        job(["--teet", "3"])


def test_flags_override_yaml_and_yaml_overrides_defaults() -> None:
    values: dict[str, object] = {"n_boards": 5, "tool": {"force": 9, "holder": {"teeth": 8}}}
    assert job([], values) == Job(n_boards=5, tool=Drill(force=9.0, holder=Saw(teeth=8)))
    assert job(["--teeth", "7"], values).tool == Drill(force=9.0, holder=Saw(teeth=7))


def test_a_choice_on_the_command_line_brings_its_own_options() -> None:
    assert job(["--teeth", "5", "--tool", "saw"]).tool == Saw(teeth=5)
    nested = job(["--tool", "drill", "--holder", "drill"])
    assert nested.tool == Drill(holder=Drill())


def test_naming_the_method_of_the_yaml_keeps_its_options_and_another_drops_them() -> None:
    values: dict[str, object] = {"tool": {"name": "saw", "teeth": 9}}
    assert job(["--tool", "saw"], values).tool == Saw(teeth=9)
    assert job(["--tool", "drill"], values).tool == Drill()
    assert job(["--force", "3"], {"tool": "saw"}).tool == Saw(force=3.0)


def test_the_last_of_two_equal_flags_counts() -> None:
    assert job(["--tool", "saw", "--tool", "drill"]).tool == Drill()
    assert job(["--n-boards", "2", "--n-boards", "3"]).n_boards == 3


@pytest.mark.parametrize("given", [["a", "b", "c"], ["a,b", "c"], ["a,b,c"], ["a, b", ",c"]])
def test_lists_take_spaces_and_commas(given: list[str]) -> None:
    assert job(["--wood", *given]).wood == ("a", "b", "c")


def test_none_is_the_empty_list_and_so_is_a_flag_alone() -> None:
    assert job(["--wood", "none"]).wood == job(["--wood"]).wood == ()
    assert job([], {"wood": "none"}).wood == job([], {"wood": ["none"]}).wood == ()
    assert job(["--wood", "none", "oak"]).wood == ("none", "oak")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n-boards", "four"], "job.n_boards: 'four' does not fit; it takes a whole number"),
        (["--n-boards"], "expected one argument; job --help lists the options"),
        (["--tool", "sww"], "--tool: there is no 'sww'; there are drill, saw (did you mean saw?)"),
        (["--holder.tooth", "1"], "--holder.tooth: no such option"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_wrong_flag_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        job(arguments)
    assert message in str(caught.value)


def test_help_shows_only_the_options_of_the_chosen_methods(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_drill = help_of(["--tool", "drill"], capsys)
    assert "--teeth TEETH" in with_drill
    assert "--tool.force NEWTONS" in with_drill
    with_saw = help_of(["--tool", "saw", "--teeth", "4"], capsys)
    assert "holder" not in with_saw
    assert "how many (50 % is a share) (default: 24)" in with_saw
    titles = re.findall(r"^(\S.*):$", with_saw, flags=re.MULTILINE)
    assert titles == ["options", "general", "tool: Saw, Cuts", "evaluation"]


def test_help_without_a_method_shows_the_options_of_the_job_and_the_names_of_methods(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = help_of(["--wood", "fir"], capsys)
    assert "--tool TOOL" in shown
    assert "which: drill, saw" in shown
    assert "--teeth" not in shown
    titles = re.findall(r"^(\S.*):$", shown, flags=re.MULTILINE)
    assert titles == ["options", "general", "method", "evaluation"]


def test_a_flag_of_the_default_method_brings_that_methods_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "--tool.force NEWTONS" in help_of(["--teeth", "3"], capsys)


class Uncalled(dict[str, type]):
    """A registry whose classes must not be looked at."""

    def __getitem__(self, name: str) -> type:
        raise AssertionError(f"{name} was looked up")


def test_flags_of_the_job_itself_look_no_method_up() -> None:
    flags = Flags(Job, Uncalled(TOOLS))
    arguments = ["--n-boards", "2", "--wood", "fir", "--score=low"]
    mapping, _ = flags.parse({"n_boards": 1}, arguments, Parser("job", "", ""))
    assert mapping == {"n_boards": "2", "wood": ("fir",), "score": "low"}


def test_a_command_may_take_some_options_only() -> None:
    flags = Flags(Job, TOOLS, ("score",))
    assert [option.path for option in flags.options({})] == [("score",)]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Recipes that `compress run` hands to the pipeline, which then stops."""
    recipes: list[Recipe] = []

    def stop(recipe: Recipe, **_: object) -> None:
        recipes.append(recipe)
        raise RecipeError("stopped here")

    monkeypatch.setattr("compress.pipeline.main.run", stop)
    return recipes


def test_run_hands_the_recipe_to_the_pipeline(ran: list[Recipe], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("method: {name: eora, rank: 16}\nsamples: 4\n")
    main(["run", str(file), "--base", "rtn", "--bits", "3", "--tasks", "none", "--samples", "5"])
    (recipe,) = ran
    assert recipe == Recipe.from_mapping(
        {
            "method": {"name": "eora", "rank": 16, "base": {"name": "rtn", "bits": 3}},
            "samples": 5,
            "tasks": [],
        }
    )


def test_run_ends_with_every_note_of_its_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = ("2 layers were left as they were", "statistics were used again")
    monkeypatch.setattr(
        "compress.pipeline.main.run", lambda *_, **__: replace(make_report(), notes=notes)
    )
    assert not main(["run"])
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("note: ")] == [
        f"note: {it}" for it in notes
    ]


def test_a_mask_is_improved_and_corrected_by_naming_a_base_of_a_base(ran: list[Recipe]) -> None:
    names = ["--method", "eora", "--base", "dsnot", "--base.base", "sparsegpt"]
    main(["run", *names, "--pattern", "2:4", "--cycles", "9", "--method.damping", "0.1"])
    sparse = {"name": "sparsegpt", "pattern": "2:4"}
    base = {"name": "dsnot", "cycles": 9, "base": sparse}
    method = {"name": "eora", "damping": 0.1, "base": base}
    assert ran == [Recipe.from_mapping({"method": method})]


def test_an_expected_error_is_one_message_and_exit_code_two(
    ran: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run"]) == 2
    assert ran
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "error: stopped here\n")


def test_notes_of_an_error_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        error = LayerError("a weight is not finite")
        error.add_note("while compressing model.layers.0.mlp.up_proj (64, 32) with gptq")
        raise error

    monkeypatch.setattr("compress.pipeline.main.run", fail)
    assert main(["run"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: a weight is not finite"
    assert second == "while compressing model.layers.0.mlp.up_proj (64, 32) with gptq"


def test_traceback_is_shown_on_request(
    ran: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--traceback"]) == 2
    assert ran
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.pipeline.main.run", interrupt)
    assert main(["run"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_termination_cleans_up_and_is_exit_code_143(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def work(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # an impatient second one
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("compress.pipeline.main.run", work)
    assert main(["run"]) == 143
    assert capsys.readouterr().err == "error: terminated\n"
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Recipe]]:
    """What `compress eval` hands to the pipeline, which then stops."""
    asked: list[tuple[Path, Recipe]] = []

    def stop(folder: Path, recipe: Recipe, **_: object) -> None:
        asked.append((folder, recipe))
        raise RecipeError("stopped here")

    monkeypatch.setattr("compress.pipeline.main.evaluate", stop)
    return asked


@pytest.mark.parametrize("place", [0, 2])
def test_eval_takes_the_recipe_of_its_folder_wherever_that_is_named(
    evaluated: list[tuple[Path, Recipe]], tmp_path: Path, place: int
) -> None:
    (tmp_path / "recipe.yaml").write_text("model: there\nseed: 7\n")
    arguments = ["--limit", "3"]
    arguments.insert(place, str(tmp_path))
    main(["eval", *arguments])
    assert evaluated == [(tmp_path, Recipe(model="there", seed=7, limit=3))]


def test_eval_of_several_exports_takes_the_first_of_the_recipe_and_says_so(
    evaluated: list[tuple[Path, Recipe]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("export: [native, dense]\n")
    for name in ("dense", "native"):
        (tmp_path / name / "verification").mkdir(parents=True)
        (tmp_path / name / "verification" / "probe.st").touch()
    main(["eval", "--reference", "there", str(tmp_path)])
    ((folder, recipe),) = evaluated
    assert (folder, recipe.model) == (tmp_path / "native", "there")
    assert f"note: evaluating {tmp_path / 'native'}; there is also {tmp_path / 'dense'}" in (
        capsys.readouterr().err
    )


def test_eval_tells_what_changed_and_how_sure_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = make_report().scores
    monkeypatch.setattr("compress.pipeline.main.evaluate", lambda *_, **__: scores)
    assert main(["eval", "--reference", "there", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "change: perplexity: ×1.047 (1.046 to 1.047), significantly worse" in printed
    assert "change: offline_piqa, acc_norm: -0.050" in printed
    assert "  before: 'upon a'" in printed


def test_an_error_of_ours_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise AssertionError("a fault in the toolkit")

    monkeypatch.setattr("compress.pipeline.main.run", fault)
    with pytest.raises(AssertionError):
        main(["run"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "error: rum: no such command; there are run, plan"),
        (["run", "--rnk", "3"], "error: --rnk: no such option (did you mean --rank?)"),
        (["run", "--limit", "1.5"], "error: recipe.limit: '1.5' does not fit"),
        (["run", "--bits", "7"], "error: recipe.method.base.bits: 7 is not supported"),
        (
            ["run", "--damping", "1"],
            "error: --damping: could be --method.",
        ),
        (["run", "--seed", "1", "x.yaml"], "error: x.yaml: a recipe goes first"),
        (["run", "nix.yaml"], "error: nix.yaml: cannot be read as a recipe"),
        (["report", "nix"], "error: nix: no report.json in it"),
        (["verify", "nix"], "error: nix: no such folder"),
        (["eval", "nix"], "error: nix: no such folder"),
        (["eval", "--limit", "3", "nix"], "error: nix: no such folder"),
        (["run", "--base", "eora"], "--method.base: there is no 'eora'; there are admm, "),
        (["verify"], "error: the following arguments are required: DIR"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert COMMANDS[name].about in capsys.readouterr().out


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {name} " in overview for name in COMMANDS)


def test_methods_are_listed_with_their_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    assert "arXiv:2410.21271" in capsys.readouterr().out


def test_a_strangers_package_in_the_way_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "eval.py").write_text("")
    finished = subprocess.run(
        [sys.executable, "-c", "import compress"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert "ImportError: `eval` would be imported from" in finished.stderr
    assert str(tmp_path / "eval.py") in finished.stderr
