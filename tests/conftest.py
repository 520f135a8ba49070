"""One torch thread, no network, and a small policy with a task of its own to run on."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch

from tests.project import Project, Wholes

torch.set_num_threads(1)
# the same examples every time, and no limit on how long a busy machine takes over one
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session")
def project_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: policy, problems, a module of graders."""
    return Project.make(tmp_path_factory.mktemp("project"))


@pytest.fixture
def project(project_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """That folder, as the working directory; its runs go to `tmp_path`."""
    monkeypatch.chdir(project_folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Project(project_folder, tmp_path)


@pytest.fixture(scope="module")
def whole(project_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """Runs that were not interrupted."""
    return Wholes(project_folder, lambda: tmp_path_factory.mktemp("whole"))
