"""What the pages promise exists: links lead somewhere, and every option in a command is one that the command has."""

import contextlib
import io
import re
from functools import cache

import pytest

from tests.support.pages import bash_lines
from tests.support.paths import ROOT
from unlearn_ds import cli

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "kernels" / "README.md"])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
COMMAND = re.compile(r"unlearn-ds (?P<command>[a-z]+)(?: (?P<bench>[a-z]+))?|-m(?:odule)? (?P<module>unlearn_ds[\w.]*)")


@cache
def flags_of(*words: str) -> frozenset[str]:
    """The options that `unlearn-ds WORDS --help` lists."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return frozenset(re.findall(r"--[a-z_0-9]+", text.getvalue()))


def commands_in(page: str) -> list[tuple[tuple[str, ...], str]]:
    """(words of the command, its line) for every command of ours in the fenced blocks of a page."""
    found = []
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            match = COMMAND.search(line)
            if not match:
                continue
            if match["module"]:
                modules = {module: (name,) for name, (module, _) in cli.COMMANDS.items()}
                words = modules.get(match["module"])
            else:
                words = ("bench", match["bench"]) if match["command"] == "bench" else (match["command"],)
            if words:
                found.append((words, line[match.end() :].split("#")[0]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_options_they_are_shown_with(page):
    for words, rest in commands_in(page.read_text(encoding="utf-8")):
        assert words[0] in cli.COMMANDS, f"{page.name}: unlearn-ds {' '.join(words)}"
        if words[0] == "bench":
            assert words[1] in cli.BENCHES, f"{page.name}: unlearn-ds {' '.join(words)}"
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9]*", rest)) - flags_of(*words)
        assert not unknown, f"{page.name}: unlearn-ds {' '.join(words)} has no {sorted(unknown)}"


@pytest.mark.parametrize("command", [*cli.COMMANDS, *(f"bench {name}" for name in cli.BENCHES)])
def test_every_command_has_help(command):
    assert "--help" in flags_of(*command.split()) or command == "bench"


def test_the_readme_shows_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "bash launch/demo.sh" in text.split("## ")[0]
    assert "bash launch/test.sh" in text.split("## ")[0]


def test_the_readme_s_cluster_lines_are_those_that_are_tried():
    """But for the number of nodes they stand in docs/cluster.md, whose lines test_slurm.py and test_multinode.py type."""

    def plain(line: str) -> str:
        return re.sub(r"(--nodes[= ])\d+", r"\1N", line.split("#")[0].strip())

    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## SLURM, and several hosts\n")[1]
    shown = re.search(r"^```[a-z]*\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1].splitlines()
    headings = ("SLURM", "Hosts without a batch system", "What will it take? `unlearn-ds plan`")
    tried = {plain(line) for heading in headings for line in bash_lines(heading)}
    assert [line for line in map(plain, shown) if line not in tried] == []
