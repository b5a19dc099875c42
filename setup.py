"""What pyproject.toml cannot say: ``ds_configs/`` lies beside the package here, and inside it where it is
installed."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

KNOBS = "ds_configs"


class BuildWithKnobs(build_py):
    """Copies ``ds_configs/*.json`` into the built package. An editable installation reads them where they
    are."""

    def run(self) -> None:
        """Build the package, then add the files."""
        super().run()
        if not self.editable_mode:
            for target, source in self._knobs().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target, preserve_mode=False)

    def _knobs(self) -> dict[str, str]:
        """Where each file goes, and where it lies."""
        names = sorted(path.name for path in Path(__file__).with_name(KNOBS).glob("*.json"))
        return {f"{self.build_lib}/megatron_lpa/{KNOBS}/{name}": f"{KNOBS}/{name}" for name in names}

    def get_source_files(self) -> list[str]:
        """Of the package and ours: a source archive holds what it is built from."""
        return [*super().get_source_files(), *self._knobs().values()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Of the package and ours: an installation records what it has to remove again."""
        return [*super().get_outputs(include_bytecode), *self._knobs()]

    def get_output_mapping(self) -> dict[str, str]:
        """Of the package and ours: a strict editable installation is links."""
        return {**super().get_output_mapping(), **self._knobs()}


setup(cmdclass={"build_py": BuildWithKnobs})
