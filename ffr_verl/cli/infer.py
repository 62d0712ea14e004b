"""`ffr-verl infer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffr_verl.cli import options as shared
from ffr_verl.cli.console import (
    clean_up_when_terminated,
    console,
    figures,
    refuse_options,
    warn,
    wrote,
)
from ffr_verl.errors import FFRError

_MOST_REASONS = 5  # why rows have no answer


def infer(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="JSONL of predictions to write.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="NAME.rl.parquet of `ffr-verl prepare`; may be repeated.")
    ] = None,
    model: shared.Model = None,
    endpoint: shared.Endpoint = None,
    api_key_env: shared.ApiKeyEnv = None,
    header_env: shared.HeaderEnv = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 for greedy answers.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the probability that tokens are drawn from.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of drawn answers; by default 0, or a server's own.")] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Write the log-probabilities of the answers' tokens.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows only.")] = None,
    max_new_tokens: shared.MaxNewTokens = 1024,
    max_images: shared.MaxImages = 8,
    images_root: shared.RecordedImagesRoot = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Cut dialogues that have more turns, answer the windows, unite the answers."),
    ] = None,
    stride: shared.Stride = None,
    window_ids: shared.GivenWindowIds = "global",
    merge: Annotated[
        list[Path] | None,
        typer.Option(
            help="NAME.rl.parquet of the whole dialogues, when --data or --predictions hold windows of them; may be "
            "repeated."
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Answers to windows by any tool, to be united with --merge; no model is asked."),
    ] = None,
    answer_style: shared.WrittenStyle = "plain",
    lora: shared.Lora = None,
    max_model_len: shared.MaxModelLen = 15_536,
    tensor_parallel_size: shared.TensorParallelSize = 1,
    gpu_memory_utilization: shared.GpuMemoryUtilization = 0.9,
    trust_remote_code: shared.TrustRemoteCode = False,
    model_family: shared.ServedFamily = "qwen2_vl",
    concurrency: shared.Concurrency = 8,
    timeout: shared.Timeout = 300.0,
    retries: shared.Retries = 6,
    body: shared.Body = None,
    allow_errors: Annotated[
        bool,
        typer.Option("--allow-errors", help="Write the output although the server gave no answer to some rows."),
    ] = False,
    force: shared.Force = False,
    restart: shared.Restart = False,
) -> None:
    """Answer the rows of a data set with a model.

    Answers are greedy by default and are written as predictions. The model runs here in vLLM, or is asked over the
    network with --endpoint; nothing else is contacted. A run that was interrupted is resumed when it is started
    again. docs/inference.md describes the rows, windows and servers.

    Example: ffr-verl infer --model models/grpo --data data/test.rl.parquet --output pred.jsonl --logprobs

    Example: ffr-verl infer --model models/grpo --data data/wechat.rl.parquet --window 40 --output pred.jsonl

    Example: ffr-verl infer --endpoint https://api.openai.com/v1 --api-key-env OPENAI_API_KEY --model gpt-4o
    --data data/test.rl.parquet --output gpt-4o.jsonl

    Example: ffr-verl infer --data windows.rl.parquet --merge whole.rl.parquet --model models/grpo --output pred.jsonl
    """
    options = dict(locals())
    from ffr_verl.data.windows import WindowSettings
    from ffr_verl.inference.infer import infer as infer_rows
    from ffr_verl.inference.infer import merge_predictions
    from ffr_verl.inference.progress import RowProgress
    from ffr_verl.inference.rows import images_root_of

    clean_up_when_terminated()
    if window is None:
        refuse_options(context, ("stride", "window_ids"), "goes with --window TURNS")
    if merge:
        refuse_options(context, ("window", "limit"), "does not go with --merge, which needs all windows as they are")
    if predictions is not None:
        refuse_options(context, ("data", "model", "endpoint"), "does not go with --predictions, which only merges")
        if not merge:
            raise FFRError("--predictions: give the file of the whole dialogues too, with --merge NAME.rl.parquet")
        summary = merge_predictions(predictions, merge, output, style=answer_style, force=force)
    else:
        if not data:
            raise FFRError("give --data NAME.rl.parquet of `ffr-verl prepare`")
        settings = shared.answering_settings(context, options, lambda: images_root_of(data, images_root))
        with RowProgress("answering", console, loading="" if endpoint else f"{model} into vLLM") as progress:
            summary = infer_rows(
                data,
                output,
                settings,
                window=None if window is None else WindowSettings.of(window, stride, window_ids),
                whole=merge or (),
                style=answer_style,
                limit=limit,
                allow_errors=allow_errors,
                force=force,
                restart=restart,
                say=warn,
                on_rows=progress.update,
            )
    values = {
        "rows asked": summary.asked,
        "  by an interrupted run": summary.resumed,
        "  cut off at --max-new-tokens": summary.cut_off,
    }
    values = values if summary.asked else {}  # --predictions: nothing was asked
    values["  without an answer"] = sum(count for _, count in summary.errors)
    if merge or window is not None:
        values["windows whose answer is not in the format"] = summary.malformed_windows
    figures(f"{summary.rows:,} prediction{'s' * (summary.rows != 1)}, {summary.seconds:.0f} s", values)
    for reason, count in summary.errors[:_MOST_REASONS]:
        warn(f"{count:,} without an answer: {reason}")
    if len(summary.errors) > _MOST_REASONS:
        warn(f"and {len(summary.errors) - _MOST_REASONS:,} more reasons")
    for path in (summary.windows, output):
        if path is not None:
            wrote(path)
