"""What runs on GitHub is well formed, and runs what a developer runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("vendor.github-issue-forms", [GITHUB / "ISSUE_TEMPLATE" / "bug.yml"]),
        ("vendor.github-issue-config", [GITHUB / "ISSUE_TEMPLATE" / "config.yml"]),
    ],
)
def test_file_fits_githubs_schema(schema: str, files: list[Path]) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_make_targets_of_a_workflow_exist(workflow: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in re.findall(r"run: make (.*)", workflow.read_text(encoding="utf-8")):
        for target in line.split():
            assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target


def test_ci_runs_everything_that_needs_no_gpu() -> None:
    jobs = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    targets = ("lint types", "pytest", "test-matrix", "test-tensorrt", "test-wheel", "docs")
    assert commands >= {f"make {each}" for each in targets}
    assert jobs["tests"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.13"]


def test_release_checks_the_version_that_the_package_has() -> None:
    version = (ROOT / "runtime" / "trtower" / "__init__.py").read_text(encoding="utf-8")
    (pattern,) = re.findall(
        r"sed -n 's/(.*?)/\\1/p'", (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")
    )
    assert re.search(pattern.replace(r"\(", "(").replace(r"\)", ")"), version, flags=re.MULTILINE)


def test_bug_report_asks_for_what_inspect_says() -> None:
    assert "trtower inspect BUNDLE --why --json" in (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
