"""What must stay importable without the engine: rewards, the answer, the command's help, data preparation."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "ray", "vllm", "transformers", "verl", "hydra", "scipy", "pandas", "sentence_transformers")


STEPS = [
    "import ffr_verl",
    "import ffr_verl.rewards, ffr_verl.rewards.batch",
    "ffr_verl.rewards.compute_score('', '', '')",
    "import ffr_verl.dialogues, ffr_verl.data.prepare, ffr_verl.data.demo, ffr_verl.data.parquet_files",
    "import ffr_verl.samplers, ffr_verl.recipes",
    "from ffr_verl.integrations import easyr1, labels, ms_swift, openrlhf, trl, verifiers",
    "import ffr_verl.inference.infer, ffr_verl.inference.score",
    "import ffr_verl.evaluation, ffr_verl.evaluation.report, ffr_verl.evaluation.tables",
    "import ffr_verl.embeddings, ffr_verl.embeddings.embed, ffr_verl.embeddings.plan",
    "import ffr_verl.cli\nfrom typer.testing import CliRunner\n"
    "for command in (['--help'], ['recipe', 'list']):\n"
    "    assert CliRunner().invoke(ffr_verl.cli.app, command).exit_code == 0",
]


def test_nothing_heavy_is_imported() -> None:
    """Step by step in one process; the last step shows that a heavy module would be seen."""
    report = f"print([name for name in {HEAVY!r} if name in sys.modules])"
    program = "\n".join(["import sys", *[f"{step}\n{report}" for step in [*STEPS, "import scipy"]]])
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = run.stdout.splitlines()
    assert dict(zip([*STEPS, "import scipy"], found, strict=True)) == {
        **dict.fromkeys(STEPS, "[]"),
        "import scipy": "['scipy']",
    }
