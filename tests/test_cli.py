"""The command line, run in process."""

import re
import subprocess
import sys

import pytest

from fcjax.cli import main
from fcjax.demo import runner

NETWORKS = """
import jax.numpy as jnp

def linear():
    params = {"first": jnp.ones((8, 64)), "second": jnp.ones((64, 2))}
    return lambda p, x: x @ p["first"] @ p["second"], params, jnp.ones((1024, 8))

def small():
    params = {"first": jnp.arange(1.0, 5.0).reshape(2, 2), "second": jnp.eye(2)}
    return lambda p, x: x @ p["first"] @ p["second"], params, jnp.ones((4, 2))

def not_a_tuple():
    return 3

def no_network():
    return "no function", {}

number = 1
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    (tmp_path / "cli_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    yield "cli_networks"
    sys.modules.pop("cli_networks", None)


def test_inspect_prints_the_report(networks, capsys):
    path = list(sys.path)
    assert main(["inspect", f"{networks}:linear"]) == 0
    assert "first" in capsys.readouterr().out
    assert sys.path == path


def test_laws_prints_the_table_and_draws(networks, tmp_path, capsys):
    picture = tmp_path / "laws.png"
    assert main(["laws", f"{networks}:small", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "3 conservation laws" in printed
    assert "3 of 4 hidden degrees of freedom" in printed
    assert f"saved {picture}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_laws_refuses_a_missing_folder(networks, tmp_path, capsys):
    assert main(["laws", f"{networks}:small", "--plot", str(tmp_path / "missing" / "a.png")]) == 1
    assert "--plot" in capsys.readouterr().err


def test_merge_prints_what_is_left(networks, capsys):
    assert main(["merge", f"{networks}:linear"]) == 0
    assert "first+second/kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cli_networks", "'cli_networks' is not of the form module:function"),
        (":linear", "is not of the form module:function"),
        ("cli_missing:linear", "there is no module 'cli_missing'"),
        ("cli_networks:missing", "cli_networks has no function 'missing'"),
        ("cli_networks:number", "cli_networks has no function 'number'"),
        ("cli_networks:not_a_tuple", "must return a tuple .* returns a int"),
        ("cli_networks:no_network", "must return a tuple"),
    ],
)
def test_inspect_explains_a_bad_spec(networks, capsys, spec, message):
    assert main(["inspect", spec]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fcjax: error: ")
    assert re.search(message, error)


def test_demo_runs_and_saves_a_picture(tmp_path, capsys, monkeypatch):
    # Two of its nine networks, which compile fast; tests/test_demo.py sets up the others.
    for name, chosen in (("collapsed_tasks", "ReLU classifier"), ("reduced_tasks", "diagonal net")):
        monkeypatch.setattr(runner, name, _only(getattr(runner, name), chosen))
    output = tmp_path / "demo.png"
    assert main(["demo", "--quick", "--steps", "2", "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for text in ("folded", "accuracy", "A/A", "temp MiB", "none", "optimizer", "fewer", "3.0x"):
        assert text in printed


def _only(tasks, name):
    return lambda: [task for task in tasks() if task.name == name]


def test_demo_refuses_a_missing_folder(tmp_path, capsys):
    assert main(["demo", "--quick", "--output", str(tmp_path / "missing" / "demo.png")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_demo_without_its_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("fcjax.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 1
    assert "pip install 'fcjax[demo]'" in capsys.readouterr().err


def test_steps_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--steps", "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_module_is_the_command():
    command = [sys.executable, "-m", "fcjax", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "inspect" in printed
    assert "demo" in printed
