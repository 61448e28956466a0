"""The programs in the README and in the documents run as they are printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def programs(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(
    "program", programs("README.md"), ids=["linen", "nnx", "function", "fewer"]
)
def test_program_of_the_readme_runs(program):
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    report = names["fc"].report
    assert any(row.rule in ("collapse", "compress") for row in report), [r.reason for r in report]


def test_claims_of_when_exact_hold():
    names = {}
    for program in programs("docs/when-exact.md"):  # each goes on where the one before ended
        exec(compile(program, "when-exact.md", "exec"), names)
    assert "radial" in {row.rule for row in names["fc"].report}
