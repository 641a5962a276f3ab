"""What the HTML report reads, what it leaves out and refuses, and the command."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from lightning_neurons import ArgumentError
from lightning_neurons.cli import main
from lightning_neurons.report.html.page import write_html
from lightning_neurons.report.html.run_folder import RunFolder
from tests.report.runs import Read, fill, put_list, put_picture
from tests.tables import for_each


def notes(folder: Path) -> str:
    return " ".join(RunFolder.read(folder).notes)


def test_a_folder_without_a_report_is_refused_with_the_one_that_was_meant(bare):
    with pytest.raises(ArgumentError, match=r"neurons\.json; did you mean '.*version_0'\?"):
        write_html(bare.parent)
    with pytest.raises(ArgumentError, match=r"directory='.*nowhere' is not allowed: .*neurons\.json"):
        write_html(bare.parent / "nowhere")


def test_of_several_runs_the_newest_is_suggested(bare, reports):
    later = bare.parent / "version_1"
    reports[1].save(later / "neurons.json")
    os.utime(bare / "neurons.json", (1, 1))
    with pytest.raises(ArgumentError, match="version_1"):
        write_html(bare.parent)


@for_each(
    "text", ["", "{", "[]", '{"format": "other"}', '{"format": "lightning_neurons report", "version": 99}', "\xff"]
)
def test_a_broken_report_is_refused(tmp_path, text):
    (tmp_path / "neurons.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArgumentError, match="directory="):
        write_html(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "name, text",
    [
        ("history", ""),
        ("pruning", "{"),
        ("ablation", "[1]"),
        ("classes", "{}"),
        ("pictures/pictures", ""),
        ("pictures/cards", "[1]"),
        ("pruning", '{"format": "lightning_neurons history", "version": 99}'),
        ("history", '{"format": "lightning_neurons history", "version": 99}'),
    ],
)
def test_a_broken_file_that_need_not_be_there_is_a_note(bare, no_figures, name, text):
    path = bare / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    found = Read(write_html(bare).read_text(encoding="utf-8"))
    assert found.all("section", "id")[-1] == "notes"
    assert any(f"{path.name} is left out" in line for line in (*found.text("p"), *found.text("li")))


@pytest.mark.parametrize("kind", ["history", "pruning", "ablation", "classes"])
def test_a_file_of_a_newer_version_is_a_note(tmp_path, reports, kind):
    fill(tmp_path, reports)
    document = json.loads((tmp_path / f"{kind}.json").read_text())
    (tmp_path / f"{kind}.json").write_text(json.dumps(document | {"version": 99}))
    assert f"{kind}.json is left out" in notes(tmp_path)


@pytest.mark.parametrize(
    "name, why",
    [
        ("../../secret.png", "outside"),
        ("../neurons.json", "outside"),
        ("missing.png", "no such file"),
        ("text.png", "no PNG"),
        ("", "no such file"),
        ("a\0b", "null"),
    ],
)
def test_a_picture_that_cannot_be_shown_is_left_out_with_a_note(bare, name, why):
    put_picture(bare, "good.png", 8)
    (bare / "pictures" / "text.png").write_text("not a picture")
    Image.new("RGB", (8, 8)).save(bare.parent / "secret.png")
    put_list(bare, "pictures", [{"file": name}, {"file": "good.png"}])
    run = RunFolder.read(bare)
    assert [picture.path.name for picture in run.gallery] == ["good.png"]
    assert why in " ".join(run.notes)


def test_a_picture_that_would_make_the_page_huge_is_left_out_with_a_note(bare):
    put_picture(bare, "large.png", 8)
    with (bare / "pictures" / "large.png").open("ab") as file:
        file.truncate(9 << 20)
    put_list(bare, "pictures", [{"file": "large.png"}])
    assert "large.png' is left out: it has 9 MB, and a page takes images of at most 8 MB" in notes(bare)
    assert write_html(bare).stat().st_size < 1 << 20


def test_a_link_that_leads_out_of_the_folder_is_not_followed(bare):
    Image.new("RGB", (8, 8)).save(bare.parent / "secret.png")
    (bare / "pictures").mkdir()
    (bare / "pictures" / "link.png").symlink_to(bare.parent / "secret.png")
    put_list(bare, "pictures", [{"file": "link.png"}])
    assert RunFolder.read(bare).gallery == ()
    assert "outside" in notes(bare)


def test_the_command_writes_the_page_and_says_where(bare, no_figures, capsys):
    main(["report", str(bare)])
    assert capsys.readouterr().out.strip() == str(bare / "report.html")


def test_the_command_says_in_one_line_what_is_wrong_with_a_folder(bare, no_figures, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", str(bare.parent)])
    said = str(ended.value.code)
    assert said.startswith("lightning_neurons report: directory=")
    assert "did you mean" in said
    assert "\n" not in said
    with pytest.raises(SystemExit) as ended:
        main(["report"])
    assert ended.value.code == 2
    assert "run_dir" in capsys.readouterr().err
