"""The package as a newcomer gets it: a wheel, installed without the clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kdlib as kd

ROOT = Path(__file__).parents[1]
USE = """
import sys
import kdlib as kd
assert not {"pandas", "sklearn", "transformers", "matplotlib"} & set(sys.modules), "importing kdlib is light"
assert "wheel" in kd.__file__, kd.__file__
digits, toys = kd.data.images("digits"), kd.data.text("toy_requests")
print(len(digits.train), len(toys.train), kd.lesson("01").__name__)
kd.exercises.check("01.1", kd.exercises.exercises("01")["01.1"].right)
"""


def test_a_wheel_holds_what_a_reader_needs(tmp_path):
    source = tmp_path / "source"
    for part in ("kdlib", "data", "notebooks/exercises"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("LICENSE*"), ROOT / "README.md", ROOT / "pyproject.toml", *ROOT.glob("notebooks/*.ipynb")]:
        shutil.copy(path, source / path.relative_to(ROOT))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 5e6
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "wheel", wheel], check=True)
    shutil.rmtree(source)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "wheel")}
    done = subprocess.run(
        [sys.executable, "-c", USE], capture_output=True, text=True, cwd=tmp_path, env=environment | {"PYTHONUTF8": "1"}
    )
    assert not done.returncode, done.stderr
    assert "lesson_01" in done.stdout and "✓ 01.1" in done.stdout
    assert not list((tmp_path / "wheel" / "kdlib" / "lessons").glob("studies*")), "studies stay in the clone"


def test_the_version_and_address_are_the_same_everywhere():
    citation, project = ((ROOT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "pyproject.toml"))
    assert f"\nversion: {kd.__version__}\n" in citation and f'\nversion = "{kd.__version__}"\n' in project
    assert 'repository-code: "https://github.com/kdlib/kdlib"' in citation and "github.com/kdlib/kdlib" in project
