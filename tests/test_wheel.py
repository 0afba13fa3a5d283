"""What is published: the wheel that the build backend makes of this tree."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_has_the_package_whole_and_nothing_else(tmp_path):
    """What users install imports by itself, has every module and the type marker, and neither tests nor scripts."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("shardckpt-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(installed)
    source = ROOT / "src"
    assert packed == {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); import shardckpt; print(shardckpt.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert Path(done.stdout.strip()).is_relative_to(installed)
