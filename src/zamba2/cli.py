"""The command line: a table of commands. What they need is imported inside, so that ``--help`` is instant."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from zamba2.commands import complain
from zamba2.errors import Zamba2Error

__all__ = ["app", "run"]

app = typer.Typer(
    name="zamba2",
    help="Run the Zamba2 hybrid language models (Mamba2 with shared attention).",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Options that several commands share. Typer evaluates these on Python 3.10 too, hence Optional.
# ruff: noqa: UP045
Model = Annotated[str, typer.Option("--model", "-m", help="Short name (2.7b-instruct, 1.2b, 7b, ...), Hub id, folder or .pt file.")]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit on the Hub.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is already downloaded.")]
Device = Annotated[Optional[str], typer.Option(help="Run with PyTorch on cpu, cuda, cuda:1 or mps; without: a GPU or the native engine.")]
Dtype = Annotated[Optional[str], typer.Option(help="Run with PyTorch in float32, bfloat16 or float16.")]
FormatName = Annotated[
    Optional[str], typer.Option("--format", help="Packed weights: q4 (the default on CPUs), q8 or bf16; on a GPU with --device cuda.")
]
KVFormatName = Annotated[Optional[str], typer.Option("--kv-format", help="Keys and values of packed models: bf16, or q8, half as large.")]
Threads = Annotated[Optional[int], typer.Option(min=1, max=1024, help="Threads of the native engine; one per core if not given.")]
AllThreads = Annotated[Optional[int], typer.Option(min=1, max=1024, help="Threads; one per core if not given.")]
Pin = Annotated[Optional[bool], typer.Option("--pin", help="Keep each of these threads on a processor of its own (Linux).")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token each time.")]
TopK = Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens that together have this probability.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest one.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1, makes tokens already seen less likely.")]
FrequencyPenalty = Annotated[float, typer.Option(help="Taken from a token's score for each time it was generated.")]
PresencePenalty = Annotated[float, typer.Option(help="Taken from the score of every token already generated.")]
LogitBias = Annotated[Optional[list[str]], typer.Option(metavar="ID=VALUE", help="Added to a token's score; repeatable.")]
Seed = Annotated[Optional[int], typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[Optional[list[str]], typer.Option(help="End the text before this; repeatable.")]
# The names of zamba2.train.data.SOURCES, which is slow to import.
DATA_SETS = (
    "ultrachat, infinity, infinity-3m, infinity-0625, infinity-gen, infinity-7m_domains, gsm8k, self-instruct, sharegpt, text, messages; "
    "or ultrafeedback, orca, openhermes, llama-factory, preferences"
)
Adapter = Annotated[Optional[Path], typer.Option(help="Folder of a LoRA adapter (peft) to add at run time, unmerged.")]
System = Annotated[Optional[str], typer.Option("--system", "-s", help="System message.")]


@app.command()
def generate(
    prompt: Annotated[Optional[str], typer.Argument(help="Text to continue; '-' or nothing reads standard input.")] = None,
    model: Model = "demo",
    file: Annotated[Optional[Path], typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    messages: Annotated[Optional[Path], typer.Option(help="Answer a JSON list of {role, content} messages.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Treat the prompt as a user's message: use the chat template.")] = False,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    logprobs: Annotated[Optional[int], typer.Option(help="With --json: log-probabilities and this many alternatives.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    format: FormatName = None,
    kv_format: KVFormatName = None,
    adapter: Adapter = None,
    threads: Threads = None,
    pin: Pin = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Continue a text, or answer a message.

    Examples:

        zamba2 generate "Once upon a time" --max-tokens 50

        zamba2 generate --chat "Name three rivers." --model 2.7b-instruct

        zamba2 generate --file story.txt --temperature 0.8 --seed 7 --json

        echo "Roses are red," | zamba2 generate
    """
    from zamba2.commands.generate import main

    options = sampling_options(locals())
    where = loading(locals())
    main(model, where, prompt, file, messages, chat, system, options | {"logprobs": logprobs}, as_json)


@app.command()
def chat(
    model: Model = "demo",
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    device: Device = None,
    dtype: Dtype = None,
    format: FormatName = None,
    kv_format: KVFormatName = None,
    adapter: Adapter = None,
    threads: Threads = None,
    pin: Pin = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Talk to a model in the terminal; each turn reads only what is new. `/help` lists the commands inside.

    Examples:

        zamba2 chat --model 2.7b-instruct

        zamba2 chat -m ./my-finetune --system "Answer in one sentence." --temperature 0.7
    """
    from zamba2.commands.chat import main

    options = sampling_options(locals())
    where = loading(locals())
    raise typer.Exit(main(model, where, system, options))


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Shape (1.2b, 2.7b, 7b), short name, Hub id, folder or .pt file.")] = "demo",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Show a model's config, sizes, costs and layer plan without loading its weights.

    Examples:

        zamba2 info 2.7b

        zamba2 info Zyphra/Zamba2-1.2B-instruct --json
    """
    from zamba2.commands.info import main

    main(model, revision=revision, offline=offline, as_json=as_json)


@app.command()
def download(
    model: Annotated[str, typer.Argument(help="Short name (2.7b-instruct, ...) or Hub id.")],
    revision: Revision = None,
) -> None:
    """Download a checkpoint into the Hub cache, resuming where an earlier try stopped, and print its folder.

    Examples:

        zamba2 download 2.7b-instruct

        HF_TOKEN=... zamba2 download me/my-private-zamba2 --revision v2
    """
    from zamba2.weights.hub import resolve

    print(resolve(model, revision=revision))


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Short name, Hub id or folder of the checkpoint to pack.")],
    target: Annotated[Path, typer.Argument(help="New folder for the packed checkpoint.")],
    format: Annotated[str, typer.Option("--format", help="q4 (4.5 bits a weight), q8 (8.5) or bf16 (16).")] = "q4",
    embeddings: Annotated[Optional[str], typer.Option(help="Format of the embeddings and lm_head; q8 beside q4 if not given.")] = None,
    calibrate: Annotated[Optional[Path], typer.Option(metavar="TEXT", help="A text that decides how to round.")] = None,
    calibrate_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the text to read.")] = 4096,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Pack a checkpoint into 4, 8 or 16 bits a weight, for the native CPU engine or a GPU.

    With `--calibrate` the model reads a text first, and rounding makes good what it can of the errors that such a text would
    show: the same size, less than half of the KL divergence in q4. Any prose in the languages that matter to you will do.

    Examples:

        zamba2 quantize 2.7b-instruct ./zamba2-q4

        zamba2 quantize ./my-finetune ./my-finetune-q8 --format q8

        zamba2 quantize 2.7b-instruct ./zamba2-q4 --calibrate novel.txt
    """
    from zamba2.commands.quantize import main

    main(
        source, target, format, embeddings=embeddings, calibrate=calibrate, calibrate_tokens=calibrate_tokens, revision=revision,
        offline=offline,
    )  # fmt: skip


@app.command()
def bench(
    shape: Annotated[
        Optional[str], typer.Option(help="Random weights of 1.2b, 2.7b (the default), 7b, or a folder with a config.json.")
    ] = None,
    model: Annotated[Optional[str], typer.Option("--model", "-m", help="Measure a real checkpoint: short name, Hub id or folder.")] = None,
    format: Annotated[
        Optional[str], typer.Option("--format", help="q4, q8 or bf16; q4 (on a GPU bf16), or what the checkpoint is packed in.")
    ] = None,
    kv_format: KVFormatName = None,
    device: Annotated[str, typer.Option(help="cpu for the native engine, or cuda for a GPU.")] = "cpu",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after the first.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds, after one to warm up.")] = 5,
    threads: AllThreads = None,
    compare: Annotated[
        Optional[list[str]], typer.Option(help="Measure beside it: transformers, transformers-fp32, llama.cpp; repeatable.")
    ] = None,
    startup: Annotated[bool, typer.Option("--startup", help="Also time zamba2 generate, start to first token, step by step.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON document alone.")] = False,
    out: Annotated[Optional[Path], typer.Option(help="Also write the JSON document to this file.")] = None,
) -> None:
    """Measure how fast the model runs: rates, memory, and the share of the machine's bandwidth and arithmetic that they are.

    Weights are random and of the true shape, made once in the cache, unless a model is given. The last line of standard output is one
    JSON document.

    Examples:

        zamba2 bench --shape 2.7b --format q4

        zamba2 bench --shape 2.7b --batch 4 --json

        zamba2 bench --compare transformers --compare llama.cpp

        zamba2 bench --device cuda --compare transformers
    """
    from zamba2.commands.bench import main

    main(shape, model, format, kv_format, prompt_tokens, new_tokens, batch, repeats, threads, compare or [], startup, as_json, out, device)


@app.command()
def figures(
    out: Annotated[Path, typer.Option(help="Folder of the results and the report; goes on with an earlier try's.")] = Path("figures"),
    models: Annotated[
        Optional[list[str]],
        typer.Option(help="Beside it: phi-2, phi-3-mini, stablelm-3b, gemma-2-2b, danube-4b, mistral-7b, or zamba2-2.7b in transformers."),
    ] = None,
    formats: Annotated[Optional[list[str]], typer.Option(help="Of ours: q4, q8, bf16; all if not given.")] = None,
    engines: Annotated[Optional[list[str]], typer.Option(help="zamba2, transformers, llama.cpp; all that are installed.")] = None,
    prompt_tokens: Annotated[Optional[list[int]], typer.Option(min=1, help="Lengths of prompts: 128, 512, 1024, 2048.")] = None,
    batches: Annotated[Optional[list[int]], typer.Option(min=1, help="Numbers of sequences of 128 tokens: 1, 4, 8.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after the first.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds over all points.")] = 3,
    budget: Annotated[str, typer.Option(help="Time for this try, such as 30m or 2h.")] = "2h",
    memory: Annotated[Optional[float], typer.Option(help="GB that one process may take; what is free, less one, if not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    threads: AllThreads = None,
    small: Annotated[bool, typer.Option("--small", help="Shapes shrunk to next to nothing: tries everything in minutes.")] = False,
    again: Annotated[Optional[Path], typer.Option(help="Only draw: the report of this figures.json, into --out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON document alone.")] = False,
) -> None:
    """Make the card's efficiency figures here: time to first token, latency, throughput and memory beside models of Zamba2's size.

    True shapes with random weights; each measurement in a process of its own; within the time and memory given. Options that name
    several things are given once for each. The last line of standard output is one JSON document.

    Examples:

        zamba2 figures --budget 2h

        zamba2 figures --models phi-3-mini --prompt-tokens 512 --repeats 1 --out quick

        zamba2 figures --again figures/figures.json --out redrawn
    """
    from zamba2.commands.figures import main

    main(
        out, models or [], formats or [], engines or [], prompt_tokens or [], batches or [], new_tokens, repeats, budget, memory, device,
        threads, small, again, as_json,
    )  # fmt: skip


@app.command()
def serve(
    model: Model = "demo",
    host: Annotated[str, typer.Option(help="Address; one that others can reach needs API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[Optional[str], typer.Option(help="What clients call the model; as --model if not given.")] = None,
    api_keys: Annotated[Optional[Path], typer.Option(help="File of API keys, one a line; ZAMBA2_API_KEYS has some too.")] = None,
    open_to_all: Annotated[bool, typer.Option("--open", help="Let others reach it without a key.")] = False,
    cors: Annotated[Optional[list[str]], typer.Option(help="Origin of a web page that may call it, such as https://a.example.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a chat's reply where the request does not say.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Replies written at once.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that wait; one more gets 429.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that replies have to finish when it is stopped.")] = 10,
    cache_mb: Annotated[int, typer.Option(min=0, help="Memory for states of conversations, in MB; 0 keeps none.")] = 1024,
    cache_folder: Annotated[Optional[Path], typer.Option(help="Keep them here too, across restarts.")] = None,
    disk_mb: Annotated[int, typer.Option(min=1, help="Most of that, in MB.")] = 8192,
    body_mb: Annotated[int, typer.Option(min=1, help="Largest body of a request, in MB.")] = 4,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what is asked, too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log no requests.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    format: FormatName = None,
    kv_format: KVFormatName = None,
    adapters: Annotated[
        Optional[list[str]],
        typer.Option(
            "--adapter", metavar="NAME=FOLDER", help="A LoRA adapter (peft) in FOLDER: requests to model NAME use it; repeatable."
        ),
    ] = None,
    threads: Threads = None,
    pin: Pin = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Serve a model to OpenAI's and Anthropic's clients, and a chat page to a browser.

    The history of a conversation is not read again: states are kept behind each message. Stop it with Ctrl-C.

    Examples:

        zamba2 serve --model 2.7b-instruct

        zamba2 serve --port 9000 --cache-folder states

        zamba2 serve --model 1.2b-instruct --adapter polite=adapters/polite --adapter short=adapters/short

        ZAMBA2_API_KEYS=secret zamba2 serve --host 0.0.0.0
    """
    from zamba2.commands.serve import main

    where = loading(locals())
    main(
        model, where, host=host, port=port, name=name, api_keys=api_keys, open_to_all=open_to_all, origins=cors or (),
        max_tokens=max_tokens, batch=batch, queue=queue, seconds=timeout, grace=grace, cache_mb=cache_mb, cache_folder=cache_folder,
        disk_mb=disk_mb, body_mb=body_mb, log_prompts=log_prompts, quiet=quiet, adapters=adapters or (),
    )  # fmt: skip


train = typer.Typer(
    help="Post-train a model: look at the data, then SFT, then DPO.", rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.add_typer(train, name="train")


@train.command()
def preview(
    sets: Annotated[list[str], typer.Argument(metavar="NAME[:PATH][=WEIGHT]...", help=f"Data sets of one stage: {DATA_SETS}.")],
    model: Annotated[
        str, typer.Option("--model", "--tokenizer", "-m", help="Whose tokenizer and chat template: short name, Hub id or folder.")
    ] = "demo",
    count: Annotated[int, typer.Option("--count", "-c", min=0, help="Examples to show, drawn by weight.")] = 3,
    rows: Annotated[int, typer.Option(min=0, help="Most rows of each set to read; 0 reads all.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed shows the same examples.")] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Longer examples are dropped.")] = 4096,
    language: Annotated[str, typer.Option(help="Of the sets that name it, keep this language; all keeps every one.")] = "en",
    ties: Annotated[bool, typer.Option("--ties", help="Keep preferences with equal answers or scores.")] = False,
    against: Annotated[
        Optional[list[Path]],
        typer.Option(metavar="FILE", help="Drop prompts of this evaluation (JSON lines with prompt or turns); repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Show training data as the model gets it: rendered, tokenized, and in colour what is trained on.

    A set is a name, read from the Hub, or NAME:PATH for files of its format (.parquet, .jsonl, .json, or a folder). The table
    at the end counts what was dropped and why, repeated prompts included.

    Examples:

        zamba2 train preview ultrachat infinity=2 --against question.jsonl

        zamba2 train preview gsm8k:train.jsonl --model 2.7b-instruct --count 5

        zamba2 train preview ultrafeedback orca openhermes=0.5 --max-tokens 2048 --json
    """
    from zamba2.commands.train import preview as main

    main(
        sets, model, count=count, rows=rows, seed=seed, max_tokens=max_tokens, language=language, ties=ties, against=against or [],
        as_json=as_json, revision=revision, offline=offline,
    )  # fmt: skip


OUR_RECIPES = "sft-2.7b, sft-2.7b-lora, sft-cpu, dpo-2.7b, dpo-2.7b-lora, dpo-cpu"
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help=f"A YAML file, or one of ours: {OUR_RECIPES}.")]
Changes = Annotated[
    Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the recipe in other words, as in out=run2 lora.rank=8.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")]
Show = Annotated[bool, typer.Option("--show", help="Print the recipe with every field, and train nothing.")]


@train.command()
def sft(recipe: RecipeName, changes: Changes = None, resume: Resume = False, show: Show = False) -> None:
    """Supervised fine-tuning: learn what the assistant says in conversations, or all of plain texts.

    The recipe decides everything; the run's folder (out) gets the recipe, the metrics, checkpoints, a plot and the model.

    Examples:

        zamba2 train sft sft-2.7b --show

        zamba2 train sft sft-2.7b-lora out=run1 learning_rate=1e-4

        zamba2 train sft my-recipe.yaml --resume
    """
    from zamba2.commands.train import stage

    stage("sft", recipe, changes or [], resume=resume, show=show)


@train.command()
def dpo(recipe: RecipeName, changes: Changes = None, resume: Resume = False, show: Show = False) -> None:
    """Direct preference optimization: move from rejected answers to chosen ones, held to where the model started.

    The recipe decides everything; the run's folder (out) gets the recipe, the metrics, checkpoints, a plot and the model.

    Examples:

        zamba2 train dpo dpo-2.7b --show

        zamba2 train dpo dpo-2.7b-lora model=run1/model out=run2 beta=0.05
    """
    from zamba2.commands.train import stage

    stage("dpo", recipe, changes or [], resume=resume, show=show)


DEMO_FOLDER = "zamba2-demo"


@train.command()
def demo(
    out: Annotated[str, typer.Argument(help="The folder to build in; what an earlier try left there is used.")] = DEMO_FOLDER,
    changes: Changes = None,
    small: Annotated[float, typer.Option(min=1e-5, max=1, help="The share of data and prompts to use: 0.01 shows how it goes.")] = 1.0,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Training processes; on CPUs, one per core is fastest.")] = 1,
) -> None:
    """Build the demonstration model that ships in the package, from nothing: text, SFT, DPO, measurements and its card.

    Hours on two cores. The result is OUT/model, in q8.

    Examples:

        zamba2 train demo

        zamba2 train demo --processes 2

        zamba2 train demo try --small 0.01 seed=1
    """
    from zamba2.commands.train import demonstration

    wanted = list(changes or [])
    if "=" in out and "/" not in out:  # a change: the folder was left out
        out, wanted = DEMO_FOLDER, [out, *wanted]
    demonstration(Path(out), wanted, small=small, processes=processes)


evaluate = typer.Typer(
    help="Measure a model: lm-eval tasks, IFEval, MT-Bench, perplexity, divergence from another.", rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.add_typer(evaluate, name="evaluate")

TextFile = Annotated[Path, typer.Argument(help="A UTF-8 text file.")]
Context = Annotated[int, typer.Option(min=2, help="Tokens of a window, the begin token among them; each is read from its start.")]
Out = Annotated[Optional[Path], typer.Option(help="Folder to write the result into, as EVALUATION.json.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@evaluate.command()
def perplexity(
    text: TextFile, model: Model = "demo", context: Context = 2048, out: Out = None, as_json: AsJson = False,
    format: FormatName = None, kv_format: KVFormatName = None, adapter: Adapter = None, device: Device = None, dtype: Dtype = None,
    threads: Threads = None, revision: Revision = None, offline: Offline = False,
) -> None:  # fmt: skip
    """How well a model predicts a text: nats and perplexity per token, and by position.

    Examples:

        zamba2 evaluate perplexity novel.txt --model 2.7b

        zamba2 evaluate perplexity novel.txt --model 2.7b --format q4 --context 4096 --out results --json
    """
    from zamba2.commands.evaluate import perplexity as main

    where = loading(locals())
    main(text, model, where, context=context, out=out, as_json=as_json)


@evaluate.command()
def divergence(
    text: TextFile,
    reference: Annotated[str, typer.Option("--reference", "-r", help="The model to be near to: short name, Hub id or folder.")],
    reference_format: Annotated[Optional[str], typer.Option(help="Its packed format: bf16, q8 or q4.")] = None,
    reference_dtype: Annotated[Optional[str], typer.Option(help="Or run it with PyTorch, in float32, bfloat16 or float16.")] = None,
    model: Model = "demo", context: Context = 2048, out: Out = None, as_json: AsJson = False,
    format: FormatName = None, kv_format: KVFormatName = None, adapter: Adapter = None, device: Device = None, dtype: Dtype = None,
    threads: Threads = None, offline: Offline = False,
) -> None:  # fmt: skip
    """How far a model's predictions on a text are from a reference's: Kullback-Leibler divergence in nats, and agreement.

    Examples:

        zamba2 evaluate divergence novel.txt --reference 2.7b --reference-format bf16 --model 2.7b --format q4

        zamba2 evaluate divergence novel.txt --reference ./original --reference-dtype float32 --model ./packed-q8 --json
    """
    from zamba2.commands.evaluate import divergence as main

    where = loading(locals())
    reference_where = {"format": reference_format, "dtype": reference_dtype, "offline": offline}
    main(text, reference, model, reference_where, where, context=context, out=out, as_json=as_json)


Answerer = Annotated[
    str, typer.Option("--model", "-m", help="Short name, Hub id or folder; hf:ID runs in transformers, openai:URL#MODEL at an endpoint.")
]
Results = Annotated[Path, typer.Option(help="Folder for answers and results; what an interrupted run left there is not done again.")]
Limit = Annotated[Optional[int], typer.Option(min=1, help="Take the first so many alone: a look at how it goes, no score to quote.")]


@evaluate.command()
def tasks(
    names: Annotated[list[str], typer.Argument(metavar="TASK...", help="Names, patterns or YAML files of lm-eval's tasks.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Short name, Hub id or folder; hf:ID; openai:URL#MODEL.")] = "demo",
    few_shot: Annotated[Optional[int], typer.Option(min=0, help="Examples before each question; the task's own number without.")] = None,
    limit: Limit = None,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Requests in a call.")] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Put questions through the chat template.")] = False,
    include: Annotated[Optional[Path], typer.Option(help="A folder of YAML files that adds tasks.")] = None,
    out: Results = Path("results"), as_json: AsJson = False, format: FormatName = None, kv_format: KVFormatName = None,
    adapter: Adapter = None, device: Device = None, dtype: Dtype = None, threads: Threads = None, revision: Revision = None,
    offline: Offline = False,
) -> None:  # fmt: skip
    """Run tasks of lm-eval, the field's usual harness, on a model. Needs the extra `evaluate`.

    Examples:

        zamba2 evaluate tasks arc_easy hellaswag --model 2.7b

        zamba2 evaluate tasks gsm8k --model 2.7b-instruct --chat --limit 20
    """
    from zamba2.commands.evaluate import tasks as main

    where = loading(locals())
    main(
        names, model, where, few_shot=few_shot, limit=limit, batch=batch, chat=chat, include=include, out=out, as_json=as_json
    )


@evaluate.command()
def ifeval(
    model: Answerer = "demo",
    prompts: Annotated[Optional[Path], typer.Option(help="IFEval's input_data.jsonl; from the Hub if not given.")] = None,
    responses: Annotated[Optional[Path], typer.Option(help="Score these answers instead of the model's (prompt and response).")] = None,
    limit: Limit = None,
    max_tokens: Annotated[Optional[int], typer.Option("--max-tokens", "-n", min=1, help="Longest answer; 1280 if not given.")] = None,
    out: Results = Path("results"), as_json: AsJson = False, format: FormatName = None, kv_format: KVFormatName = None,
    adapter: Adapter = None, device: Device = None, dtype: Dtype = None, threads: Threads = None, revision: Revision = None,
    offline: Offline = False,
) -> None:  # fmt: skip
    """IFEval: 541 prompts with instructions that a program can check, answered greedily. Needs the extra `evaluate`.

    Examples:

        zamba2 evaluate ifeval --model 2.7b-instruct

        zamba2 evaluate ifeval --prompts input_data.jsonl --responses gpt4.jsonl --json
    """
    from zamba2.commands.evaluate import ifeval as main

    where = loading(locals())
    main(
        model, where, prompts=prompts, responses=responses, limit=limit, max_tokens=max_tokens, out=out, as_json=as_json, offline=offline
    )


@evaluate.command("mt-bench")
def mt_bench(
    model: Answerer = "demo",
    questions: Annotated[Optional[Path], typer.Option(help="FastChat's question.jsonl.")] = None,
    judge: Annotated[Optional[str], typer.Option(help="The judge's name at its endpoint, as in gpt-4; without, answers alone.")] = None,
    judge_url: Annotated[str, typer.Option(help="Its OpenAI-compatible endpoint.")] = "https://api.openai.com/v1",
    judge_key: Annotated[str, typer.Option(help="The environment variable with its key.")] = "OPENAI_API_KEY",
    judge_prompts: Annotated[Optional[Path], typer.Option(help="FastChat's judge_prompts.jsonl.")] = None,
    references: Annotated[Optional[Path], typer.Option(help="FastChat's reference_answer/gpt-4.jsonl.")] = None,
    judgments: Annotated[Optional[Path], typer.Option(help="Only average finished ratings (model_judgment/*_single.jsonl).")] = None,
    rate: Annotated[Optional[float], typer.Option(min=0.01, help="Most requests a minute to the judge.")] = None,
    prices: Annotated[
        Optional[tuple[float, float]], typer.Option(help="Of a million prompt tokens, of a million reply tokens: for the estimate.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Judge without asking.")] = False,
    limit: Limit = None,
    max_tokens: Annotated[Optional[int], typer.Option("--max-tokens", "-n", min=1, help="Longest answer; 1024 if not given.")] = None,
    out: Results = Path("results"), as_json: AsJson = False, format: FormatName = None, kv_format: KVFormatName = None,
    adapter: Adapter = None, device: Device = None, dtype: Dtype = None, threads: Threads = None, revision: Revision = None,
    offline: Offline = False,
) -> None:  # fmt: skip
    """MT-Bench: 80 questions of two turns, rated from 1 to 10 by a judge at any OpenAI-compatible endpoint.

    Examples:

        zamba2 evaluate mt-bench --model 2.7b-instruct --questions question.jsonl --judge gpt-4 --judge-prompts judge_prompts.jsonl
        --references reference_answer/gpt-4.jsonl

        zamba2 evaluate mt-bench --judgments model_judgment/gpt-4_single.jsonl --json
    """
    from zamba2.commands.evaluate import mt_bench as main

    where = loading(locals())
    main(
        model, where, questions=questions, judgments=judgments, judge=judge, judge_url=judge_url, judge_key=judge_key,
        judge_prompts=judge_prompts, references=references, rate=rate, prices=prices, yes=yes, limit=limit, max_tokens=max_tokens, out=out,
        as_json=as_json,
    )  # fmt: skip


def version(wanted: bool) -> None:
    if wanted:
        from zamba2 import __version__

        print(f"zamba2 {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Run the Zamba2 hybrid language models (Mamba2 with shared attention)."""


# Options that say how a model is loaded.
LOADING = ("device", "dtype", "format", "kv_format", "adapter", "threads", "pin", "revision", "offline")


def loading(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those among a command's options, by the names that ``zamba2.load`` has for them."""
    return {"kv" if name == "kv_format" else name: options[name] for name in LOADING if name in options}


SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed", "max_tokens",
    "ignore_eos",
)  # fmt: skip


def sampling_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those among a command's options that say how to generate, with the repeatable ones parsed. Raises Zamba2Error."""
    bias: dict[int, float] = {}
    for text in options["logit_bias"] or ():
        token, _, value = text.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise Zamba2Error(f"--logit-bias is {text!r}; a token id and a number are needed, as in --logit-bias 42=-1.5") from None
    found = {name: options[name] for name in SAMPLING if name in options}
    return found | {"logit_bias": bias, "stop": tuple(options["stop"] or ())}


# The base of typer's own errors, from whichever click it is built on: ClickException.
UsageProblem: Any = typer.BadParameter.__mro__[2]
INTERRUPTED = 130  # what newer versions of typer return instead of raising KeyboardInterrupt


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Everything that goes wrong is one line on standard error."""
    if not os.environ.get("TERMINAL_WIDTH", "80").isdecimal():  # typer reads it as a number, whatever it is
        del os.environ["TERMINAL_WIDTH"]
    try:
        code = app(args=list(arguments) or ["--help"], prog_name="zamba2", standalone_mode=False)
        if code != INTERRUPTED:
            return code if isinstance(code, int) else 0
        message = "interrupted."
    except Zamba2Error as error:
        message = str(error)
    except (KeyboardInterrupt, typer.Abort, EOFError):
        message = "interrupted."
    except (BrokenPipeError, SystemExit):  # the reader has gone; typer turns the first into the second
        return 0
    except MemoryError:
        message = "there is not enough memory for this; use a smaller model or a shorter prompt."
    except OSError as error:
        message = f"{error.filename or 'standard output'} cannot be used ({error.strerror or error})."
    except UsageProblem as error:
        said = error.format_message()
        end = "" if said.endswith((".", "?")) else "."
        message = f"{said}{end} See {error.ctx.command_path if error.ctx else 'zamba2'} --help."
    complain(message)
    return 2
