"""The README's programs run as they are printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=["linen", "nnx", "function", "fewer"])
def test_program_runs(program):
    names = {}
    exec(compile(program, str(README), "exec"), names)
    report = names["fc"].report
    assert any(row.rule in ("collapse", "compress") for row in report), [r.reason for r in report]
