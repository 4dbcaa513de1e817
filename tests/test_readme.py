"""The READMEs: as long as their readers have time for, and what they point at exists."""

import re
import tomllib

import pytest

import petseg_utils as pets

FILES = {"README.md": 900, "experiments/README.md": 3350}  # and the most words
TEXTS = {name: (pets.ROOT / name).read_text(encoding="utf-8") for name in FILES}


def read_toml(name: str) -> dict:
    """Return a file of the folder grading/."""
    return tomllib.loads((pets.ROOT / "grading" / f"{name}.toml").read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """Return the names under which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("name", FILES)
def test_readme_is_no_longer_than_readers_have_time_for(name):
    words = len(TEXTS[name].split())
    print(f"{name}: {words} words")
    assert words <= FILES[name]


@pytest.mark.parametrize("name", FILES)
def test_files_and_sections_that_a_readme_links_to_exist(name):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", TEXTS[name])
    assert links
    for path, anchor in links:
        target = (pets.ROOT / name).parent / path if path else pets.ROOT / name
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), (path, anchor)


@pytest.mark.parametrize("name", FILES)
def test_commands_of_a_readme_are_those_of_the_makefile(name):
    students = read_toml("student")["makefile"]  # their edition has one of its own
    makefile = (pets.ROOT / "Makefile").read_text(encoding="utf-8") + students
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"\$\((?:if \$\()?(\w+)\)", makefile))
    commands = re.findall(r"^make .+|`make [^`]+`", TEXTS[name], re.MULTILINE)
    assert commands
    for command in commands:
        assert command.strip("`").split()[1] in targets, command
        assert set(re.findall(r"(?<= )([A-Z_]+)=", command)) <= variables, command


def test_readme_tells_what_is_written_and_what_it_is_worth():
    rubric, to_write = read_toml("rubric"), read_toml("student")["to_write"]
    text = " ".join(TEXTS["README.md"].split())
    number = {8: "eight", 9: "nine", 10: "ten"}[len(to_write)]
    assert f"with {number} functions left to write" in text
    points = sum(criterion["points"] for criterion in rubric["criterion"])
    assert f"[{len(rubric['criterion'])} criteria](grading/rubric.toml), {points} points" in text
    assert f"the pass mark is {points * rubric['pass_mark'] / 100:g}." in text
