"""`ffr-verl ask`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ffr_verl.cli import options as shared
from ffr_verl.cli.console import clean_up_when_terminated, console, say, wrote

if TYPE_CHECKING:
    from ffr_verl.inference.ask import Found


def ask(
    context: typer.Context,
    chat: Annotated[Path, typer.Argument(help="A file of dialogues or an exported chat, in any format of `prepare`.")],
    query: Annotated[list[str] | None, typer.Argument(help="What to look for; several are asked in turn.")] = None,
    queries: Annotated[Path | None, typer.Option(metavar="FILE", help="More queries, one a line.")] = None,
    model: shared.Model = None,
    endpoint: shared.Endpoint = None,
    source_format: shared.SourceFormat = "auto",
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with the fragments lit; in a terminal it is opened."),
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print JSON instead, a line an answer.")] = False,
    images_root: shared.ChatImagesRoot = None,
    image_map: shared.ImageMap = None,
    gap_hours: shared.GapHours = 8.0,
    template: Annotated[
        Path | None, typer.Option(help="YAML with the instructions around the dialogue, as `prepare` had it.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Cut dialogues that have more turns, unite the answers.")] = 40,
    stride: shared.Stride = None,
    window_ids: shared.GivenWindowIds = "global",
    answer_style: shared.WrittenStyle = "plain",
    max_new_tokens: shared.MaxNewTokens = 1024,
    max_images: shared.MaxImages = 8,
    lora: shared.Lora = None,
    max_model_len: shared.MaxModelLen = 15_536,
    tensor_parallel_size: shared.TensorParallelSize = 1,
    gpu_memory_utilization: shared.GpuMemoryUtilization = 0.9,
    trust_remote_code: shared.TrustRemoteCode = False,
    api_key_env: shared.ApiKeyEnv = None,
    header_env: shared.HeaderEnv = None,
    model_family: shared.ServedFamily = "qwen2_vl",
    concurrency: shared.Concurrency = 8,
    timeout: shared.Timeout = 300.0,
    retries: shared.Retries = 6,
    body: shared.Body = None,
    force: shared.Force = False,
) -> None:
    """Ask a chat where something is talked about.

    Prints the fragment that the model finds. The prompts are those that `ffr-verl prepare` makes; each dialogue of the
    chat is asked. With --endpoint a server answers, and nothing else is contacted. Progress goes to stderr.

    Example: ffr-verl ask --model models/grpo result.json "where do we talk about the garden?"

    Example: ffr-verl ask --endpoint http://localhost:8000/v1 wechat.csv --queries queries.txt --html found.html
    """
    options = dict(locals(), logprobs=False)
    from ffr_verl.data.chat import Chat
    from ffr_verl.data.sources.rows import RowSettings, read_queries
    from ffr_verl.data.sources.source import ReadSettings, read_image_map
    from ffr_verl.data.templates import PromptTemplate
    from ffr_verl.data.windows import WindowSettings
    from ffr_verl.files import check_output, whole_or_nothing
    from ffr_verl.inference.ask import ask as ask_chat
    from ffr_verl.inference.progress import RowProgress

    clean_up_when_terminated()
    asked = [*(query or ()), *(() if queries is None else read_queries(queries, option="--queries"))]
    if html is not None:
        inputs = [chat, queries, template, image_map]
        check_output(html, force=force, example="found.html", inputs=inputs, option="--html")
    windows = WindowSettings.of(window, stride, window_ids)
    read = ReadSettings({} if image_map is None else read_image_map(image_map), gap_hours)
    texts = None if template is None else PromptTemplate.read(template)
    root = shared.images_root_of_chat(chat, images_root)
    settings = shared.answering_settings(context, options, lambda: root)
    stdout, beside = sys.stdout, Console(stderr=True, emoji=False)
    empty: dict[str, int] = {}

    def show(found: Found) -> None:
        if json_lines:
            stdout.write(json.dumps(found.to_dict(), ensure_ascii=False) + "\n")
            stdout.flush()
            return
        text = found.dialogue.query
        if text not in empty:
            finish()
            empty[text] = 0
            say(text, style="bold")
        empty[text] += found.is_empty
        for line in () if found.is_empty else found.lines():
            say(line)

    def finish() -> None:
        """Say in how many dialogues nothing was found, of the last query."""
        for count in [*empty.values()][-1:]:
            say(f"nothing found in {count:,} dialogue{'s' * (count != 1)}\n" if count else "")

    # On a terminal bar and answers share a console; else answers go to stdout alone.
    shown_on = console if console.is_terminal and not json_lines else beside
    with RowProgress(
        "answering", shown_on, resumes=False, loading="" if endpoint else f"{model} into vLLM"
    ) as progress:
        found = ask_chat(
            Chat(chat, root, source_format, RowSettings(read, texts), model_family),
            asked,
            settings,
            window=windows,
            style=answer_style,
            say=lambda text: say(text, style="yellow", to=beside),
            on_found=show,
            on_rows=progress.update,
        )
    finish()
    if html is not None:
        from ffr_verl.evaluation.report.fragments import fragments_page

        page = fragments_page(found, root, title=f"Found in {chat.name}")
        with whole_or_nothing([html], mend="give another --html") as (temporary,):
            temporary.write_text(page, encoding="utf-8")
        if not json_lines:
            wrote(html)
            if console.is_terminal:
                typer.launch(str(html))
