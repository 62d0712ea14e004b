"""What must stay importable without the engine: rewards, the answer, the command's help, data preparation."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "vllm", "transformers", "verl", "hydra", "scipy", "pandas", "sentence_transformers")


def loaded_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint('modules:', *[name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import ffr_verl",
        "import ffr_verl.rewards, ffr_verl.rewards.batch",
        "import ffr_verl.dialogues, ffr_verl.data.prepare, ffr_verl.data.demo, ffr_verl.data.parquet_files",
        "import ffr_verl.samplers, ffr_verl.recipes",
        "import ffr_verl.inference.infer, ffr_verl.inference.score",
        "import ffr_verl.evaluation, ffr_verl.evaluation.report, ffr_verl.evaluation.tables",
        "import ffr_verl.embeddings, ffr_verl.embeddings.embed, ffr_verl.embeddings.plan",
        "from ffr_verl.rewards import compute_score; compute_score('', '', '')",
        "import ffr_verl.cli\nfrom typer.testing import CliRunner\n"
        "assert CliRunner().invoke(ffr_verl.cli.app, ['--help']).exit_code == 0\n"
        "assert CliRunner().invoke(ffr_verl.cli.app, ['recipe', 'list']).exit_code == 0",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert loaded_after(code) == set()


def test_the_check_itself_sees_a_heavy_module() -> None:
    assert "torch" in loaded_after("import torch")
