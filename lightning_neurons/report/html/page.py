"""Page of a run: one HTML file with all results in its folder."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_neurons.errors import ArgumentError
from lightning_neurons.report.figures.drawing import can_draw
from lightning_neurons.report.html import overview, studies
from lightning_neurons.report.html.layer_pages import layer_pages
from lightning_neurons.report.html.overview import deadness
from lightning_neurons.report.html.parts import Facts, Part, Section, Words
from lightning_neurons.report.html.run_folder import RunFolder
from lightning_neurons.report.logging.images import FOLDER
from lightning_neurons.results.whole_file import Place, inside, on_this_machine, place_of, write_whole

_NAME = "report.html"
_NO_FIGURES = "Figures are left out, as matplotlib is not installed: pip install 'lightning_neurons[figures]'"


def write_html(directory: str | Path, path: str | Path | None = None) -> Place:
    """Write all results in the folder of a run as one HTML file, which loads nothing from anywhere.

    Args:
        directory: The folder; neurons.json must be there, all else may.
        path: Where to write; None writes report.html into the folder.

    Returns:
        The file.

    Raises:
        ArgumentError: If there is no readable neurons.json, or the file cannot be written.
    """
    with on_this_machine(directory, FOLDER) as folder:
        page = html_of(RunFolder.read(folder))
    target = inside(directory, _NAME) if path is None else place_of(path)
    try:
        write_whole(target, page)
    except OSError as error:
        raise ArgumentError.of("path", str(target), f"a file that can be written ({error})") from error
    return target


def html_of(run: RunFolder) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=PackageLoader("lightning_neurons.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_source(environment, name) for name in ("style.css", "script.js"))
    page = environment.get_template("report.html.j2").render(
        title=overview.title_of(run.directory),
        sections=[section for section in _sections(run) if section.parts],
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # JSON can name half of a character


def _sections(run: RunFolder) -> tuple[Section, ...]:
    drawing = can_draw()
    return (
        overview.overview(run),
        overview.layers(run.report),
        overview.rankings(run.report),
        deadness(run, drawing=drawing),
        studies.cards(run),
        studies.gallery(run),
        studies.ablation(run, drawing=drawing),
        studies.pruning(run, drawing=drawing),
        studies.classes(run),
        layer_pages(run, drawing=drawing),
        _settings(run),
        Section("notes", "Notes", "", _notes(run, drawing)),
    )


def _settings(run: RunFolder) -> Section:
    said = {name: _words(value) for name, value in run.report.settings.items() if value is not None}
    parts: list[Part] = [Facts("How it was measured", said)] if said else []
    if run.versions:
        parts.append(Facts("Versions of packages", run.versions))
    return Section("settings", "Settings", "", tuple(parts))


def _notes(run: RunFolder, drawing: bool) -> tuple[Part, ...]:
    lines = run.notes if drawing else (*run.notes, _NO_FIGURES)
    return (Words(lines),) if lines else ()


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _source(environment: Environment, name: str) -> str:
    """Read a file that goes into the page as it is.

    Returns:
        The text of the file, not rendered.
    """
    assert environment.loader is not None, "given above"
    return environment.loader.get_source(environment, name)[0]


def _hash(source: str) -> str:
    """Return the hash by which the page's content security policy allows its own script and style, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
