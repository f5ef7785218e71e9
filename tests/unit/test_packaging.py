"""What the archives hold and install: our telemetry inside asyncsplit, none beside it."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from asyncsplit import __version__

ROOT = Path(__file__).parents[2]
DASHBOARDS = {
    f"asyncsplit/dashboards/{file.relative_to(ROOT / 'asyncsplit/dashboards').as_posix()}"
    for file in (ROOT / "asyncsplit/dashboards").rglob("*")
    if file.is_file()
}
TELEMETRY = {
    f"asyncsplit/telemetry/{file.relative_to(ROOT / 'asyncsplit/telemetry').as_posix()}"
    for file in (ROOT / "asyncsplit/telemetry").rglob("*.py")
}


def build(*arguments: str, into: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *arguments, "--outdir", into, ROOT],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return into


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel straight from the checkout."""
    return next(build("--wheel", into=tmp_path_factory.mktemp("wheel")).glob("*.whl"))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist, and the wheel from that sdist."""
    return build(into=tmp_path_factory.mktemp("release"))


def test_wheel_holds_one_typed_package_with_telemetry_inside(wheel: Path) -> None:
    names = wheel_names(wheel)

    assert wheel.name == f"asyncsplit-{__version__}-py3-none-any.whl"
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"asyncsplit"}
    assert {"asyncsplit/py.typed", "asyncsplit/telemetry/__init__.py"} <= names
    assert names >= TELEMETRY
    assert {name for name in names if "dashboards/" in name} == DASHBOARDS


def test_sdist_holds_telemetry_once_as_files(release: Path) -> None:
    with tarfile.open(next(release.glob("*.tar.gz"))) as archive:
        members = {
            PurePosixPath(*PurePosixPath(member.name).parts[1:]).as_posix(): member
            for member in archive
        }

    assert members.keys() >= TELEMETRY | DASHBOARDS | {
        "asyncsplit/py.typed",
        "pyproject.toml",
        "LICENSE",
    }
    assert all(members[name].isreg() for name in TELEMETRY | DASHBOARDS)
    again = ("telemetry/", "dashboards/files/")
    assert not [name for name in members if name.startswith(again)]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a checkout knows its files")
def test_sdist_holds_what_its_tests_need(release: Path) -> None:
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    links = ("asyncsplit/telemetry", "asyncsplit/dashboards")
    copies = ("telemetry/", "dashboards/files/")
    with tarfile.open(next(release.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in listed if not name.startswith((*links, *copies))} <= names


def test_wheel_from_sdist_equals_wheel_from_checkout(wheel: Path, release: Path) -> None:
    assert wheel_names(next(release.glob("*.whl"))) == wheel_names(wheel)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", target, wheel], check=True)
    return target


@pytest.mark.parametrize("order", ["user first", "asyncsplit first"])
def test_users_own_telemetry_module_and_ours_live_side_by_side(
    installed: Path, tmp_path: Path, order: str
) -> None:
    (tmp_path / "telemetry.py").write_text('WHO = "user"\n')
    path = [tmp_path, installed] if order == "user first" else [installed, tmp_path]
    program = (
        "import asyncsplit.telemetry, telemetry\n"
        "print(telemetry.WHO, telemetry.__file__, asyncsplit.telemetry.__file__, sep='\\n')"
    )

    # -P keeps the current directory, which may be the checkout, off sys.path.
    output = subprocess.check_output(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        text=True,
    )

    assert output.splitlines() == [
        "user",
        str(tmp_path / "telemetry.py"),
        str(installed / "asyncsplit/telemetry/__init__.py"),
    ]


def test_what_the_wheel_needs_is_what_is_installed(installed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pip", "check"],
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_dashboards_are_exported_where_only_the_wheel_is_installed(
    installed: Path, tmp_path: Path
) -> None:
    program = "import sys; from asyncsplit.cli import main; sys.exit(main(sys.argv[1:]))"
    output = subprocess.check_output(
        [sys.executable, "-P", "-c", program, "dashboards", "export", tmp_path],
        env={**os.environ, "PYTHONPATH": str(installed)},
        text=True,
    )
    assert output.splitlines() == sorted(
        str(tmp_path / name.removeprefix("asyncsplit/dashboards/")) for name in DASHBOARDS
    )


def test_what_takes_long_to_import_waits_until_it_is_used() -> None:
    heavy = (
        *("jax", "tensorflow", "torch", "ray.train"),
        *("matplotlib", "opentelemetry.sdk", "opentelemetry.exporter", "rich"),
    )
    print_those_loaded = f"import sys, asyncsplit; print(*{{*{heavy}}} & set(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", print_those_loaded], check=True, capture_output=True, text=True
    )
    assert loaded.stdout.split() == []
