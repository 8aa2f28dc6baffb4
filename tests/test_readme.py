"""The README's code runs, and its commands name flags and files that exist."""

import pathlib
import re
import shlex

import pytest

from condconv.engine import config

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.removeprefix(".venv/bin/python ")
    for block in re.findall(r"```\n(.*?)```", README, re.DOTALL)
    for line in map(str.strip, block.replace("\\\n", " ").splitlines())
    if line.startswith(".venv/bin/python ")
]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_code_runs(number, capsys):
    names: dict[str, object] = {}
    exec(BLOCKS[number], names)
    if "my_net" in names:
        static, conditional = names["my_net"](), names["my_net"](num_experts=4)
        assert conditional.count_params() > static.count_params()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_name_what_exists(command):
    script, *arguments = shlex.split(command)
    source = (ROOT / script).read_text()
    for argument in arguments:
        if argument.startswith("--"):
            flag, _, value = argument.removeprefix("--").partition("=")
            assert f'"{flag}"' in source
            if flag == "gin_file" and "$" not in value:
                assert (ROOT / value).exists()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_there_is_code_and_there_are_commands():
    assert len(BLOCKS) == 4
    assert len(COMMANDS) >= 4


def test_the_config_of_the_data_section_is_valid():
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    (block,) = (b for b in blocks if b.startswith("Experiment.data = @pipeline"))
    config.load([str(ROOT / "configs" / "synthetic.gin")], [block])
